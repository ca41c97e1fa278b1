"""Time that parts of a step take, measured inside it: CUDA events on a GPU, the clock on a CPU.

Events are read after the step has ended, so that the measurement does not make the host wait for the device.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import torch


class SectionTimer:
    """Sums seconds by name between ``take()`` calls."""

    def __init__(self, cuda: bool):
        self._cuda = cuda
        self._pairs: dict[str, list[tuple]] = defaultdict(list)

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, name: str, function: Callable) -> Callable:
        """``function`` whose every call is counted under ``name``."""

        def call(*args, **kwargs):
            start = self._mark()
            result = function(*args, **kwargs)
            self._pairs[name].append((start, self._mark()))
            return result

        return call

    def timed_both_ways(self, name: str, tensor: torch.Tensor, function: Callable) -> torch.Tensor:
        """``function(tensor)`` whose forward and backward passes are counted under ``name``."""
        marks = []

        def end_of_backward() -> None:
            self._pairs[name].append((marks.pop(), self._mark()))

        start = self._mark()
        result = function(_Marked.apply(tensor, end_of_backward))
        self._pairs[name].append((start, self._mark()))
        return _Marked.apply(result, lambda: marks.append(self._mark()))

    def backward_from(self, name: str, result: torch.Tensor, last: torch.nn.Parameter) -> torch.Tensor:
        """``result`` whose backward pass is counted under ``name`` until the gradient of ``last`` is there."""
        marks = []

        def end(_parameter) -> None:
            handle.remove()
            if marks:
                self._pairs[name].append((marks.pop(), self._mark()))

        handle = last.register_post_accumulate_grad_hook(end)
        return _Marked.apply(result, lambda: marks.append(self._mark()))

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call; the device must have finished (synchronize first)."""
        pairs, self._pairs = self._pairs, defaultdict(list)
        seconds = (lambda a, b: a.elapsed_time(b) / 1e3) if self._cuda else (lambda a, b: b - a)
        return {name: sum(seconds(*pair) for pair in of) for name, of in pairs.items()}


class _Marked(torch.autograd.Function):
    """The tensor itself; its backward pass calls ``callback`` first."""

    @staticmethod
    def forward(ctx, tensor, callback):
        ctx.callback = callback
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        ctx.callback()
        return gradient, None
