"""Bytes of a file at a given place, into memory that the caller owns.

No mmap: mapped pages count as resident memory, which would then grow with the file. No seek: threads may share a file.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import OrderedDict

import torch
from torch import Tensor

_MOST_OPEN = 64


class _Descriptor:
    """Closed when nobody holds it: a thread that reads keeps it open whatever others do."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


_recently_used: OrderedDict[int, weakref.ref[PositionedFile]] = OrderedDict()
_numbers = itertools.count()
_lock = threading.Lock()


class PositionedFile:
    """A file for reading. Descriptors are opened when needed; at most 64 stay open over all files of a process."""

    def __init__(self, path: str):
        self.path = path
        self.size = os.path.getsize(path)
        self._number, self._held = next(_numbers), None
        self._read_ahead = True

    def _descriptor(self) -> _Descriptor:
        with _lock:
            if self._held is None:
                self._held = _Descriptor(self.path)
                if not self._read_ahead:
                    os.posix_fadvise(self._held.number, 0, 0, os.POSIX_FADV_RANDOM)
                _recently_used[self._number] = weakref.ref(self)
            _recently_used.move_to_end(self._number)
            if len(_recently_used) > _MOST_OPEN:
                oldest = _recently_used.popitem(last=False)[1]()
                if oldest is not None:
                    oldest._held = None
            return self._held

    def stop_read_ahead(self) -> None:
        """From now on the kernel fetches what is asked for and nothing behind it: for readers of parts of tensors."""
        with _lock:
            if self._read_ahead:
                self._read_ahead = False
                if self._held is not None:
                    os.posix_fadvise(self._held.number, 0, 0, os.POSIX_FADV_RANDOM)

    def read_into(self, buffer, offset: int) -> None:
        """Fill the writable ``buffer`` (bytes-like) with the bytes from ``offset`` on; EOFError where the file ends."""
        view = memoryview(buffer).cast("B")
        descriptor = self._descriptor()
        while view:
            count = os.preadv(descriptor.number, [view], offset)
            if count == 0:
                raise EOFError(f"{self.path} ends at byte {offset}")
            view, offset = view[count:], offset + count

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes; EOFError where the file ends before."""
        buffer = bytearray(length)
        self.read_into(buffer, offset)
        return bytes(buffer)

    def read_tensor(self, tensor: Tensor, offset: int) -> None:
        """Fill a contiguous CPU tensor of any dtype with the bytes from ``offset`` on."""
        assert tensor.is_contiguous(), "bytes are read into contiguous memory only"
        if tensor.numel():
            self.read_into(tensor.detach().reshape(-1).view(torch.uint8).numpy(), offset)
