"""Columns combined anew and rows of zeros, read in blocks of any size."""

from __future__ import annotations

import pytest
import torch

from dc_megatron.weights.derived_tensors import ColumnBlocks, WithZeroRows, equal_tensors
from dc_megatron.weights.tensor_reader import InMemory, read_tensor


def read_in_steps(reader, name: str, step: int) -> torch.Tensor:
    out = torch.full(reader.shape(name), -7.0, dtype=reader.dtype(name))
    for start in range(0, len(out), step):
        end = min(start + step, len(out))
        reader.read_rows(name, start, end, out[start:end])
    return out


@pytest.mark.parametrize("step", [1, 7, 300, 1000])
def test_column_blocks(step):
    weight = torch.randn(600, 6).to(torch.bfloat16)
    blocks = [[(2, 1)], [], [(0, 1), (1, 1 / 3)], [(1, 1 / 3)]]
    reader = ColumnBlocks(InMemory({"w": weight}), "w", "v", 2, blocks, torch.float32)
    assert reader.names() == ["v"]
    assert reader.shape("v") == (600, 8)
    first, second, third = weight.double().split(2, dim=1)
    expected = torch.cat([third, torch.zeros(600, 2), first + second / 3, second / 3], dim=1).float()
    assert torch.equal(read_in_steps(reader, "v", step), expected)


def test_a_single_block_is_copied_and_not_computed():
    """A NaN keeps its bits."""
    weight = torch.randn(4, 2)
    weight[1, 1] = torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32)
    found = read_tensor(ColumnBlocks(InMemory({"w": weight}), "w", "w", 2, [[(0, 1)], []]), "w")
    assert torch.equal(found[:, :2].contiguous().view(torch.int32), weight.view(torch.int32))
    assert not found[:, 2:].any()


@pytest.mark.parametrize("step", [1, 3, 4, 5, 50])
def test_zero_rows(step):
    tensors = {"a": torch.randn(4, 3), "b": torch.randn(2)}
    reader = WithZeroRows(InMemory(tensors), {"a": 6})
    assert torch.equal(read_in_steps(reader, "a", step), torch.cat([tensors["a"], torch.zeros(2, 3)]))
    assert torch.equal(read_in_steps(reader, "b", step), tensors["b"])


def test_equal_tensors():
    one = torch.randn(600, 2)
    other = one.clone()
    other[599, 1] = -other[599, 1]
    reader = InMemory({"one": one, "same": one.clone(), "other": other, "short": one[:5], "bf16": one.bfloat16()})
    assert equal_tensors(reader, "one", "same")
    assert not any(equal_tensors(reader, "one", name) for name in ("other", "short", "bf16"))
