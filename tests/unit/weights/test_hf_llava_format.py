"""Exports to stock Llava, loaded by transformers itself, against the plain reference model; and such folders read."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from dc_megatron.config import ConnectorConfig, VisionConfig
from dc_megatron.errors import UserError
from dc_megatron.reference.model import ReferenceModel
from dc_megatron.weights.hf_llava_format import hf_llava_export
from dc_megatron.weights.llava_format import llava_export
from dc_megatron.weights.model_folder import open_model
from dc_megatron.weights.model_parts import tower_of
from dc_megatron.weights.projector_files import write_projector
from dc_megatron.weights.tensor_reader import read_tensor
from tests.helpers.llava_folders import all_tensors, llava_folder, random_projector, write_export
from tests.helpers.tiny_models import (
    as_safetensors,
    tiny_clip,
    tiny_full_siglip,
    tiny_llama,
    tiny_mistral,
    tiny_phi,
    tiny_qwen2,
    tiny_qwen3,
    tiny_siglip,
)

TOLERANCE = 2e-5
MAKERS = {"clip": tiny_clip, "siglip": tiny_siglip}
GRID = [[28, 56], [56, 28], [56, 56], [28, 84]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> folder of language models and towers that the tests share."""
    root = tmp_path_factory.mktemp("models")
    found = {"llama": tiny_llama(root / "llama", layers=2)}
    for name, maker in MAKERS.items():
        found[name] = maker(root / name)
    return found


def make_model(folder, language: str, tower: str, connector: ConnectorConfig):
    """(the model as a folder with tower and projector beside it, the reference model of the same weights)."""
    vision = VisionConfig.from_folder(tower)
    reference = ReferenceModel(tower, language, vision, connector).eval()
    projector = random_projector(connector, vision, reference.language_model.config.hidden_size)
    reference.connector.load_state_dict(projector)
    path = write_projector(str(folder), projector, connector, vision)[1]
    return open_model(language, vision_tower=tower, projector=path), reference


