"""Calls to a store that may fail for a while: tried again, each try with a time limit, and said so in the log."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

# The state of Python's own generator is part of a checkpoint; a failing store must not move it.
_chance = random.Random()
# These say what is there, or who may read it; asking again changes nothing.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


class StoreFailure(OSError):
    """A store did not do what was asked of it, however often it was asked: no fault of one file."""


@dataclass(frozen=True)
class Retrying:
    """``tries`` in all; waits that double from ``first_wait`` to ``longest_wait`` seconds; ``limit`` seconds a try.

    Every wait is shortened at random by up to a half, so that many readers do not come back at once.
    """

    tries: int = 5
    first_wait: float = 0.5
    longest_wait: float = 8.0
    limit: float = 60.0
    sleep: Callable[[float], None] = time.sleep

    def call[Result](self, what: str, function: Callable[[], Result]) -> Result:
        """``function()``. FINAL errors pass at once; the last try ends in a StoreFailure with ``what`` and why."""
        for attempt in range(1, self.tries + 1):
            try:
                return _within(self.limit, function)
            except FINAL:
                raise
            except Exception as error:
                cause = error
            if attempt < self.tries:
                wait = min(self.longest_wait, self.first_wait * 2 ** (attempt - 1)) * _chance.uniform(0.5, 1)
                warnings_of_retries.warn(
                    "%s: %s; trying again in %.1f s (try %d of %d)", what, _told(cause), wait, attempt + 1, self.tries
                )
                self.sleep(wait)
        raise StoreFailure(f"{what}: failed {self.tries} times, at last with {_told(cause)}") from cause


def _within[Result](seconds: float, function: Callable[[], Result]) -> Result:
    """``function()``, or TimeoutError after ``seconds``.

    Clients differ in the time limits they know, so the call runs in a thread that is left to itself when it is late.
    """
    answer: list = []

    def run() -> None:
        try:
            answer.append((function(), None))
        except BaseException as error:
            answer.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name="store read")
    thread.start()
    thread.join(seconds)
    if not answer:
        raise TimeoutError(f"no answer within {seconds:g} s")
    result, error = answer[0]
    if error is not None:
        raise error
    return result


def _told(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:200]}"


class LimitedWarnings:
    """At most one warning every ``seconds``; the next one says how many were left out in between."""

    def __init__(self, seconds: float = 10.0, clock: Callable[[], float] = time.monotonic):
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._next = float("-inf")
        self._left_out = 0

    def warn(self, message: str, *arguments) -> None:
        with self._lock:
            now = self._clock()
            if now < self._next:
                self._left_out += 1
                return
            left_out, self._left_out = self._left_out, 0
            self._next = now + self._seconds
        more = f" ({left_out} more such warnings since the last one)" if left_out else ""
        logger.warning(message + more, *arguments)


warnings_of_retries = LimitedWarnings()
