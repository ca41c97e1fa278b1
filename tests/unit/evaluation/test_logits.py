"""Logits of folders of every kind that transformers or the plain model runs, compared; what must differ does."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dc_megatron.config import ConnectorConfig, VisionConfig
from dc_megatron.errors import UserError
from dc_megatron.evaluation import logits
from dc_megatron.evaluation.logit_inputs import LENGTH, ROWS, picture_input, text_input
from dc_megatron.evaluation.logits import compare_logits
from dc_megatron.weights.exporter import plan_export
from dc_megatron.weights.model_folder import open_model
from tests.helpers.llava_folders import llava_folder, write_export
from tests.helpers.tiny_models import as_safetensors, tiny_clip, tiny_llama, tiny_qwen2, tiny_siglip

VOCABULARY = 256
# Tiny models have logits of a few units; two orders of fp32 sums over them were seen to differ by 4e-6.
SAME = 2e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> folder: a language model, towers, LLaVA folders, and stock ones exported from them."""
    root = tmp_path_factory.mktemp("models")
    found = {"text": tiny_llama(root / "text", layers=2), "clip": tiny_clip(root / "clip")}
    found["siglip"] = tiny_siglip(root / "siglip")
    for tower, kind in (("clip", "sci"), ("siglip", "dci"), ("clip", "none"), ("clip", "sti")):
        name = f"{tower}_{kind}"
        connector = ConnectorConfig(kind)
        found[name] = llava_folder(root / name, found["text"], found[tower], connector, inside=tower == "siglip")
        found[f"{name}_stock"] = stock(found[name], root / f"{name}_stock")
    return found


def stock(folder, target, dtype: torch.dtype | None = None) -> str:
    """The stock export, whose picture's token is a row more than the vocabulary."""
    model = open_model(folder)
    export = plan_export(model, "hf-llava", dtype, modeling_code=True, image_token=(VOCABULARY, VOCABULARY + 1))
    path = write_export(export, target)
    if dtype:
        tensors = load_file(f"{path}/model.safetensors")
        save_file({name: t.to(dtype) for name, t in tensors.items()}, f"{path}/model.safetensors", {"format": "pt"})
    return path


