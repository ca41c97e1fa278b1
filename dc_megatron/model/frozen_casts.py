"""Frozen weights in FP8: cast once and kept.

Transformer Engine casts a layer's weight when it is told that a micro-batch is the first of its step, and keeps the
result until then. Megatron tells every layer so in every step; a weight that does not learn is the same in all of them.
"""

from __future__ import annotations

from torch import nn


def keep_frozen_casts(model: nn.Module) -> None:
    """Have layers of Transformer Engine whose weight is frozen cast it in their first forward pass only.

    Call it again when what is frozen has changed.
    """
    for layer in model.modules():
        if not hasattr(layer, "is_first_microbatch"):
            continue
        frozen = all(not parameter.requires_grad for parameter in layer.parameters(recurse=False))
        handle = layer.__dict__.pop("_frozen_cast_hook", None)
        if handle is not None:
            handle.remove()
        if frozen:
            layer._frozen_cast_hook = layer.register_forward_pre_hook(_only_once())


def _only_once():
    passes = 0

    def hook(layer, _arguments) -> None:
        nonlocal passes
        # Evaluation keeps no casts: only a pass that learns counts.
        layer.is_first_microbatch = passes == 0
        passes += layer.training

    return hook
