"""CUDA with NCCL, or CPU with Gloo: the only place that asks which."""

from __future__ import annotations

import os
from functools import cache

import torch

from dc_megatron.errors import UserError


@cache
def has_cuda() -> bool:
    """Whether this process computes on a GPU. ``DC_DEVICE=cpu`` in the environment says no on a machine with one.

    The answer is kept from the first call on, because a patch of ``torch.cuda.is_available`` must not change it.
    UserError for another wish, and for ``cuda`` where there is none.
    """
    wish = os.environ.get("DC_DEVICE", "")
    if wish not in ("", "cpu", "cuda"):
        raise UserError(f"DC_DEVICE={wish}: use cpu or cuda, or leave it unset")
    found = torch.cuda.is_available()
    if wish == "cuda" and not found:
        raise UserError("DC_DEVICE=cuda: PyTorch finds no CUDA device here; leave it unset, or look at tools/doctor.py")
    return found and wish != "cpu"


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def compute_capability() -> tuple[int, int] | None:
    """Of this process's GPU, or None without one."""
    return torch.cuda.get_device_capability() if has_cuda() else None


def memory_bytes() -> int | None:
    """All memory of this process's GPU, used or not, or None without one."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if has_cuda() else None


def choose_gpu(local_rank: int) -> None:
    """Make this process's GPU the current one, before anything asks for ``device()``. Nothing to do on a CPU."""
    if has_cuda():
        torch.cuda.set_device(local_rank)


def distributed_backend() -> str:
    """Name of the torch.distributed backend that moves this device's tensors."""
    return "nccl" if has_cuda() else "gloo"


def limit_cpu_threads(processes_on_this_machine: int) -> None:
    """Share the cores out among the processes of this machine, unless OMP_NUM_THREADS already did.

    Two processes with a thread pool of all cores each run several times slower than with half of the cores each.
    """
    if not has_cuda() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes_on_this_machine))
