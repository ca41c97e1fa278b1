"""Folders in LLaVA's own format: read, refused where they are no whole model, and written as they were."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dc_megatron.config import ConnectorConfig, VisionConfig
from dc_megatron.errors import UserError
from dc_megatron.weights.hf_llava_format import hf_llava_export
from dc_megatron.weights.llava_format import llava_export
from dc_megatron.weights.model_folder import open_model
from dc_megatron.weights.model_parts import tower_of
from dc_megatron.weights.projector_files import write_projector
from dc_megatron.weights.public_towers import PUBLIC_TOWERS, public_tower_name
from dc_megatron.weights.tensor_reader import read_tensor
from tests.helpers.llava_folders import all_tensors, llava_folder, random_projector, write_export
from tests.helpers.tiny_models import (
    as_old_bin,
    as_safetensors,
    tiny_clip,
    tiny_llama,
    tiny_mistral,
    tiny_phi,
    tiny_qwen2,
    tiny_qwen3,
    tiny_siglip,
)

GRID = [[28, 56], [56, 28], [56, 56]]
HUB_NAMES = {"clip": "openai/clip-vit-large-patch14-336", "siglip": "google/siglip-so400m-patch14-384"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> folder of language models and towers that the tests share."""
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": tiny_llama(root / "llama", layers=2),
        "tied": tiny_llama(root / "tied", layers=1, tied=True),
        "mistral": tiny_mistral(root / "mistral"),
        "qwen2": tiny_qwen2(root / "qwen2"),
        "qwen3": tiny_qwen3(root / "qwen3", num_hidden_layers=1),
        "phi": tiny_phi(root / "phi", num_hidden_layers=1),
        "clip": tiny_clip(root / "clip"),
        "siglip": tiny_siglip(root / "siglip"),
    }


def read_config(folder) -> dict:
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        return json.load(file)


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return load_file(os.path.join(folder, "model.safetensors"))


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["named tower", "tower inside"])
@pytest.mark.parametrize(("kind", "tower"), [("sti", "clip"), ("sci", "siglip"), ("dci", "clip"), ("none", "siglip")])
def test_every_tensor_comes_back_as_it_was(folders, tmp_path, kind, tower, inside, dtype):
    places = folders["llama"], folders[tower]
    source = llava_folder(tmp_path / "m", *places, ConnectorConfig(kind), inside=inside, dtype=dtype)
    model = open_model(source)
    assert (model.kind, model.connector, model.has_tower) == ("llava", ConnectorConfig(kind), inside)
    assert (model.image_aspect_ratio, model.model_max_length) == ("pad", 2048)
    assert model.has_projector
    copy = write_export(llava_export(model), tmp_path / "copy")
    assert_equal(tensors_of(copy), tensors_of(source))
    before, after = read_config(source), read_config(copy)
    ours = {key for key in before if key.startswith(("mm_", "image_", "tokenizer_", "use_mm"))}
    assert {key: after[key] for key in ours} == {key: before[key] for key in ours}
    assert after["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert open_model(copy).language == replace(model.language, path=copy)


def test_the_language_model_stands_alone_in_its_configuration(folders, tmp_path):
    """What is written beside a text model: no word of pictures, readable as a text model's config.json."""
    folder = llava_folder(tmp_path / "m", folders["llama"], folders["clip"], ConnectorConfig("dci"), max_length=4096)
    model = open_model(folder)
    config = model.language_config
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert config.keys() == read_config(folders["llama"]).keys()
    text = [name for name in model.reader.names() if not name.startswith("mm_projector.")]
    assert_equal({name: read_tensor(model.reader, name) for name in text}, tensors_of(folders["llama"]))


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, "llama"),
        ({"model_type": "llava", "architectures": None}, "llama"),
        ({"model_type": "llava_llama"}, "llama"),
        ({"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]}, "mistral"),
        ({"model_type": "llava", "architectures": ["LlavaMistralForCausalLM"]}, "mistral"),
        ({"model_type": "mistral", "architectures": ["LlavaMistralForCausalLM"]}, "mistral"),
        ({"model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"]}, "qwen"),
        ({"model_type": "qwen2", "architectures": ["LlavaQwenForCausalLM"]}, "qwen"),
        ({"model_type": "llava_qwen3", "architectures": None}, "qwen3"),
        ({"model_type": "llava_phi", "architectures": ["LlavaPhiForCausalLM"]}, "phi"),
    ],
)
def test_the_spellings_of_the_model_type(folders, tmp_path, config, family):
    text = {"qwen": "qwen2"}.get(family, family)
    folder = llava_folder(tmp_path / "m", folders[text], folders["clip"], ConnectorConfig("none"), **config)
    model = open_model(folder)
    assert model.language_config["model_type"] == text
    assert llava_export(model).config["model_type"] == f"llava_{family}"


