"""The cut-off tower against the whole Hugging Face one."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers

from dc_megatron.config import TOWERS, ConnectorConfig, LayerTable, VisionConfig, layer_table
from dc_megatron.model.vision_tower import FrozenVisionTower
from dc_megatron.weights.vision_tables import vision_state_dict
from tests.helpers.tiny_models import VISION_MAKERS


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    root = tmp_path_factory.mktemp("towers")
    return {name: make(root / name) for name, make in VISION_MAKERS.items()}


def load(folder: str, kind: str) -> tuple[FrozenVisionTower, VisionConfig, LayerTable]:
    vision, connector = VisionConfig.from_folder(folder), ConnectorConfig(kind)
    table = layer_table(vision, connector)
    tower = FrozenVisionTower(vision, table)
    tower.load(vision_state_dict(folder, vision, connector))
    return tower, vision, table


def random_pixels(vision: VisionConfig, images: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, vision.image_size, vision.image_size, generator=generator)


def assert_states_equal(folder: str, kind: str) -> None:
    """Every state that the tower returns is Hugging Face's of the same number."""
    tower, vision, table = load(folder, kind)
    whole = getattr(transformers, vision.about.model_class).from_pretrained(folder, dtype=torch.float32).eval()
    pixels = random_pixels(vision)
    with torch.no_grad():
        expected = whole(pixels, output_hidden_states=True).hidden_states
    states = tower(pixels)
    assert len(states) == table.deepest + 1
    for number, state in enumerate(states):
        difference = (state - expected[number][:, vision.num_prefix_tokens :]).abs().max()
        assert difference <= 1e-6, f"hidden state {number} differs by {difference}"
        assert not state.requires_grad


@pytest.mark.parametrize("kind", ["none", "sti", "sci", "dci"])
@pytest.mark.parametrize("family", TOWERS)
def test_states_are_hugging_faces(towers, family, kind):
    assert_states_equal(towers[family], kind)


@pytest.mark.parametrize("change", [{"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": "quick_gelu"}], ids=str)
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_activation_and_epsilon_are_read_from_the_folder(towers, tmp_path, family, change):
    """A tower that was trained with another activation or epsilon than its family's usual."""
    for name in os.listdir(towers[family]):
        os.link(os.path.join(towers[family], name), tmp_path / name)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**content, **change, "layer_norm_eps": 0.05}))
    assert_states_equal(str(tmp_path), "dci")
    usual = load(towers[family], "dci")[0]
    pixels = random_pixels(VisionConfig.from_folder(towers[family]))
    changed = load(str(tmp_path), "dci")[0]
    assert (usual(pixels)[-1] - changed(pixels)[-1]).abs().max() > 1e-3, "the change made no difference"


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_tower_of_a_whole_clip_or_siglip(towers, family):
    alone, vision, _ = load(towers[family], "dci")
    nested = load(towers[f"full_{family}"], "dci")[0]
    pixels = random_pixels(vision)
    for a, b in zip(alone(pixels), nested(pixels), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("family", "kind", "select_layer", "deepest"),
    [("clip", "dci", -2, 5), ("clip", "none", -4, 3), ("clip", "none", -1, 6), ("siglip", "dci", -2, 5)],
)
def test_layers_that_are_not_read_are_never_built(towers, family, kind, select_layer, deepest):
    vision = VisionConfig.from_folder(towers[family])
    table = layer_table(vision, ConnectorConfig(kind, select_layer=select_layer))
    tower = FrozenVisionTower(vision, table)
    assert (table.deepest, len(tower.model.encoder.layers)) == (deepest, deepest)
    layers = {n.split("layers.")[1].split(".")[0] for n, _ in tower.named_parameters() if "layers." in n}
    assert layers == {str(i) for i in range(deepest)}
    assert not any(name.startswith("model.head") for name, _ in tower.named_parameters())


def test_the_tower_stays_frozen_and_in_evaluation_mode(towers):
    tower = load(towers["clip"], "dci")[0]
    parent = torch.nn.Sequential(tower)
    parent.train()
    assert parent.training
    assert not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_a_weight_without_a_place_is_an_error(towers):
    tower, vision, _ = load(towers["clip"], "dci")
    state = vision_state_dict(towers["clip"], vision)
    tower.load({**state, "encoder.layers.5.layer_norm1.weight": torch.zeros(1)})  # above the cut: left out
    with pytest.raises(AssertionError, match="no place for encoder"):
        tower.load({**state, "encoder.layers.4.surprise": torch.zeros(1)})