def changed(folder, target, **values) -> str:
    """A copy of ``folder`` with other entries in config.json."""
    shutil.copytree(folder, target)
    with open(os.path.join(target, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    with open(os.path.join(target, "config.json"), "w", encoding="utf-8") as file:
        json.dump({**config, **values}, file)
    return str(target)


def by_input(comparison) -> dict:
    return {difference.input: difference for difference in comparison.differences}


@pytest.mark.parametrize("name", ["clip_sci", "siglip_dci", "clip_none"])
def test_a_llava_folder_computes_what_its_stock_export_does(folders, name):
    result = compare_logits(folders[name], folders[f"{name}_stock"])
    found = by_input(result)
    assert result.equal
    assert not result.notes
    assert found.keys() == {"text", "picture"}
    for difference in found.values():
        assert difference.largest <= SAME
        assert difference.same_tokens == difference.places
        assert SAME <= difference.tolerance < 1e-3
    assert (found["text"].places, found["picture"].places) == (ROWS * LENGTH, LENGTH)


def test_the_same_weights_in_other_files_compute_the_same(folders, tmp_path):
    result = compare_logits(folders["text"], as_safetensors(folders["text"], tmp_path / "sharded", shards=3))
    assert by_input(result)["text"].largest == 0.0
    assert "no projector" in result.notes[0]
    assert "within the tolerance" in result.lines()[0]
    entries = result.as_entries()
    assert entries["logits_equal"]
    assert json.loads(json.dumps(entries))["logits"][0]["places"] == ROWS * LENGTH


def test_a_text_model_against_the_words_of_a_llava_folder(folders):
    result = compare_logits(folders["clip_sci"], folders["text"])
    assert result.equal
    assert by_input(result).keys() == {"text"}


def test_every_entry_of_the_configuration_reaches_the_plain_model(folders, tmp_path):
    qwen = tiny_qwen2(tmp_path / "qwen2", tie_word_embeddings=True)
    llava = llava_folder(
        tmp_path / "llava",
        qwen,
        folders["clip"],
        ConnectorConfig("none"),
        model_type="llava_qwen",
        architectures=["LlavaQwenForCausalLM"],
    )
    assert by_input(compare_logits(llava, qwen))["text"].largest <= SAME


@pytest.mark.parametrize("values", [{"rms_norm_eps": 1e-2}, {"rope_parameters": {"rope_theta": 500.0}}])
def test_another_configuration_over_the_same_bits_is_a_difference(folders, tmp_path, values):
    if "rope_parameters" in values:
        values["rope_parameters"]["rope_type"] = "default"
    result = compare_logits(folders["text"], changed(folders["text"], tmp_path / "other", **values))
    assert not result.equal
    assert "OVER the tolerance" in result.lines()[0]


def test_layers_in_another_order_are_a_difference_of_the_picture_alone(folders, tmp_path):
    stored = folders["clip_sci_stock"]
    with open(f"{stored}/config.json", encoding="utf-8") as file:
        layers = json.load(file)["vision_feature_layer"]
    result = compare_logits(
        folders["clip_sci"], changed(stored, tmp_path / "other", vision_feature_layer=[*reversed(layers)])
    )
    found = by_input(result)
    assert found["text"].equal
    assert not found["picture"].equal
    assert not result.equal


def test_means_folded_into_a_rounded_projector_have_the_roundings_tolerance(folders, tmp_path):
    rounded = llava_folder(
        tmp_path / "llava",
        folders["text"],
        folders["siglip"],
        ConnectorConfig("dci"),
        inside=True,
        dtype=torch.bfloat16,
    )
    result = compare_logits(rounded, stock(rounded, tmp_path / "stock", torch.bfloat16))
    found = by_input(result)
    assert found["text"].largest <= SAME
    assert "roundings" not in found["text"].why
    assert "16 roundings of bfloat16" in found["picture"].why
    assert SAME < found["picture"].largest <= found["picture"].tolerance


def test_weights_of_two_dtypes_are_compared_as_rounded(folders, tmp_path):
    half = str(tmp_path / "half")
    shutil.copytree(folders["text"], half)
    tensors = load_file(f"{half}/model.safetensors")
    save_file({name: t.half() for name, t in tensors.items()}, f"{half}/model.safetensors", {"format": "pt"})
    found = by_input(compare_logits(folders["text"], half))["text"]
    assert SAME < found.largest <= found.tolerance
    assert "float16" in found.why


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_a_difference_even_from_itself(folders, tmp_path, value):
    broken = str(tmp_path / "broken")
    shutil.copytree(folders["text"], broken)
    tensors = load_file(f"{broken}/model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, f"{broken}/model.safetensors", {"format": "pt"})
    result = compare_logits(broken, broken)
    assert not result.equal
    assert result.as_entries()["logits"][0]["largest"] is None
    assert not compare_logits(folders["text"], broken).equal


def test_code_in_a_folder_is_not_run(folders):
    with pytest.raises(UserError, match=r"B .*modeling_dense_connector.py is code in the folder.*--format llava"):
        compare_logits(folders["clip_sti"], folders["clip_sti_stock"])


def test_a_model_that_does_not_fit_is_refused_with_sizes(folders, monkeypatch):
    monkeypatch.setattr(logits, "_available_memory", lambda: 10**9)
    with pytest.raises(UserError, match=r"A .*: --logits: in fp32 it has 0\.\d\d GB .* 1\.1 GB.* 1\.0 GB of memory"):
        compare_logits(folders["text"], folders["text"])


def test_inputs_leave_special_tokens_out_and_are_always_the_same():
    given = text_input(8, {0, 1, 2, 7})
    assert set(given.ids.unique().tolist()) == {3, 4, 5, 6}
    assert torch.equal(given.ids, text_input(8, {0, 1, 2, 7}).ids)
    vision = VisionConfig.from_config({"model_type": "clip_vision_model", "image_size": 28, "patch_size": 7}, "x")
    seen = picture_input(8, {0}, 16, vision)
    assert seen.ids.shape == (1, LENGTH + 16)
    assert int(seen.image_mask.sum()) == 16
    assert len(seen.word_places) == LENGTH
    assert not seen.image_mask.flatten()[seen.word_places].any()
    mean, std = torch.tensor(vision.image_mean), torch.tensor(vision.image_std)
    assert bool((seen.pixel_values.amin((0, 2, 3)) >= -mean / std).all())
    assert bool((seen.pixel_values.amax((0, 2, 3)) <= (1 - mean) / std).all())
