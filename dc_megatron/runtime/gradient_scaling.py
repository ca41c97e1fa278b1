"""Scaling the gradient buffer by the number of targets, at the speed of memory.

Megatron multiplies the buffer by a tensor of one element on the GPU. PyTorch broadcasts that element by element, at a
quarter of the speed of a product with a plain number (measured on an H200: 29 ms of a step for 7B in bf16, 1.2 %).
"""

from __future__ import annotations

from collections.abc import Callable


def by_a_number(original: Callable) -> Callable:
    """``_ParamAndGradBuffer.scale_gradients`` with the factor as a number.

    The host waits for it, as it does for the gradient's norm a moment later.
    """

    def scale_gradients(self, scaling_factor) -> None:
        return original(self, float(scaling_factor))

    return scale_gradients
