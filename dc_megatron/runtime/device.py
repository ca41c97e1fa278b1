"""CUDA with NCCL, or CPU with Gloo: the only place that asks which."""

from __future__ import annotations

import os
from functools import cache

import torch


@cache
def has_cuda() -> bool:
    """Whether this process computes on a GPU. ``DC_DEVICE=cpu`` in the environment says no on a machine with one.

    The answer is kept from the first call on, because a patch of ``torch.cuda.is_available`` must not change it.
    """
    wish = os.environ.get("DC_DEVICE", "")
    if wish not in ("", "cpu", "cuda"):
        raise ValueError(f"DC_DEVICE={wish}: use cpu or cuda, or leave it unset")
    return wish != "cpu" and torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def distributed_backend() -> str:
    """Name of the torch.distributed backend that moves this device's tensors."""
    return "nccl" if has_cuda() else "gloo"


def limit_cpu_threads(processes_on_this_machine: int) -> None:
    """Share the cores out among the processes of this machine, unless OMP_NUM_THREADS already did.

    Two processes with a thread pool of all cores each run several times slower than with half of the cores each.
    """
    if not has_cuda() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes_on_this_machine))
