"""Many dry runs in one process of their own.

The process plays ranks of fake worlds, so it can be neither pytest's nor a worker's of ``worker_pool``.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

from tests.helpers.fork_server import fork_context

ROOT = Path(__file__).resolve().parents[2]
OURS = (
    "GPUS_PER_NODE",
    "NNODES",
    "LOCAL_RANK",
    "RANK",
    "WORLD_SIZE",
    "MODEL",
    "DATA",
    "OUTPUT",
    "CUDA_VISIBLE_DEVICES",
    "PRESET",
    "DATASET",
    "TENSOR_PARALLEL",
    "PIPELINE_PARALLEL",
)


def recipe_flags(recipe: Path, *flags: str, **environment: str) -> tuple[list[str], int]:
    """(the flags that a recipe gives, processes that it would start) with ``environment`` on a machine of 8 GPUs."""
    from dc_megatron.training.printed_argv import read_printed

    clean = {k: v for k, v in os.environ.items() if k not in OURS}
    clean |= {"DC_PRINT_ARGV": "1", "GPUS_PER_NODE": "8", **environment}
    done = subprocess.run(
        ["bash", str(recipe), *flags], capture_output=True, text=True, cwd=ROOT, env=clean, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return read_printed(done.stdout)


def run_all(cases: dict[str, tuple[list[str], int]], folder: Path) -> dict[str, dict]:
    """Of each (flags, processes): "seconds" of processor time, and "ranks", "stages", ... of DryRun, or "error"."""
    given, found = folder / "cases.json", folder / "results.json"
    given.write_text(json.dumps(cases))
    process = fork_context().Process(target=_run_cases, args=(given, found), daemon=True)
    process.start()
    process.join(600)
    assert process.exitcode == 0, "the dry runs did not end well; what they said is above"
    return json.loads(found.read_text())


def _one(flags: list[str], processes: int) -> dict:
    import time

    from dc_megatron.errors import UserError
    from dc_megatron.planner.memory import largest_stage
    from dc_megatron.training.dry_report import as_text
    from dc_megatron.training.dry_run import rehearse
    from dc_megatron.training.run import check

    start = time.process_time()
    try:
        checked = check([*flags, "--dry-run"], processes)
        done = rehearse(checked, processes)
        largest = largest_stage(done.run, done.recompute).total
        result = {**asdict(done), "text": as_text(checked, done, processes), "gigabytes": largest / 1e9}
    except (UserError, AssertionError) as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    return {**result, "seconds": time.process_time() - start}


def _run_cases(given: Path, found: Path) -> None:
    from dc_megatron.runtime import patches

    for name in OURS:
        os.environ.pop(name, None)
    patches.apply(training=True)
    # Before the clock of the first case runs.
    import dc_megatron.training.dry_run  # noqa: F401

    cases = json.loads(given.read_text())
    found.write_text(json.dumps({name: _one(*case) for name, case in cases.items()}))
