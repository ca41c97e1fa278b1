"""Which device a process computes on, and what a wish in the environment changes."""

from __future__ import annotations

import os

import pytest
import torch

from dc_megatron.errors import UserError
from dc_megatron.runtime import device


@pytest.fixture(autouse=True)
def _forget_the_answer():
    device.has_cuda.cache_clear()
    yield
    device.has_cuda.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """A machine with or without CUDA, and a wish."""

    def pretend(cuda: bool, wish: str | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        if wish is None:
            monkeypatch.delenv("DC_DEVICE", raising=False)
        else:
            monkeypatch.setenv("DC_DEVICE", wish)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "wish", "expected"),
    [
        (True, None, True),
        (True, "", True),
        (True, "cuda", True),
        (True, "cpu", False),
        (False, None, False),
        (False, "cpu", False),
    ],
)
def test_a_gpu_is_used_where_there_is_one_unless_the_user_says_no(machine, cuda, wish, expected):
    machine(cuda, wish)
    assert device.has_cuda() is expected
    assert device.distributed_backend() == ("nccl" if expected else "gloo")
    if not expected:
        assert device.device() == torch.device("cpu")


def test_the_answer_stays_when_a_patch_changes_torchs(machine):
    machine(False, None)
    assert not device.has_cuda()
    machine(True, None)
    assert not device.has_cuda()


def test_a_wish_that_cannot_be_met_is_refused(machine):
    machine(False, "cuda")
    with pytest.raises(UserError, match=r"DC_DEVICE=cuda.*no CUDA device"):
        device.has_cuda()


def test_an_unknown_wish_is_refused(machine):
    machine(True, "gpu")
    with pytest.raises(UserError, match=r"DC_DEVICE=gpu.*cpu or cuda"):
        device.has_cuda()


@pytest.mark.parametrize(("processes", "threads"), [(1, 8), (2, 4), (3, 2), (16, 1)])
def test_processes_share_the_cores(machine, monkeypatch, processes, threads):
    machine(False, None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    device.limit_cpu_threads(processes)
    assert chosen == [threads]


def test_the_users_number_of_threads_stands(machine, monkeypatch):
    machine(False, None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(torch, "set_num_threads", lambda number: pytest.fail(f"set {number} threads"))
    device.limit_cpu_threads(2)
