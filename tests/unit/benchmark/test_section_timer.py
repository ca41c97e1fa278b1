"""Seconds of a step's parts, on a CPU's clock."""

from __future__ import annotations

import time

import pytest
import torch

from dc_megatron.benchmark.section_timer import SectionTimer

# What a section sleeps. The clock of a busy machine adds to it, and takes nothing away.
NAP = 0.02
LATE = 0.5


class _Sleeps(torch.autograd.Function):
    """Takes NAP forward and two NAPs backward."""

    @staticmethod
    def forward(ctx, tensor):
        time.sleep(NAP)
        return 3 * tensor

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(2 * NAP)
        return 3 * gradient


def assert_slept(seconds: float, naps: int) -> None:
    assert naps * NAP <= seconds < naps * NAP + LATE


@pytest.fixture
def timer() -> SectionTimer:
    return SectionTimer(cuda=False)


def test_calls_are_summed_by_name_until_they_are_taken(timer):
    nap, quick = timer.timed("nap", lambda value, by=1: time.sleep(NAP) or value + by), timer.timed("quick", lambda: 5)
    assert (nap(1), nap(1, by=2), quick()) == (2, 3, 5)
    taken = timer.take()
    assert set(taken) == {"nap", "quick"}
    assert_slept(taken["nap"], 2)
    assert taken["quick"] < NAP
    assert timer.take() == {}
    nap(1)
    assert_slept(timer.take()["nap"], 1)


def test_forward_and_backward_of_a_part(timer):
    tensor = torch.ones(4, requires_grad=True)
    before, after = _Sleeps.apply(tensor), []
    result = timer.timed_both_ways("part", before, lambda states: after.append(states) or _Sleeps.apply(states))
    forward = timer.take()["part"]
    assert_slept(forward, 1)
    # What lies above and below the part is not counted.
    _Sleeps.apply(result).sum().backward()
    assert_slept(timer.take()["part"], 2)
    assert tensor.grad.tolist() == [27.0] * 4, "the marks change no gradient"
    assert result.tolist() == [9.0] * 4


def test_a_part_that_is_used_twice(timer):
    tensor = torch.ones(1, requires_grad=True)
    results = [timer.timed_both_ways("part", tensor, _Sleeps.apply) for _ in range(2)]
    sum(results).backward()
    assert_slept(timer.take()["part"], 6)


def test_a_part_without_a_backward_pass(timer):
    with torch.no_grad():
        timer.timed_both_ways("part", torch.ones(1), _Sleeps.apply)
    assert_slept(timer.take()["part"], 1)


def test_a_backward_pass_until_the_last_gradient_is_there(timer):
    weight = torch.nn.Parameter(torch.ones(4))
    result = timer.backward_from("connector", _Sleeps.apply(weight) * 2, weight)
    assert timer.take() == {}, "the forward pass is counted elsewhere"
    _Sleeps.apply(result).sum().backward()
    assert_slept(timer.take()["connector"], 2)
    assert weight.grad.tolist() == [18.0] * 4
    assert not weight._post_accumulate_grad_hooks, "one would be left behind in every step"
    result = timer.backward_from("connector", _Sleeps.apply(weight), weight)
    result.sum().backward()
    assert_slept(timer.take()["connector"], 2)
    (_Sleeps.apply(weight)).sum().backward()
    assert timer.take() == {}