def load(folder, **options):
    """The model by transformers alone; nothing may be missing or left over."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def read_config(folder) -> dict:
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        return json.load(file)


def write_config(folder, config: dict) -> None:
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file)


def prompt(config, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [1, s] with a picture after the third token, pixels [1, 3, h, w])."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 250, (9,), generator=generator)
    picture = torch.full((config.image_seq_length,), config.image_token_index)
    side = config.vision_config.image_size
    return torch.cat([words[:3], picture, words[3:]])[None], torch.randn(1, 3, side, side, generator=generator)


@torch.no_grad()
def reference_logits(reference: ReferenceModel, ids, features, image_token: int) -> torch.Tensor:
    text = reference.language_model
    embeddings = text.get_input_embeddings()(torch.where(ids == image_token, 0, ids))
    embeddings[ids == image_token] = features
    return text(inputs_embeds=embeddings, use_cache=False).logits


@torch.no_grad()
def assert_equals_reference(model, reference: ReferenceModel, *, words: int = 0) -> None:
    """Logits within the tolerance, and the same ``words`` greedily."""
    config = model.config
    ids, pixels = prompt(config)
    features = reference.connector_features(pixels).flatten(0, 1)
    expected = reference_logits(reference, ids, features, config.image_token_index)
    vocabulary = expected.shape[-1]
    logits = model(input_ids=ids, pixel_values=pixels).logits
    assert logits.shape[-1] == max(vocabulary, config.image_token_index + 1)
    assert (logits[..., :vocabulary] - expected).abs().max() < TOLERANCE
    if not words:
        return
    answer = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=words, do_sample=False, pad_token_id=0)
    grown = ids
    for _ in range(words):
        scores = reference_logits(reference, grown, features, config.image_token_index)[:, -1]
        grown = torch.cat([grown, scores.argmax(-1, keepdim=True)], dim=1)
        if grown[0, -1] == model.generation_config.eos_token_id:
            break
    assert answer.tolist() == grown.tolist()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("kind", ["sci", "dci", "none"])
def test_stock_llava_computes_what_was_trained(folders, tmp_path, kind, tower):
    model, reference = make_model(tmp_path / "p", folders["llama"], folders[tower], ConnectorConfig(kind))
    export = hf_llava_export(model)
    assert export.image_token_id == 256
    assert export.config["vision_feature_select_strategy"] == {"clip": "default", "siglip": "full"}[tower]
    assert_equals_reference(load(write_export(export, tmp_path / "out")), reference, words=5)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_sti_goes_with_its_code(folders, tmp_path, tower, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, reference = make_model(tmp_path / "p", folders["llama"], folders[tower], ConnectorConfig("sti"))
    with pytest.raises(UserError, match="--with-modeling-code"):
        hf_llava_export(model)
    export = hf_llava_export(model, modeling_code=True)
    patches = model.vision.num_patches
    assert export.config["image_seq_length"] == patches + 2 * (patches // 8)
    folder = write_export(export, tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    assert_equals_reference(load(folder, trust_remote_code=True), reference, words=5)
    again = open_model(folder)
    assert again.connector == model.connector
    assert_same_tensors(again, model)


def projector_of(model) -> dict[str, torch.Tensor]:
    parts = ("0.weight", "0.bias", "2.weight", "2.bias")
    return {f"mlp.{part}": read_tensor(model.reader, f"mm_projector.{part}") for part in parts}


def assert_same_tensors(found, expected, vocabulary: int = 256) -> None:
    """The same projector, tower and language model, but for the row of the picture's token."""
    for name in expected.reader.names():
        one, other = read_tensor(found.reader, name), read_tensor(expected.reader, name)
        assert torch.equal(one[:vocabulary] if name.endswith(("embed_tokens.weight", "lm_head.weight")) else one, other)
    one, other = all_tensors(tower_of(found)), all_tensors(tower_of(expected))
    assert one.keys() <= other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_layers_of_the_original_towers(tmp_path):
    """CLIP-L has 24 layers; SigLIP-so400m has 27, of which the last is not used."""
    language = tiny_llama(tmp_path / "llama", layers=1)
    expected = {
        "clip": {"sci": [23, 7, 15], "none": -2, "dci": [23, *range(23)]},
        "siglip": {"sci": [26, 7, 15], "none": -2, "dci": [26, *range(26)]},
    }
    for name, kinds in expected.items():
        tower = MAKERS[name](tmp_path / name, layers=24 if name == "clip" else 27, hidden=8)
        for kind, layers in kinds.items():
            model, reference = make_model(tmp_path / name / kind, language, tower, ConnectorConfig(kind))
            export = hf_llava_export(model)
            assert export.config["vision_feature_layer"] == layers
        assert_equals_reference(load(write_export(export, tmp_path / name / "out")), reference)


def test_a_siglip_without_its_last_layer_ends_where_it_is_read(folders, tmp_path):
    """What LLaVA folders carry; the last hidden state is not normed, so it is the one that was trained with."""
    whole = folders["siglip"]
    cut = as_safetensors(whole, tmp_path / "cut", drop=("encoder.layers.5.", "head."))
    for kind, layers in (("none", -1), ("dci", [5, *range(5)])):
        model, _ = make_model(tmp_path / kind, folders["llama"], cut, ConnectorConfig(kind))
        _, reference = make_model(tmp_path / kind, folders["llama"], whole, ConnectorConfig(kind))
        export = hf_llava_export(model)
        assert export.config["vision_config"]["num_hidden_layers"] == 5
        assert export.config["vision_feature_layer"] == layers
        assert_equals_reference(load(write_export(export, tmp_path / f"{kind} out")), reference)


@pytest.mark.parametrize("select_layer", [-1, 2])
def test_another_final_feature(folders, tmp_path, select_layer):
    connector = ConnectorConfig("dci", select_layer=select_layer)
    model, reference = make_model(tmp_path / "p", folders["llama"], folders["clip"], connector)
    assert_equals_reference(load(write_export(hf_llava_export(model), tmp_path / "out")), reference)