def test_plain_llava_is_a_connector_of_type_none(folders, tmp_path):
    connector = ConnectorConfig("none", select_layer=-3)
    folder = llava_folder(tmp_path / "m", folders["llama"], folders["clip"], connector, mm_dense_connector_type=None)
    assert open_model(folder).connector == connector


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_tower_by_a_hub_name(folders, tmp_path, family, monkeypatch):
    """It has to be given where the weights are not inside; where they are, the two public configurations are known."""
    name = {"mm_vision_tower": HUB_NAMES[family]}
    places = folders["llama"], folders[family], ConnectorConfig("dci")
    outside = llava_folder(tmp_path / "outside", *places, **name)
    with pytest.raises(UserError, match=r"does not carry it; give its folder with --vision-tower"):
        open_model(outside)
    model = open_model(outside, vision_tower=folders[family])
    assert model.tower_folder == folders[family]
    assert llava_export(model).config["mm_vision_tower"] == HUB_NAMES[family]
    assert llava_export(model, vision_tower_name="org/other").config["mm_vision_tower"] == "org/other"

    inside = llava_folder(tmp_path / "inside", *places, inside=True, **name)
    with pytest.raises(UserError, match=r"from a tower of width 1(024|152)"):
        open_model(inside)
    tiny = read_config(folders[family])
    monkeypatch.setitem(PUBLIC_TOWERS, HUB_NAMES[family].split("/")[1], (tiny, {"image_mean": [0.1, 0.2, 0.3]}))
    model = open_model(inside)
    assert (model.tower_folder, model.vision.image_mean) == ("", (0.1, 0.2, 0.3))
    unknown = llava_folder(tmp_path / "unknown", *places, inside=True, mm_vision_tower="org/my-clip")
    with pytest.raises(UserError, match="carries the tower's weights, but not its configuration"):
        open_model(unknown)
    assert open_model(unknown, vision_tower=folders[family]).has_tower


def test_the_public_towers_are_those_of_the_original():
    clip, siglip = (VisionConfig.from_config(*part(name)) for name in HUB_NAMES.values())
    assert (clip.num_patches, clip.hidden_size, clip.num_hidden_layers) == (576, 1024, 24)
    assert (siglip.num_patches, siglip.hidden_size, siglip.num_hidden_layers) == (729, 1152, 27)
    assert (clip.pad_color, siglip.pad_color) == ((122, 116, 104), (127, 127, 127))


def part(name: str) -> tuple[dict, str, dict]:
    config, processor = PUBLIC_TOWERS[name.split("/")[1]]
    return config, name, processor


def test_a_tower_in_the_models_own_folder_goes_along(folders, tmp_path):
    """An import keeps a tower that came inside in a folder of its own, below the checkpoint."""
    source = llava_folder(tmp_path / "m", folders["llama"], folders["siglip"], ConnectorConfig("sci"), inside=True)
    carried = open_model(source)
    tower = tmp_path / "m" / "hf" / "vision_tower"
    os.makedirs(tower)
    named = {f"vision_model.{k.removeprefix('vision_tower.')}": v for k, v in all_tensors(tower_of(carried)).items()}
    save_file(named, tower / "model.safetensors")
    (tower / "config.json").write_text(json.dumps(carried.tower_config))
    own = {n: v for n, v in tensors_of(source).items() if "vision_tower" not in n}
    save_file(own, os.path.join(source, "model.safetensors"))
    model = open_model(source, vision_tower=str(tower))
    assert model.carries_tower
    assert not model.has_tower
    assert_equal(all_tensors(llava_export(model).tensors), all_tensors(llava_export(carried).tensors))
    assert not open_model(source, vision_tower=folders["siglip"]).carries_tower


