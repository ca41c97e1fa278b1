"""Adapters beside linears of Transformer Engine's kinds, which cannot be built here: stand-ins return what these do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dc_megatron.config import AdaptedLinear, HuggingFaceLinear, LoraConfig
from dc_megatron.model.lora import LoraAdapters, initial_factor

PARTS = tuple(HuggingFaceLinear(f"layers.{{layer}}.{name}", 6, 8) for name in ("gate", "up"))
LINEAR = AdaptedLinear("fc", PARTS, row_parallel=False)
GROUP = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


class NormedLinear(nn.Module):
    """A norm, then a linear, as TELayerNormColumnParallelLinear; ``with_bias``: it returns one beside its result."""

    def __init__(self, with_bias: bool):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 12, bias=False)
        self.return_layernorm_output = False
        self.bias = torch.ones(12) if with_bias else None

    def forward(self, x):
        normed = self.norm(x)
        extra = (normed,) if self.return_layernorm_output else ()
        if self.bias is not None:
            return (self.linear(normed), self.bias, *extra)
        return (self.linear(normed), *extra) if extra else self.linear(normed), None


def adapted(base: nn.Module, dropout: float = 0.0) -> LoraAdapters:
    layer = nn.Module()
    layer.fc, layer.layer_number = base, 3
    model = SimpleNamespace(
        config=SimpleNamespace(sequence_parallel=False),
        pg_collection=SimpleNamespace(tp=GROUP),
        decoder=SimpleNamespace(layers=[layer]),
    )
    adapters = LoraAdapters(model, [LINEAR], LoraConfig(r=2, alpha=6, dropout=dropout), seed=1)
    for name, parameter in adapters.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return adapters


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_linear_with_a_norm_of_its_own_adapts_what_the_norm_made(with_bias):
    base, x = NormedLinear(with_bias), torch.randn(5, 1, 8)
    plain = base(x)[0]
    adapters = adapted(base)
    names = dict(adapters.named_parameters())
    found, bias = base(x)
    normed = base.norm(x)
    parts = [
        normed @ names[f"layers.2.{part}.lora_A.weight"].T @ names[f"layers.2.{part}.lora_B.weight"].T
        for part in ("gate", "up")
    ]
    torch.testing.assert_close(found, plain + 3.0 * torch.cat(parts, dim=-1))
    assert (bias is None) != with_bias
    found.sum().backward()
    assert all(parameter.grad.any() for parameter in names.values())


def test_dropout_drops_in_training_alone():
    base, x = NormedLinear(False), torch.randn(5, 1, 8)
    adapted(base, dropout=0.5)
    assert not torch.equal(base(x)[0], base(x)[0])
    base.eval()
    assert torch.equal(base(x)[0], base(x)[0])


def test_factors_start_as_pefts_whatever_was_drawn_before():
    """kaiming_uniform_(a=sqrt(5)) is uniform within 1 / sqrt(inputs): variance 1 / (3 inputs)."""
    torch.manual_seed(0)
    first = initial_factor("model.layers.0.mlp.up_proj", 64, 400, seed=1)
    torch.manual_seed(5)
    assert torch.equal(first, initial_factor("model.layers.0.mlp.up_proj", 64, 400, seed=1))
    assert not torch.equal(first, initial_factor("model.layers.1.mlp.up_proj", 64, 400, seed=1))
    assert not torch.equal(first, initial_factor("model.layers.0.mlp.up_proj", 64, 400, seed=2))
    assert first.abs().max() <= 400**-0.5
    assert float(first.var()) == pytest.approx(1 / (3 * 400), rel=0.03)
