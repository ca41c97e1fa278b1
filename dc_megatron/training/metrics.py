"""One line of ``metrics.jsonl`` an iteration, and the counts it is made of."""

from __future__ import annotations

import json
import os
import time

COUNTS = ("samples", "supervised_tokens", "tokens", "positions", "images", "substituted_images")


class StepCounts:
    """Sums the counts of this rank's micro-batches since the last ``take``."""

    def __init__(self):
        self._sums = dict.fromkeys(COUNTS, 0)

    def add(self, counts: dict) -> None:
        for name in COUNTS:
            self._sums[name] += counts[name]

    def take(self) -> dict[str, int]:
        taken, self._sums = self._sums, dict.fromkeys(COUNTS, 0)
        return taken


class MetricsFile:
    """Appends to ``metrics.jsonl``; lines beyond the iteration that a run resumes from are dropped first."""

    def __init__(self, folder: str, resume_iteration: int):
        os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(folder, "metrics.jsonl")
        kept = [line for line in self._lines() if line["iteration"] <= resume_iteration]
        with open(self.path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (open as long as the run)

    def _lines(self) -> list[dict]:
        found = []
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                for line in file:
                    # A run that was killed may have left half a line.
                    if line.endswith("}\n"):
                        found.append(json.loads(line))
        return found

    def write(self, entry: dict) -> None:
        self._file.write(json.dumps(entry) + "\n")


class Clock:
    """Seconds between calls of ``lap``; call it as well where something begins that belongs to no step."""

    def __init__(self):
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed


def progress_line(iteration: int, last: int, loss: float | None, seconds_a_step: float) -> str:
    """A line for a terminal: bar, loss, speed and the time that is left."""
    width = 24
    done = min(width, width * iteration // max(last, 1))
    left = int((last - iteration) * seconds_a_step)
    clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}" if left >= 3600 else f"{left // 60}:{left % 60:02d}"
    shown = f"loss {loss:.4f}  " if loss is not None else ""
    bar = "=" * done + "." * (width - done)
    return f"[{bar}] {iteration}/{last}  {shown}{seconds_a_step:.2f} s/step  {clock} left"