def test_a_tower_inside_that_has_no_name_brings_its_configuration(folders, tmp_path):
    """The checkpoint of an import knows the tower's shape and not what the source called it."""
    places = folders["llama"], folders["clip"], ConnectorConfig("dci")
    model = replace(open_model(llava_folder(tmp_path / "m", *places, inside=True)), tower_name="")
    export = llava_export(model)
    assert export.config["mm_vision_tower"] == "clip_vision_tower"
    copy = write_export(export, tmp_path / "copy")
    again = open_model(copy)
    assert (again.has_tower, again.tower_config) == (True, model.tower_config)
    assert_equal(all_tensors(again.reader), all_tensors(model.reader))
    large = VisionConfig.from_config(*part(HUB_NAMES["siglip"]))
    assert public_tower_name(large) == HUB_NAMES["siglip"]
    assert public_tower_name(replace(large, image_size=224)) == ""


def test_old_files_and_their_buffers(folders, tmp_path):
    """pytorch_model.bin in shards, with buffers that are computed nowadays."""
    source = llava_folder(tmp_path / "m", folders["llama"], folders["clip"], ConnectorConfig("dci"), inside=True)
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    old = as_old_bin(source, tmp_path / "old", shards=2, extra=buffers)
    assert_equal(all_tensors(open_model(old).reader), all_tensors(open_model(source).reader))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear' is not available; mlp2x_gelu is"),
        ({"mm_projector_type": None}, "mm_projector_type 'linear'"),
        ({"mm_vision_select_feature": "cls_patch"}, "'cls_patch' is not available; patch is"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_dense_connector_type": "dcx"}, r"mm_dense_connector_type dcx: unknown \(did you mean"),
        ({"mm_dense_connector_type": "none"}, r"has shape \[64, 96\]; a none connector"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio anyres_max_9: unknown"),
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "unpad"}, "mm_patch_merge_type unpad: unknown"),
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat"}, "image_grid_pinpoints None is no list"),
        (
            {
                "image_aspect_ratio": "anyres",
                "mm_patch_merge_type": "spatial_unpad",
                "image_grid_pinpoints": [[28, 30]],
            },
            "no multiples of the tower's 28 pixels",
        ),
        (
            {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": "(1x1)"},
            "is no list of resolutions",
        ),
        (
            {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": GRID},
            "weights missing: model.image_newline",
        ),
        ({"model_type": "llava_mpt", "architectures": ["LlavaMptForCausalLM"]}, "over model_type 'llava_mpt'"),
        ({"num_hidden_layers": 3}, "weights missing: model.layers.2"),
    ],
)
def test_what_is_not_available_is_said(folders, tmp_path, change, message):
    folder = llava_folder(tmp_path / "m", folders["llama"], folders["clip"], ConnectorConfig("dci"), **change)
    with pytest.raises(UserError, match=message):
        open_model(folder)


@pytest.mark.parametrize(
    ("drop", "extra", "message"),
    [
        ("model.norm.weight", None, "weights missing: model.norm.weight"),
        ("model.mm_projector.2.bias", None, "weights missing: mm_projector.2.bias"),
        ("model.vision_tower.vision_tower.vision_model.encoder.layers.2.", None, "weights missing: encoder.layers.2"),
        ("", "model.mm_projector.4.weight", "not known here: model.mm_projector.4.weight"),
        ("", "model.layers.7.mlp.up_proj.weight", "not known here: model.layers.7"),
        ("", "model.vision_resampler.x", "not known here: model.vision_resampler.x"),
        ("", "model.vision_tower.vision_tower.vision_model.extra", "not known here: model.vision_tower"),
    ],
)
def test_missing_and_left_over_names_are_listed(folders, tmp_path, drop, extra, message):
    folder = llava_folder(
        tmp_path / "m",
        folders["llama"],
        folders["clip"],
        ConnectorConfig("sci"),
        inside=True,
        drop=(drop,) if drop else (),
        extra={extra: torch.zeros(64)} if extra else None,
    )
    with pytest.raises(UserError, match=message):
        open_model(folder)


def test_parts_of_models_are_refused_with_advice(folders, tmp_path):
    stage_1 = tmp_path / "stage1"
    os.makedirs(stage_1)
    torch.save({"model.mm_projector.0.weight": torch.zeros(2, 2)}, stage_1 / "mm_projector.bin")
    (stage_1 / "config.json").write_text(json.dumps({"model_type": "llava", "mm_vision_tower": "x"}))
    with pytest.raises(UserError, match=r"a projector alone .* --projector"):
        open_model(str(stage_1))
    for name in ("adapter_config.json", "non_lora_trainables.bin"):
        adapter = tmp_path / name.split(".")[0]
        os.makedirs(adapter)
        (adapter / name).write_text("{}")
        with pytest.raises(UserError, match=rf"has {name}: .* merge them"):
            open_model(str(adapter))
    with pytest.raises(UserError, match="no such folder"):
        open_model(str(tmp_path / "nowhere"))
    (stage_1 / "mm_projector.bin").unlink()
    (stage_1 / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"model_type 'bert'.*available: llama.*LLaVA and DenseConnector folders"):
        open_model(str(stage_1))


def test_a_tied_head_on_file_must_be_the_embedding(folders, tmp_path):
    places = folders["tied"], folders["clip"], ConnectorConfig("none")
    embedding = tensors_of(folders["tied"])["model.embed_tokens.weight"]
    same = open_model(llava_folder(tmp_path / "same", *places, extra={"lm_head.weight": embedding}))
    assert "lm_head.weight" not in same.reader.names()
    other = embedding.clone()
    other[200, 3] += 1
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        open_model(llava_folder(tmp_path / "other", *places, extra={"lm_head.weight": other}))


def test_anyres_is_kept(folders, tmp_path):
    """Resolutions may stand there as text; the vector that ends a row comes back bit by bit."""
    newline = {"model.image_newline": torch.randn(64)}
    anyres = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    folder = llava_folder(
        tmp_path / "m",
        folders["llama"],
        folders["clip"],
        ConnectorConfig("dci"),
        extra=newline,
        image_grid_pinpoints=str([tuple(size) for size in GRID]),
        **anyres,
    )
    export = llava_export(open_model(folder))
    assert_equal(all_tensors(export.tensors), tensors_of(folder))
    assert {key: export.config[key] for key in anyres} == anyres
    assert export.config["image_grid_pinpoints"] == GRID
    lost = replace(open_model(folder), image_grid_pinpoints=None)
    for written in (llava_export, hf_llava_export):
        with pytest.raises(UserError, match="its image_grid_pinpoints are not known"):
            written(lost)


def test_a_newline_that_is_not_used(folders, tmp_path):
    """Models of the AnyRes family that were trained on one square have it all the same."""
    folder = llava_folder(
        tmp_path / "m",
        folders["llama"],
        folders["clip"],
        ConnectorConfig("sci"),
        extra={"model.image_newline": torch.randn(64)},
        mm_patch_merge_type="spatial_unpad",
    )
    model = open_model(folder)
    assert model.image_grid_pinpoints is None
    export = llava_export(model)
    assert_equal(all_tensors(export.tensors), tensors_of(folder))
    assert export.config["mm_patch_merge_type"] == "spatial_unpad"
    assert "image_newline" not in hf_llava_export(model).tensors.names()


def test_a_tower_beside_the_model_is_checked_too(folders, tmp_path):
    broken = as_safetensors(folders["clip"], tmp_path / "v", drop=("encoder.layers.1.mlp",))
    folder = llava_folder(tmp_path / "m", folders["llama"], folders["clip"], ConnectorConfig("sci"))
    for place in (folder, folders["llama"]):
        with pytest.raises(UserError, match=r"--vision-tower .*weights missing: encoder\.layers\.1\.mlp"):
            open_model(place, vision_tower=broken)


def test_a_text_model_with_a_tower_and_a_projector_beside_it(folders, tmp_path):
    vision, connector = VisionConfig.from_folder(folders["clip"]), ConnectorConfig("sci")
    projector = random_projector(connector, vision, 64)
    bin_path, path = write_projector(str(tmp_path), projector, connector, vision)
    alone = open_model(folders["llama"])
    assert (alone.kind, alone.vision, alone.connector, alone.has_projector) == ("hf", None, None, False)
    assert_equal(all_tensors(alone.reader), tensors_of(folders["llama"]))
    tower = {"vision_tower": folders["clip"]}
    assert open_model(folders["llama"], **tower).connector is None
    assert open_model(folders["llama"], **tower, dense_connector_type="sti").connector == ConnectorConfig("sti")
    model = open_model(folders["llama"], **tower, projector=path)
    assert model.connector == connector
    assert torch.equal(read_tensor(model.reader, "mm_projector.2.bias"), projector["mlp.2.bias"])
    assert (
        open_model(folders["llama"], **tower, projector=bin_path, dense_connector_type="dci").connector.input_size(
            vision
        )
        == 96
    )
    for options, message in (
        ({"projector": path}, "give the tower that it belongs to"),
        ({**tower, "projector": path, "dense_connector_type": "dci"}, "was trained for sci"),
        ({**tower, "projector": bin_path}, "does not say which connector"),
        ({**tower, "dense_connector_type": "dcx"}, "dcx: unknown"),
    ):
        with pytest.raises(UserError, match=message):
            open_model(folders["llama"], **options)


def test_a_model_has_one_projector(folders, tmp_path):
    folder = llava_folder(tmp_path / "m", folders["llama"], folders["clip"], ConnectorConfig("sci"))
    with pytest.raises(UserError, match="has a projector of its own"):
        open_model(folder, projector="x.bin")
    with pytest.raises(UserError, match="has a sci connector; leave the flag out"):
        open_model(folder, dense_connector_type="dci")


def test_what_the_originals_program_reads_differently_is_said(folders, tmp_path):
    folder = llava_folder(
        tmp_path / "m", folders["mistral"], folders["clip"], ConnectorConfig("dci"), model_type="mistral"
    )
    notes = " ".join(llava_export(open_model(folder), vision_tower_name="org/tower").notes)
    for part_of_note in (
        "'llava' in the name",
        "'org/tower' would have to contain 'clip'",
        "tower of 24",
        "Llama only",
    ):
        assert part_of_note in notes
    with pytest.raises(UserError, match="no projector"):
        llava_export(open_model(folders["llama"]))


def test_the_tokenizer_goes_along(folders, tmp_path):
    folder = llava_folder(tmp_path / "m", folders["llama"], folders["clip"], ConnectorConfig("dci"))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (tmp_path / "m" / name).write_text("{}")
    (tmp_path / "m" / "training_args.bin").write_text("")
    assert set(llava_export(open_model(folder)).copies) == {
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    }


def test_a_llava_folder_becomes_a_stock_one(folders, tmp_path):
    """The tower from inside, without SigLIP's last layer, and from beside: the same tensors but for that layer."""
    places = folders["llama"], folders["siglip"], ConnectorConfig("dci")
    inside = all_tensors(hf_llava_export(open_model(llava_folder(tmp_path / "i", *places, inside=True))).tensors)
    outside = all_tensors(hf_llava_export(open_model(llava_folder(tmp_path / "o", *places))).tensors)
    assert inside.keys() <= outside.keys()
    assert all("encoder.layers.5." in name for name in outside.keys() - inside.keys())
    assert_equal(inside, {name: outside[name] for name in inside})
