"""Where every rank stands when a run does not move: the stacks of its threads, before the process groups give up.

A collective call that never ends says nothing about the rank that did not come. Each rank writes into a file of its
own, from a thread that needs no lock of Python's: when no step has ended for most of ``--distributed-timeout-minutes``,
and whenever it is sent SIGUSR2.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys

FOLDER = "stacks"
# Of the timeout, after which the groups of torch.distributed end the process.
_SHARE = 0.8


class StallWatch:
    """``folder``: of the run; empty: stacks go to standard error. ``timeout_minutes``: of the process groups.

    ``stalled_seconds`` without ``alive()`` are taken for a stall; ``alive()`` begins them anew.
    """

    def __init__(self, folder: str, rank: int, timeout_minutes: float):
        self.stalled_seconds = _SHARE * 60 * timeout_minutes
        self.path, self._file = "", sys.stderr
        if folder:
            self.path = os.path.join(folder, FOLDER, f"rank_{rank:05d}.txt")
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            # Open as long as the run: who dumps cannot open a file any more.
            self._file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115
        faulthandler.register(signal.SIGUSR2, file=self._file, all_threads=True)

    def alive(self) -> None:
        """A step has ended, or something else that may take long begins."""
        faulthandler.dump_traceback_later(self.stalled_seconds, file=self._file)

    def stop(self) -> None:
        """The run has ended; a file in which nothing was written goes."""
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        if self.path:
            self._file.close()
            if not os.path.getsize(self.path):
                os.remove(self.path)