@pytest.mark.parametrize(
    "language",
    [
        lambda folder: tiny_mistral(folder, sliding_window=5),
        lambda folder: tiny_llama(folder, layers=1, rope_factor=8.0),
        lambda folder: tiny_llama(folder, layers=1, tied=True),
        tiny_qwen2,
        lambda folder: tiny_qwen3(folder, num_hidden_layers=2),
        lambda folder: tiny_phi(folder, num_hidden_layers=2),
    ],
    ids=["mistral_window", "llama3_rope", "tied", "qwen2", "qwen3", "phi"],
)
def test_other_language_models(folders, tmp_path, language):
    model, reference = make_model(tmp_path / "p", language(tmp_path / "l"), folders["clip"], ConnectorConfig("dci"))
    export = hf_llava_export(model)
    assert "rope_parameters" not in export.config["text_config"]
    assert export.config["text_config"]["rope_theta"] == model.language.rope_theta
    folder = write_export(export, tmp_path / "out")
    assert_equals_reference(load(folder), reference)
    read = open_model(write_export(hf_llava_export(model_of(folder, tmp_path, "sci")), tmp_path / "sci"))
    assert replace(read.language, path="") == replace(model.language, path="", vocab_size=model.language.vocab_size + 1)


def model_of(folder: str, tmp_path, kind: str):
    """The language model and tower of an export with a projector of another kind."""
    tensors = load_file(os.path.join(folder, "model.safetensors"))
    config = read_config(folder)
    width = config["vision_config"]["hidden_size"]
    first = "multi_modal_projector.linear_1.weight"
    tensors[first] = tensors[first][:, :width].contiguous()
    single = tmp_path / "single"
    os.makedirs(single)
    save_file(tensors, single / "model.safetensors")
    write_config(single, {**config, "vision_feature_layer": -2})
    return open_model(str(single), dense_connector_type=kind)


def test_a_fold_is_rounded_once(folders, tmp_path):
    """The blocks of a bf16 projector are those of the fp64 result, not of a bf16 division."""
    folder = llava_folder(
        tmp_path / "m", folders["llama"], folders["clip"], ConnectorConfig("dci"), dtype=torch.bfloat16
    )
    model = open_model(folder)
    weight = read_tensor(model.reader, "mm_projector.0.weight").double()
    final, lower, upper = weight.split(32, dim=1)
    wanted = [final + upper / 3, lower / 3, lower / 3, lower / 3, upper / 3, upper / 3]
    for dtype in (None, torch.float32):
        found = read_tensor(hf_llava_export(model, dtype=dtype).tensors, "multi_modal_projector.linear_1.weight")
        assert torch.equal(found, torch.cat(wanted, dim=1).to(dtype or torch.bfloat16))


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("kind", ["sci", "none"])
def test_an_export_is_read_back(folders, tmp_path, kind, tower):
    """From the names that we write, and from those that transformers writes when it saves the model again."""
    model, _ = make_model(tmp_path / "p", folders["llama"], folders[tower], ConnectorConfig(kind))
    folder = write_export(hf_llava_export(model), tmp_path / "out")
    load(folder).save_pretrained(tmp_path / "saved")
    in_memory = {name: value.clone() for name, value in load(folder).state_dict().items()}
    os.makedirs(tmp_path / "memory")
    save_file(in_memory, tmp_path / "memory" / "model.safetensors")
    os.link(tmp_path / "saved" / "config.json", tmp_path / "memory" / "config.json")
    for place in (folder, str(tmp_path / "saved"), str(tmp_path / "memory")):
        again = open_model(place)
        assert again.kind == "hf-llava"
        assert (again.connector, again.language.vocab_size) == (model.connector, 257)
        assert replace(again.vision, path="") == replace(model.vision, path="")
        assert_same_tensors(again, model)


def test_a_folded_projector_is_refused(folders, tmp_path):
    model, _ = make_model(tmp_path / "p", folders["llama"], folders["clip"], ConnectorConfig("dci"))
    folder = write_export(hf_llava_export(model), tmp_path / "out")
    with pytest.raises(UserError, match=r"DCI with its means folded .* '--format llava'"):
        open_model(folder)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("kind", ["sci", "dci"])
