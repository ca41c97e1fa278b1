"""A line on a terminal that says how far a long piece of work is; nothing where the output is no terminal."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_EVERY = 0.2


class ProgressLine:
    """Call it with (what, done, total); total None where it is not known. ``finish`` clears the line."""

    def __init__(self, out: TextIO | None = None):
        self._out = sys.stderr if out is None else out
        self._shows = self._out.isatty()
        self._last = 0.0

    def __call__(self, what: str, done: int, total: int | None = None) -> None:
        now = time.monotonic()
        if self._shows and now - self._last >= _EVERY:
            self._last = now
            share = f" of {total:,}  {100 * done / max(total, 1):3.0f} %" if total is not None else ""
            self._out.write(f"\r\x1b[K{what}: {done:,}{share}")
            self._out.flush()

    def finish(self) -> None:
        if self._shows:
            self._out.write("\r\x1b[K")
            self._out.flush()
