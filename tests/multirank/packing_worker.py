"""What a rank does for the tests of packed rows: the rotation of a whole row against megatron-core's own."""

from __future__ import annotations

import importlib.util
import itertools

import torch

from dc_megatron.runtime import parallel, patches

TARGET = "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_thd"
HEADS, HEAD_SIZE = 4, 16
SETTINGS = {"rotary_interleaved": False, "mla_rotary_interleaved": False, "mscale": 1.0}


def _untouched(module):
    """Another copy of a module, as its file has it."""
    spec = importlib.util.spec_from_file_location(f"untouched_{module.__name__.rpartition('.')[2]}", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def rotation(lengths: list[int], longest: int) -> dict[str, bool]:
    """Whether output and gradient are megatron-core's to the bit, and whether its function is the one replaced."""
    from megatron.core import parallel_state

    parallel.start()
    holder, name = patches.resolve(TARGET)
    group = parallel_state.get_context_parallel_group()
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    row = torch.randn(sum(lengths), HEADS, HEAD_SIZE, generator=generator)
    frequencies = torch.randn(longest, 1, 1, HEAD_SIZE, generator=generator)
    functions = getattr(_untouched(holder), name), getattr(holder, name)
    found = []
    for function in functions:
        leaf = row.clone().requires_grad_()
        turned = function(leaf, bounds, frequencies, cp_group=group, **SETTINGS)
        turned.square().sum().backward()
        found.append((turned.detach(), leaf.grad))
    return {
        "replaced": functions[1].__module__ == "dc_megatron.runtime.rotary",
        "output": torch.equal(found[0][0], found[1][0]),
        "gradient": torch.equal(found[0][1], found[1][1]),
    }
