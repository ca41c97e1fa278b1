"""Arrays that are used again when nobody holds them any more.

The system hands out memory page by page, cleared: writing a batch of pixels to new memory costs several times as much
as writing it to memory that was used before.
"""

from __future__ import annotations

import math
import sys

import numpy as np


class ArrayPool:
    """Gives arrays of any shape and one type; for one thread.

    An array's memory comes back by itself when the array, and every view and tensor made of it, is gone. The pool keeps
    as much as was ever held at once.
    """

    def __init__(self, dtype: type):
        self._dtype = dtype
        self._blocks: list[np.ndarray] = []

    def take(self, *shape: int) -> np.ndarray:
        """A C-contiguous array with arbitrary content."""
        size = math.prod(shape)
        # What nobody else holds has two references: the list's and getrefcount's own.
        free = [place for place in range(len(self._blocks)) if sys.getrefcount(self._blocks[place]) == 2]
        fitting = [place for place in free if self._blocks[place].size >= size]
        if fitting:
            block = self._blocks[min(fitting, key=lambda place: self._blocks[place].size)]
        else:
            if free:
                # All of the free ones are too small: one of them makes room for the new one.
                del self._blocks[free[0]]
            block = np.empty(size, dtype=self._dtype)
            self._blocks.append(block)
        return block[:size].reshape(shape)