def test_a_single_layer_starts_a_dense_connector_with_zeros(folders, tmp_path, kind, tower):
    """The very same function before the first step."""
    model, reference = make_model(tmp_path / "p", folders["llama"], folders[tower], ConnectorConfig("none"))
    folder = write_export(hf_llava_export(model), tmp_path / "out")
    started = open_model(folder, dense_connector_type=kind)
    assert started.connector == ConnectorConfig(kind)
    dense = ReferenceModel(folders[tower], folders["llama"], model.vision, started.connector).eval()
    dense.connector.load_state_dict(projector_of(started))
    assert dense.connector.mlp[0].weight.shape == (64, 96)
    pixels = torch.randn(2, 3, model.vision.image_size, model.vision.image_size)
    with torch.no_grad():
        assert torch.equal(dense.connector_features(pixels), reference.connector_features(pixels))
    assert_equals_reference(load(write_export(hf_llava_export(started), tmp_path / "again")), reference)
    with pytest.raises(UserError, match="has a none connector"):
        open_model(folder, dense_connector_type="sti")


def test_stock_folders_leave_defaults_out_and_have_spare_rows(tmp_path):
    """As llava-1.5's: a text_config of a few keys, a vocabulary with rows for <image> and padding."""
    language = tiny_llama(
        tmp_path / "l", layers=1, hidden=64, heads=32, kv_heads=32, intermediate=96, vocab=264, rms_norm_eps=1e-5
    )
    model, _ = make_model(tmp_path / "p", language, tiny_clip(tmp_path / "v"), ConnectorConfig("none"))
    (tmp_path / "l" / "tokenizer.json").write_text(
        json.dumps(
            {"model": {"vocab": {f"w{i}": i for i in range(256)}}, "added_tokens": [{"content": "<image>", "id": 256}]}
        )
    )
    export = hf_llava_export(model)
    assert export.image_token_id == 256
    assert export.tensors.shape("language_model.model.embed_tokens.weight") == (264, 64)
    folder = write_export(export, tmp_path / "out")
    config = read_config(folder)
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "model_type"):
        del config["text_config"][key]
    for key in ("hidden_act", "layer_norm_eps", "model_type"):
        del config["vision_config"][key]
    for key in ("multimodal_projector_bias", "vision_feature_select_strategy", "tie_word_embeddings"):
        del config[key]
    write_config(folder, config)
    again = open_model(folder)
    assert again.language.vocab_size == 264
    assert replace(again.language, path="") == replace(model.language, path="")
    assert_same_tensors(again, model, vocabulary=264)
    load(folder)


def test_a_stock_siglip_of_another_depth(folders, tmp_path):
    """Published models end the tower one layer early and read its output; ours says that as a tower one deeper."""
    model, _ = make_model(tmp_path / "p", folders["llama"], folders["siglip"], ConnectorConfig("none"))
    folder = write_export(hf_llava_export(model), tmp_path / "out")
    config = read_config(folder)
    write_config(folder, {**config, "vision_feature_layer": -4})
    again = open_model(folder)
    assert again.vision.num_hidden_layers == 4
    stock, ours = load(folder), load(write_export(hf_llava_export(again), tmp_path / "again"))
    ids, pixels = prompt(stock.config)
    with torch.no_grad():
        assert torch.equal(ours(ids, pixels).logits, stock(ids, pixels).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": [5, 0]}, "no connector reads the layers"),
        ({"vision_feature_layer": 9}, "of a tower of 6 layers"),
        ({"vision_feature_layer": ["a"]}, "neither a layer nor a list of layers"),
        ({"vision_feature_layer": None}, "neither a layer nor a list of layers"),
        ({"vision_config": 3}, "vision_config 3; it must be an object"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config .awq.; give the model in bf16"),
        ({"vision_feature_select_strategy": "full"}, "'full' with a clip tower"),
        ({"projector_hidden_act": "relu"}, "projectors other than"),
        ({"text_config": {"model_type": "gemma"}}, "type 'gemma'; available: llama"),
        ({"model_type": "paligemma"}, "model_type 'paligemma'.*llava_next"),
    ],
)
def test_what_cannot_be_said_is_refused(folders, tmp_path, change, message):
    model, _ = make_model(tmp_path / "p", folders["llama"], folders["clip"], ConnectorConfig("none"))
    folder = write_export(hf_llava_export(model), tmp_path / "out")
    config = read_config(folder)
    write_config(folder, {**config, **change})
    with pytest.raises(UserError, match=message):
        open_model(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("language_model.model.norm.weight", None, "weights missing: model.norm.weight"),
        ("multi_modal_projector.linear_2.bias", None, "weights missing: mm_projector.2.bias"),
        ("vision_tower.vision_model.pre_layrnorm.bias", None, "weights missing: pre_layrnorm.bias"),
        (None, "language_model.model.layers.2.x", "not known here: model.layers.2.x"),
        (None, "qformer.weight", "not known here: qformer.weight"),
        (None, "multi_modal_projector.linear_3.weight", "not known here: multi_modal_projector.linear_3.weight"),
        (None, "image_newline", "only llava_next"),
        (None, "model.language_model.norm.weight", "under two names"),
    ],
)
def test_missing_and_left_over_names_are_listed(folders, tmp_path, old, new, message):
    model, _ = make_model(tmp_path / "p", folders["llama"], folders["clip"], ConnectorConfig("none"))
    folder = write_export(hf_llava_export(model), tmp_path / "out")
    tensors = load_file(os.path.join(folder, "model.safetensors"))
    if old:
        del tensors[old]
    if new:
        tensors[new] = torch.zeros(64)
    save_file(tensors, os.path.join(folder, "model.safetensors"))
    with pytest.raises(UserError, match=message):
        open_model(folder)


