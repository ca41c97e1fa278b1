"""What the ranks of a benchmark's test do."""

from __future__ import annotations

from dc_megatron.evaluation import run_benchmark as module
from dc_megatron.evaluation.run_benchmark import Request, run_benchmark
from dc_megatron.inference.source import Source


class Stopped(Exception):
    """Stands for a kill: nothing is closed or collected."""


def evaluate(source: Source, request: Request, batches: int | None = None) -> tuple[dict | str, int]:
    """(summary, or "stopped" after ``batches`` batches of this rank; questions that this rank asked)."""
    asked = []
    original = module._Asker.answers

    def counted(self, questions):
        if batches is not None and len(asked) == batches:
            raise Stopped
        asked.append(len(questions))
        return original(self, questions)

    module._Asker.answers = counted
    try:
        return run_benchmark(source, request), sum(asked)
    except Stopped:
        return "stopped", sum(asked)
    finally:
        module._Asker.answers = original
