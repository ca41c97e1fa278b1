"""Towers from every kind of folder, keyed as transformers keeps them, and folders that are not complete."""

import json
import os

import pytest
import torch
import transformers

from dc_megatron.config import ConnectorConfig, VisionConfig
from dc_megatron.errors import UserError
from dc_megatron.weights.vision_tables import vision_shapes, vision_state_dict
from tests.helpers.tiny_models import VISION_MAKERS, as_old_bin, as_safetensors, tiny_clip, tiny_siglip


def expected_state(folder, vision):
    state = getattr(transformers, vision.about.model_class).from_pretrained(folder).state_dict()
    return {name: value for name, value in state.items() if not name.startswith("head.")}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("maker", VISION_MAKERS)
def test_tower_as_transformers_reads_it(maker, tmp_path):
    folder = VISION_MAKERS[maker](tmp_path)
    vision = VisionConfig.from_folder(folder)
    expected = expected_state(folder, vision)
    assert_same(vision_state_dict(folder, vision), expected)
    assert vision_shapes(vision) == {name: tuple(value.shape) for name, value in expected.items()}


@pytest.mark.parametrize(
    "prefix",
    ["vision_model.", "vision_tower.", "vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."],
)
@pytest.mark.parametrize("maker", ["clip", "siglip"])
def test_every_prefix_is_the_same_tower(maker, prefix, tmp_path):
    source = VISION_MAKERS[maker](tmp_path / "source")
    vision = VisionConfig.from_folder(source)
    drop = ("head.",) if "tower" in prefix else ()
    folder = as_safetensors(source, tmp_path / "prefixed", prefix=prefix, drop=drop)
    assert_same(vision_state_dict(folder, vision), expected_state(source, vision))


def test_old_bin_folder_with_position_ids(tmp_path):
    source = tiny_clip(tmp_path / "source")
    vision = VisionConfig.from_folder(source)
    extra = {"embeddings.position_ids": torch.arange(17)[None]}
    folder = as_old_bin(source, tmp_path / "bin", shards=2, extra=extra)
    assert_same(vision_state_dict(folder, vision), expected_state(source, vision))


def test_siglip_without_last_layer_head_and_norm(tmp_path):
    source = tiny_siglip(tmp_path / "source")
    vision = VisionConfig.from_folder(source)
    cut = ("head.", "post_layernorm", "encoder.layers.5.")
    state = vision_state_dict(as_safetensors(source, tmp_path / "cut", drop=cut), vision)
    expected = {k: v for k, v in expected_state(source, vision).items() if not k.startswith(cut)}
    assert_same(state, expected)


def test_only_layers_that_the_connector_reads_must_be_there(tmp_path):
    source = tiny_clip(tmp_path / "source")
    vision = VisionConfig.from_folder(source)
    # Six layers, select_layer -2: hidden_states[5] is the deepest, which needs layers 0 to 4.
    folder = as_safetensors(source, tmp_path / "cut", drop=("encoder.layers.5.",))
    assert "encoder.layers.4.mlp.fc1.bias" in vision_state_dict(folder, vision, ConnectorConfig("dci"))
    for connector in (ConnectorConfig("dci", select_layer=-1), None):
        with pytest.raises(UserError, match=r"16 weights missing: encoder\.layers\.5\.layer_norm1\.bias"):
            vision_state_dict(folder, vision, connector)
    deeper = as_safetensors(source, tmp_path / "deeper", drop=("encoder.layers.4.self_attn.q_proj",))
    with pytest.raises(UserError, match=r"2 weights missing: encoder\.layers\.4\.self_attn\.q_proj\.bias"):
        vision_state_dict(deeper, vision, ConnectorConfig("dci"))


def test_unknown_names_are_listed_as_they_are_on_file(tmp_path):
    source = tiny_clip(tmp_path / "source")
    extra = {"vision_model.encoder.layers.6.mlp.fc1.bias": torch.ones(64), "adapter.weight": torch.ones(2)}
    folder = as_safetensors(source, tmp_path / "more", prefix="vision_model.", extra=extra)
    names = r"2 weights not known here: adapter\.weight, vision_model\.encoder\.layers\.6\.mlp\.fc1\.bias"
    with pytest.raises(UserError, match=names):
        vision_state_dict(folder, VisionConfig.from_folder(source))


def test_two_towers_in_one_folder_are_refused(tmp_path):
    source = tiny_clip(tmp_path / "source")
    extra = {"vision_model.post_layernorm.bias": torch.ones(32)}
    folder = as_safetensors(source, tmp_path / "two", extra=extra)
    with pytest.raises(UserError, match="are the same weight of the tower"):
        vision_state_dict(folder, VisionConfig.from_folder(source))


def test_another_image_size_in_config_is_refused_with_both_shapes(tmp_path):
    folder = tiny_clip(tmp_path)
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({**config, "image_size": 35}, file)
    with pytest.raises(UserError, match=r"position_embedding\.weight has shape \[17, 32\].*asks for \[26, 32\]"):
        vision_state_dict(folder, VisionConfig.from_folder(folder))
