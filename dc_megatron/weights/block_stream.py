"""Tensors in blocks of bounded size, read by one thread while another writes: memory does not grow with the model."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Large enough that disks and hashes run at full speed, small enough that three of them are nothing.
BLOCK_BYTES = 64 << 20
_BUFFERS = 3


@dataclass(frozen=True)
class Block:
    """Rows [start, end) of a tensor. ``read(start, end, out)`` fills them in; ``shape`` is that of the whole tensor."""

    read: Callable[[int, int, Tensor], None]
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    end: int

    @property
    def block_shape(self) -> tuple[int, ...]:
        return (self.end - self.start, *self.shape[1:])

    @property
    def num_bytes(self) -> int:
        return (self.end - self.start) * row_bytes(self.shape, self.dtype)


def row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of one row of a tensor."""
    count = dtype.itemsize
    for size in shape[1:]:
        count *= size
    return count


def split_rows(shape: tuple[int, ...], dtype: torch.dtype, most: int = BLOCK_BYTES) -> list[tuple[int, int]]:
    """Ranges of rows of at most ``most`` bytes, but at least one row; of about equal height."""
    rows = shape[0]
    height = max(1, most // max(1, row_bytes(shape, dtype)))
    count = max(1, -(-rows // height))
    bounds = [rows * i // count for i in range(count + 1)]
    return list(itertools.pairwise(bounds))


class _Stopped(Exception):
    """The writing side has gone."""


def read_ahead(blocks: Iterable[Block]) -> Iterator[tuple[Block, Tensor]]:
    """Each block with its content, in order, read by a thread that is up to two blocks ahead.

    The tensor is valid until the next one is asked for. It owns a storage of exactly its size, because torch.save
    writes whole storages. An error of the reading thread is raised here.
    """
    free: queue.Queue = queue.Queue()
    full: queue.Queue = queue.Queue()
    for _ in range(_BUFFERS):
        free.put(bytearray())
    stop = threading.Event()
    thread = threading.Thread(target=_read, args=(blocks, free, full, stop), name="block reader", daemon=True)
    thread.start()
    try:
        while (item := full.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            block, tensor, buffer = item
            yield block, tensor
            del tensor
            free.put(buffer)
    finally:
        stop.set()
        free.put(bytearray())
        thread.join()


def _read(blocks: Iterable[Block], free: queue.Queue, full: queue.Queue, stop: threading.Event) -> None:
    try:
        for block in blocks:
            buffer = free.get()
            if stop.is_set():
                return
            if len(buffer) < block.num_bytes:
                buffer = bytearray(max(block.num_bytes, min(BLOCK_BYTES, block.num_bytes * 2)))
            # torch.frombuffer's storage begins and ends with the block.
            flat = torch.frombuffer(memoryview(buffer)[: block.num_bytes], dtype=block.dtype)
            tensor = flat.view(block.block_shape)
            block.read(block.start, block.end, tensor)
            full.put((block, tensor, buffer))
            del flat, tensor
        full.put(None)
    except BaseException as error:
        full.put(error)
