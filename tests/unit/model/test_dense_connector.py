"""Joined features against the reference and against the original's layer numbers, and the projector's start."""

from __future__ import annotations

import pytest
import torch

from dc_megatron.config import CONNECTOR_TYPES, ConnectorConfig, LayerTable, VisionConfig, image_tokens, layer_table
from dc_megatron.model.dense_connector import DenseConnector, join_features
from dc_megatron.reference.model import dense_features

WIDTH = 8


def make_vision(family: str, layers: int, image_size: int, patch_size: int) -> VisionConfig:
    return VisionConfig(
        family=family,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )


# The depths and token counts of the released towers, and two that no table lists.
TOWERS = {
    "CLIP-L/336": make_vision("clip", 24, 336, 14),
    "SigLIP-so400m/384": make_vision("siglip", 27, 384, 14),
    "CLIP of 6 layers": make_vision("clip", 6, 28, 7),
    "SigLIP of 6 layers": make_vision("siglip", 6, 35, 7),
}


def make_states(vision: VisionConfig, images: int = 2) -> list[torch.Tensor]:
    """hidden_states as transformers returns them, prefix tokens included."""
    generator = torch.Generator().manual_seed(3)
    positions = vision.num_patches + vision.num_prefix_tokens
    return [
        torch.randn(images, positions, WIDTH, generator=generator) + layer
        for layer in range(vision.num_hidden_layers + 1)
    ]


def joined(vision: VisionConfig, connector: ConnectorConfig, states: list[torch.Tensor]) -> torch.Tensor:
    table = layer_table(vision, connector)
    patches = [state[:, vision.num_prefix_tokens :] for state in states[: table.deepest + 1]]
    return join_features(patches, table, connector.dense_connector_type)


@pytest.mark.parametrize("kind", CONNECTOR_TYPES)
@pytest.mark.parametrize("tower", TOWERS)
def test_features_are_the_references(tower, kind):
    vision, connector = TOWERS[tower], ConnectorConfig(kind)
    states = make_states(vision)
    ours = joined(vision, connector, states)
    assert ours.shape == (2, image_tokens(vision, connector), connector.input_size(vision))
    assert (ours - dense_features(tuple(states), vision, connector)).abs().max() <= 1e-6


def pool(state: torch.Tensor, positions: int) -> torch.Tensor:
    """Means over stretches of eight tokens, written out."""
    return torch.stack([state[:, 8 * i : 8 * i + 8].mean(dim=1) for i in range(positions)], dim=1)


@pytest.mark.parametrize(("final", "first", "second"), [(23, 7, 15)])
def test_clip_large_reads_the_originals_layers(final, first, second):
    vision = TOWERS["CLIP-L/336"]
    states = make_states(vision)
    h = [state[:, 1:] for state in states]
    expected = {
        "none": h[final],
        "sti": torch.cat([h[final], pool(h[first], 72), pool(h[second], 72)], dim=1),
        "sci": torch.cat([h[final], h[first], h[second]], dim=2),
        "dci": torch.cat([h[final], sum(h[0:12]) / 12, sum(h[12:24]) / 12], dim=2),
    }
    for kind, value in expected.items():
        torch.testing.assert_close(joined(vision, ConnectorConfig(kind), states), value, rtol=0, atol=2e-5)
    assert expected["sti"].shape[1] == 720


def test_siglip_reads_the_originals_layers():
    vision = TOWERS["SigLIP-so400m/384"]
    h = make_states(vision)
    expected = {
        "none": h[26],
        "sti": torch.cat([h[26], pool(h[7], 91), pool(h[15], 91)], dim=1),
        "sci": torch.cat([h[26], h[7], h[15]], dim=2),
        "dci": torch.cat([h[26], sum(h[0:13]) / 13, sum(h[13:26]) / 13], dim=2),
    }
    for kind, value in expected.items():
        torch.testing.assert_close(joined(vision, ConnectorConfig(kind), h), value, rtol=0, atol=2e-5)
    assert expected["sti"].shape[1] == 911


def test_one_wrong_layer_is_noticed():
    """The comparison above has to be able to fail."""
    vision, connector = TOWERS["CLIP of 6 layers"], ConnectorConfig("dci")
    states = make_states(vision)
    right = layer_table(vision, connector)
    wrong = LayerTable(right.final, ((1, *right.groups[0][1:]), right.groups[1]))
    patches = [state[:, 1:] for state in states]
    difference = join_features(patches, wrong, "dci") - dense_features(tuple(states), vision, connector)
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize("kind", CONNECTOR_TYPES)
def test_the_projector_is_llavas(kind):
    """Two linears with the exact GELU between them, under the names of the checkpoint contract."""
    vision, connector = TOWERS["CLIP of 6 layers"], ConnectorConfig(kind)
    module = DenseConnector(vision, connector, 12, seed=1)
    state = module.state_dict()
    assert list(state) == ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"]
    features = torch.randn(2, 5, connector.input_size(vision))
    inner = features @ state["mlp.0.weight"].T + state["mlp.0.bias"]
    gelu = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    expected = gelu @ state["mlp.2.weight"].T + state["mlp.2.bias"]
    torch.testing.assert_close(module(features), expected, rtol=0, atol=1e-6)


def test_the_start_depends_on_the_seed_alone():
    vision, connector = TOWERS["CLIP of 6 layers"], ConnectorConfig("dci")

    def start(seed: int) -> torch.Tensor:
        return DenseConnector(vision, connector, 12, seed).mlp[2].weight

    before = torch.get_rng_state()
    first = start(5)
    assert torch.equal(torch.get_rng_state(), before), "building the connector moved the global generator"
    torch.rand(3)
    assert torch.equal(start(5), first)
    assert not torch.equal(start(6), first)
