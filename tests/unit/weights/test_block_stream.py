"""Blocks read ahead by a thread, and the line that says how far a conversion is."""

from __future__ import annotations

import io
import itertools
import re
import threading

import pytest
import torch

from dc_megatron.weights import progress
from dc_megatron.weights.block_stream import Block, read_ahead, split_rows
from dc_megatron.weights.progress import Progress


def blocks_of(tensor: torch.Tensor, most: int) -> list[Block]:
    def read(start, end, out):
        out.copy_(tensor[start:end])

    ranges = split_rows(tuple(tensor.shape), tensor.dtype, most)
    return [Block(read, tuple(tensor.shape), tensor.dtype, *bounds) for bounds in ranges]


@pytest.mark.parametrize(
    ("shape", "most", "count"), [((100, 8), 320, 10), ((100, 8), 1 << 20, 1), ((7,), 8, 4), ((3, 1000), 8, 3)]
)
def test_ranges_cover_all_rows_once_and_are_bounded(shape, most, count):
    ranges = split_rows(shape, torch.float32, most)
    assert len(ranges) == count
    assert ranges[0][0] == 0
    assert ranges[-1][1] == shape[0]
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(ranges))
    row = 4 * (shape[1] if len(shape) > 1 else 1)
    assert max(end - start for start, end in ranges) * row <= max(most, row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_blocks_come_in_order_and_own_their_bytes(dtype):
    """torch.save writes whole storages: a block's may not be larger than the block."""
    tensor = torch.arange(240).to(dtype).view(40, 6)
    found = []
    for block, content in read_ahead(blocks_of(tensor, 100)):
        assert content.untyped_storage().nbytes() == block.num_bytes
        found.append(content.clone())
    assert len(found) >= 3
    assert torch.equal(torch.cat(found), tensor)


def test_an_error_of_the_reading_thread_arrives():
    def broken(start, end, out):
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        list(read_ahead([Block(broken, (4, 4), torch.float32, 0, 4)]))


def test_who_stops_early_leaves_no_thread_behind():
    before = threading.active_count()
    stream = read_ahead(blocks_of(torch.zeros(1000, 10), 400))
    next(stream)
    stream.close()
    assert threading.active_count() == before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_one_line_that_moves(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    out = Terminal()
    bar = Progress("import", 4_000_000_000, out)
    bar(1_000_000_000)
    bar(1_000_000_000)
    assert "import:  25 %  1.00 of 4.00 GB  1.00 GB/s  3 s left" in out.getvalue()
    assert "\n" not in out.getvalue()
    assert bar.finish() == 2.0
    assert out.getvalue().endswith("\r\x1b[K")


def test_a_log_file_gets_a_line_now_and_then(monkeypatch):
    clock = iter([0.0, 10.0, 31.0, 32.0, 33.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    bar = Progress("export", 100, out)
    for _ in range(3):
        bar(20)
    bar.finish()
    assert re.findall(r"^export:  40 %", out.getvalue(), re.MULTILINE) == ["export:  40 %"]
