"""How far a conversion is: a line with GB, GB/s and the time that remains, on stderr."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_EVERY_ON_TERMINAL = 0.2
_EVERY_IN_LOG = 30.0


class Progress:
    """Call it with the bytes of every block. On a terminal one line moves; in a log file a line comes now and then."""

    def __init__(self, what: str, total: int, out: TextIO | None = None):
        self._what, self._total = what, max(total, 1)
        self._out = sys.stderr if out is None else out
        self._moves = self._out.isatty()
        self._every = _EVERY_ON_TERMINAL if self._moves else _EVERY_IN_LOG
        self._start = self._shown = time.monotonic()
        self.done = 0

    def __call__(self, num_bytes: int) -> None:
        self.done += num_bytes
        now = time.monotonic()
        if now - self._shown >= self._every:
            self._shown = now
            self._print(now)

    def _print(self, now: float) -> None:
        seconds = max(now - self._start, 1e-6)
        rate = self.done / seconds
        left = max(self._total - self.done, 0) / max(rate, 1.0)
        text = (
            f"{self._what}: {100 * min(self.done / self._total, 1):3.0f} %  {self.done / 1e9:.2f} of"
            f" {self._total / 1e9:.2f} GB  {rate / 1e9:.2f} GB/s  {left:.0f} s left"
        )
        self._out.write(f"\r\x1b[K{text}" if self._moves else f"{text}\n")
        self._out.flush()

    def finish(self) -> float:
        """Clear the line; returns the seconds since the start."""
        if self._moves:
            self._out.write("\r\x1b[K")
            self._out.flush()
        return time.monotonic() - self._start