def test_generation_never_chooses_the_picture(folders, tmp_path):
    model, _ = make_model(tmp_path / "p", folders["llama"], folders["clip"], ConnectorConfig("none"))
    folder = write_export(hf_llava_export(model), tmp_path / "out")
    tensors = load_file(os.path.join(folder, "model.safetensors"))
    assert not tensors["language_model.lm_head.weight"][256].any()
    # Every word below zero: the picture's row would win.
    tensors["language_model.model.norm.weight"].zero_()
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    stock = load(folder)
    assert stock.generation_config.eos_token_id == 2
    ids, pixels = prompt(stock.config)
    stock.lm_head.weight.data[:256] = 0
    answer = stock.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert 256 not in answer[0, ids.shape[1] :]


def spatial_unpad(features, newline, size, grid, side):
    """LLaVA's merge of one picture: features [1 + tiles, side * side, width], size and grid as (width, height)."""
    fits = []
    for width, height in grid:
        scale = min(width / size[0], height / size[1])
        used = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        fits.append((used, -(width * height - used), (width, height)))
    best = max(fits, key=lambda fit: fit[:2])[2]
    columns, rows = best[0] // grid[0][0], best[1] // grid[0][0]
    tiles = features[1:].view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
    height, width = tiles.shape[1:]
    if size[0] / size[1] > width / height:
        cut = (height - int(size[1] * width / size[0])) // 2
        tiles = tiles[:, cut : height - cut]
    else:
        cut = (width - int(size[0] * height / size[1])) // 2
        tiles = tiles[:, :, cut : width - cut]
    ends = newline[:, None, None].expand(-1, tiles.shape[1], 1)
    return torch.cat([features[0], torch.cat([tiles, ends], dim=2).flatten(1, 2).T])


