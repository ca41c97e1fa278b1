"""The factor of the gradient buffer as a number."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dc_megatron.runtime.gradient_scaling import by_a_number


@pytest.mark.parametrize("factor", [torch.tensor(0.25), torch.tensor([0.25], dtype=torch.float64), 0.25])
def test_the_original_gets_a_number(factor):
    given = []

    def scale_gradients(self, scaling_factor):
        given.append(type(scaling_factor))
        self.grad_data *= scaling_factor

    buffer = SimpleNamespace(grad_data=torch.tensor([4.0, 8.0]))
    assert by_a_number(scale_gradients)(buffer, factor) is None
    assert given == [float]
    assert buffer.grad_data.tolist() == [1.0, 2.0]


def test_a_sum_of_targets_loses_nothing_on_the_way():
    """1 / 12345 in fp32 is the same number in fp64, and rounds back to it."""
    factor = 1.0 / torch.tensor(12345.0)
    whole = torch.randn(100)
    buffer = SimpleNamespace(value=None)
    by_a_number(lambda self, number: setattr(self, "value", whole * number))(buffer, factor)
    assert torch.equal(buffer.value, whole * factor)


def test_megatron_has_what_is_replaced():
    """Its parameter is given by position or by name; both must arrive."""
    import inspect

    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer

    original = list(inspect.signature(_ParamAndGradBuffer.scale_gradients).parameters)
    assert original == list(inspect.signature(by_a_number(None)).parameters) == ["self", "scaling_factor"]
