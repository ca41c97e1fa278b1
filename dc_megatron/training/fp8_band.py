"""Watches a run in FP8: now and then the same rows go through the model in bf16, and the two losses are compared.

A mean loss of some hundred targets in bf16 is within a few parts in a thousand of fp32's; FP8 that scales well stays
within one percent of bf16. What is further away is reported by name.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Largest difference of the mean loss of a micro-batch, relative to bf16's.
BAND = 0.02


@contextlib.contextmanager
def without_fp8(config) -> Iterator[None]:
    """Megatron's layers of ``config`` (one object, which all of them share) compute in bf16 inside."""
    kept, config.fp8 = config.fp8, None
    try:
        yield
    finally:
        config.fp8 = kept


@contextlib.contextmanager
def casts_untouched(model) -> Iterator[None]:
    """Layers that cast their weight in the first pass of a step wait for the pass after this one.

    Each takes whatever pass comes first for it. A pass in bf16 casts nothing, and the real one would go on with the
    weights of the step before.
    """
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    kept = [(layer, layer.is_first_microbatch) for layer in modules if hasattr(layer, "is_first_microbatch")]
    try:
        yield
    finally:
        for layer, first in kept:
            layer.is_first_microbatch = first


def verdict(fp8_loss: float, bf16_loss: float, iteration: int, recipe: str) -> tuple[float, str | None]:
    """(relative difference, infinite where a loss is not a number; a warning where it is outside BAND)."""
    difference = abs(fp8_loss - bf16_loss) / max(abs(bf16_loss), 1e-6)
    if math.isnan(difference):
        difference = math.inf  # nothing is larger than it, and nan would be lost among others
    if difference <= BAND:
        return difference, None
    others = [name for name in ("tensorwise", "blockwise") if name != recipe]
    advice = " or ".join(f"--fp8-recipe {name}" for name in others)
    if recipe != "delayed":
        advice += ", or --first-last-layers-bf16"
    return difference, (
        f"warning: step {iteration}: the loss in FP8 ({recipe} scaling) is {fp8_loss:.4f}, in bf16 on the same rows"
        f" {bf16_loss:.4f}: {100 * difference:.1f} % apart, more than {100 * BAND:.0f} %; try {advice}, or train in"
        " bf16"
    )


class Fp8Band:
    """Compares every ``interval`` steps, on this rank's first micro-batch of the step; not under pipeline stages.

    ``take()`` gives the largest difference since it was last asked, or None.
    """

    def __init__(self, interval: int, micro_batches_per_step: int, recipe: str, first_iteration: int = 0):
        self._interval, self._per_step, self._recipe = interval, micro_batches_per_step, recipe
        self._count, self._first = 0, first_iteration
        self._largest: float | None = None

    def loss_in_bf16(self, model: Callable[[dict], Tensor], config, batch: dict) -> Tensor | None:
        """Mean loss of ``batch`` without FP8 where it is time to compare, else None. Call it before the real pass."""
        step, place = divmod(self._count, self._per_step)
        self._count += 1
        if place or (self._first + step) % self._interval:
            return None
        with torch.no_grad(), without_fp8(config), casts_untouched(model):
            losses = model(batch)
            return losses.mean() if losses.numel() else None

    def compare(self, in_bf16: Tensor, losses: Tensor) -> None:
        """Say so where ``losses`` of the real pass are too far from ``loss_in_bf16``'s answer."""
        step = self._first + (self._count - 1) // self._per_step + 1
        difference, warning = verdict(float(losses.detach().mean()), float(in_bf16), step, self._recipe)
        self._largest = max(difference, self._largest or 0.0)
        if warning is not None:
            print(warning, file=sys.stderr, flush=True)

    def take(self) -> float | None:
        taken, self._largest = self._largest, None
        return taken