@pytest.mark.parametrize(("tower", "kind"), [("clip", "none"), ("clip", "dci"), ("siglip", "dci"), ("siglip", "sci")])
def test_anyres_goes_to_llava_next(folders, tmp_path, tower, kind):
    """Sizes and resolutions of LLaVA are (width, height), those of transformers (height, width)."""
    connector = ConnectorConfig(kind)
    side = VisionConfig.from_folder(folders[tower]).image_size
    grid = [[width // 28 * side, height // 28 * side] for width, height in GRID]
    folder = anyres_folder(tmp_path / "m", folders, connector, tower=tower, grid=grid)
    model = open_model(folder)
    assert model.image_grid_pinpoints == tuple(map(tuple, grid))
    stock = load(write_export(hf_llava_export(model), tmp_path / "out"))
    assert type(stock).__name__ == "LlavaNextForConditionalGeneration"
    assert stock.config.image_grid_pinpoints == [[height, width] for width, height in grid]

    reference = ReferenceModel(folders[tower], folders["llama"], model.vision, connector).eval()
    reference.connector.load_state_dict(projector_of(model))
    newline = read_tensor(model.reader, "image_newline")
    token = stock.config.image_token_index
    for size, tiles in {(40, 25): 3, (25, 40): 3, (50, 50): 5, (28, 84): 4}.items():
        pixels = torch.randn(tiles, 3, side, side, generator=torch.Generator().manual_seed(1))
        sizes = torch.tensor([[size[1], size[0]]])
        with torch.no_grad():
            patches = model.vision.image_size // model.vision.patch_size
            expected = spatial_unpad(reference.connector_features(pixels), newline, size, grid, patches)
            found = stock.get_image_features(pixels[None], image_sizes=sizes).pooler_output[0]
            assert found.shape == expected.shape
            assert (found - expected).abs().max() < TOLERANCE
            ids = torch.tensor([[1, 17, 5, *[token] * len(expected), 9, 40]])
            logits = stock(input_ids=ids, pixel_values=pixels[None], image_sizes=sizes).logits
            wanted = reference_logits(reference, ids, expected, token)
        assert (logits[..., :256] - wanted).abs().max() < TOLERANCE


def anyres_folder(
    folder, folders, connector: ConnectorConfig, merge: str = "spatial_unpad", tower: str = "clip", grid=GRID
) -> str:
    return llava_folder(
        folder,
        folders["llama"],
        folders[tower],
        connector,
        image_aspect_ratio="anyres",
        mm_patch_merge_type=merge,
        image_grid_pinpoints=grid,
        extra={"model.image_newline": torch.randn(64)} if merge == "spatial_unpad" else {},
    )


def test_llava_next_is_read(folders, tmp_path):
    folder = anyres_folder(tmp_path / "m", folders, ConnectorConfig("sci"))
    model = open_model(folder)
    again = open_model(write_export(hf_llava_export(model), tmp_path / "out"))
    assert again.kind == "hf-llava-next"
    assert (again.image_aspect_ratio, again.image_grid_pinpoints) == ("anyres", model.image_grid_pinpoints)
    assert again.mm_patch_merge_type == model.mm_patch_merge_type == "spatial_unpad"
    assert_same_tensors(again, model)
    assert llava_export(again).config["image_grid_pinpoints"] == GRID


def test_sti_cannot_be_anyres(folders, tmp_path):
    with pytest.raises(UserError, match="mm_patch_merge_type spatial_unpad: an sti connector adds pooled tokens"):
        open_model(anyres_folder(tmp_path / "m", folders, ConnectorConfig("sti")))
    flat = open_model(anyres_folder(tmp_path / "flat", folders, ConnectorConfig("sti"), "flat"))
    with pytest.raises(UserError, match="LlavaNext cannot append"):
        hf_llava_export(flat, modeling_code=True)


@pytest.mark.parametrize("merge", ["flat", "spatial"])
def test_other_merges_are_llavas_alone(folders, tmp_path, merge):
    model = open_model(anyres_folder(tmp_path / "m", folders, ConnectorConfig("dci"), merge))
    with pytest.raises(
        UserError, match=f"joins tiles by mm_patch_merge_type {merge}, LlavaNext by spatial_unpad alone"
    ):
        hf_llava_export(model)
    config = llava_export(model).config
    assert (config["image_aspect_ratio"], config["mm_patch_merge_type"]) == ("anyres", merge)
    assert config["image_grid_pinpoints"] == GRID


def test_a_whole_siglip_as_the_tower(folders, tmp_path):
    tower = tiny_full_siglip(tmp_path / "full")
    model, reference = make_model(tmp_path / "p", folders["llama"], tower, ConnectorConfig("sci"))
    assert_equals_reference(load(write_export(hf_llava_export(model), tmp_path / "out")), reference)


def test_without_a_projector_there_is_nothing_to_export(folders):
    with pytest.raises(UserError, match="no projector"):
        hf_llava_export(open_model(folders["llama"], vision_tower=folders["clip"]))
