"""One side of a benchmark of training steps, as a process of its own that does what it is told.

Started for each rank of each variant; reads commands from standard input, a line each, and answers with a line of JSON
on what was its standard output (everything else that is printed goes to standard error). Commands: ``build``,
``step N``, ``profile N PATH``, ``stop``. Imports come before the first command, so that several can import at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from dc_megatron.benchmark.step_batches import StepBatches, counts_of
from dc_megatron.benchmark.step_variants import VARIANTS, Variant
from dc_megatron.benchmark.step_workload import Workload, read_workload
from dc_megatron.data.rows import pinned


class Side:
    """The step of one variant and the batches that it trains on; each step's are made while the last one runs."""

    def __init__(self, workload: Workload, variant: Variant):
        self.workload, self.variant = workload, variant
        self.step = None
        self._batches = StepBatches(workload, text_only=variant.text_only)
        self._ahead = ThreadPoolExecutor(1)
        self._made: dict[int, object] = {}

    def build(self) -> dict:
        """Make model and optimizer; what they are."""
        import torch

        start = time.perf_counter()
        if self.variant.program == "hf":
            from dc_megatron.benchmark.step_reference import ReferenceStep as Step
        else:
            from dc_megatron.benchmark.step_megatron import MegatronStep as Step
        self.step = Step(self.workload, self.variant)
        self._order(0)
        return {
            "build_seconds": time.perf_counter() - start,
            "transformer_engine": getattr(self.step, "fused", False),
            "trainable": list(self.step.trainable),
            "threads": torch.get_num_threads(),
        }

    def _order(self, number: int) -> None:
        self._made[number] = self._ahead.submit(self._make, number)

    def _make(self, number: int) -> list[dict]:
        made = self._batches
        batches = made.packed(number, self.step.share) if self.variant.packed else made.padded(number)
        return [pinned(batch) for batch in batches] if self.step.device.type == "cuda" else batches

    def run(self, number: int) -> dict:
        """Step ``number``: seconds, loss, counts, seconds of its parts, peak memory of the device in bytes."""
        import torch

        cuda = self.step.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        if number not in self._made:
            self._order(number)
        start = time.perf_counter()
        batches = self._made.pop(number).result()
        waited = time.perf_counter() - start
        self._order(number + 1)
        done = self.step.run(batches)
        seconds = time.perf_counter() - start
        if not cuda:
            _give_memory_back()
        return {
            "seconds": seconds,
            "loss": done["loss"],
            "data_wait_seconds": waited,
            "sections": done["sections"],
            "counts": vars(counts_of(batches)),
            "lengths": self._batches.lengths(number),
            "peak_memory": torch.cuda.max_memory_allocated() if cuda else _peak_resident(),
        }

    def profile(self, number: int, path: str) -> dict:
        """Step ``number`` under torch's profiler; writes the table of the most costly operators to ``path``."""
        from dc_megatron.benchmark.step_profile import profile_step

        return profile_step(lambda: self.run(number), self.step.device.type == "cuda", path)


def _give_memory_back() -> None:
    """What was freed, to the system: the others of a benchmark on a CPU live in the same memory."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _peak_resident() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _import_everything(variant: Variant) -> None:
    """What takes seconds, before anybody waits for it; nothing here touches the GPU."""
    import torch  # noqa: F401

    if variant.program == "megatron":
        import importlib

        from dc_megatron.runtime import patches

        patches.apply()
        for name in (
            "megatron.core.models.gpt.gpt_model",
            "megatron.core.distributed",
            "dc_megatron.inference.assemble",
        ):
            importlib.import_module(name)
    else:
        import dc_megatron.reference.padded  # noqa: F401


def main(workload: str, variant: str, overrides: str) -> None:
    """Answer commands until ``stop`` or the end of standard input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _import_everything(VARIANTS[variant])
    side = Side(read_workload(workload, json.loads(overrides)), VARIANTS[variant])
    for line in sys.stdin:
        command, *words = line.rstrip("\n").split(" ", 2)  # a path may have blanks
        if command == "stop":
            break
        try:
            if command == "build":
                answer = side.build()
            elif command == "step":
                answer = side.run(int(words[0]))
            else:
                answer = side.profile(int(words[0]), words[1])
        except Exception as error:
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(json.dumps(answer), file=answers)
    # Threads and process groups must not hold up the exit.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
