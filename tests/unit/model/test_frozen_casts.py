"""Frozen weights in FP8: cast while their scale is being found, then kept."""

from __future__ import annotations

import torch
from torch import nn

from dc_megatron.model.frozen_casts import keep_frozen_casts


class Layer(nn.Module):
    """As Megatron's layers of Transformer Engine: the flag says whether to cast, and falls with every pass."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.is_first_microbatch, self.casts = True, []

    def forward(self, value):
        self.casts.append(self.is_first_microbatch)
        self.is_first_microbatch = False
        return value


def steps(layer: Layer, passes: int) -> list[bool]:
    """Whether each pass cast, where the engine begins a step before every pass."""
    layer.casts = []
    for _ in range(passes):
        layer.is_first_microbatch = True
        layer(torch.ones(1))
    return layer.casts


def frozen() -> Layer:
    layer = Layer().requires_grad_(False)
    keep_frozen_casts(layer)
    return layer


def test_the_second_cast_is_kept():
    # The first is made with the scale 1, as delayed scaling has seen nothing yet.
    assert steps(frozen(), 5) == [True, True, False, False, False]


def test_a_weight_that_learns_is_cast_in_every_step():
    layer = Layer()
    keep_frozen_casts(layer)
    assert steps(layer, 4) == [True] * 4


def test_what_leaves_the_scales_alone_does_not_count():
    layer = frozen()
    with torch.no_grad():
        assert steps(layer, 3) == [True] * 3
    layer.eval()
    assert steps(layer, 3) == [True] * 3
    layer.train()
    assert steps(layer, 4) == [True, True, False, False]
    layer.eval()
    assert steps(layer, 2) == [False, False]


def test_what_learns_again_is_cast_again():
    layer = frozen()
    steps(layer, 3)
    layer.requires_grad_(True)
    keep_frozen_casts(layer)
    assert steps(layer, 2) == [True, True]
    layer.requires_grad_(False)
    keep_frozen_casts(layer)
    assert steps(layer, 4) == [True, True, False, False]
