"""How full and how even packed rows are, how long an epoch's plan takes and how much memory, against simpler ways.

The plan is made in a process of its own, as a run makes it: order, rows, file. Lengths are those of ``llava_lengths``.
"""

from __future__ import annotations

import glob
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict

import numpy as np

from dc_megatron.benchmark import machine
from dc_megatron.benchmark.child_process import measure
from dc_megatron.benchmark.llava_lengths import STAGES, llava_lengths
from dc_megatron.config import DataConfig, DataSource, ImageTiling
from dc_megatron.data.packing import statistics
from dc_megatron.data.plan_file import read_plan
from dc_megatron.data.row_plan import RowPlan
from dc_megatron.errors import UserError

ROWS_PER_STEP = 128
DATA_PARALLEL_SIZES = (2, 8, 64)
PADDED_BATCH = 16
# For 665,000 samples, and the fill at 4096 positions in stage 2.
LIMIT_SECONDS, LIMIT_GB, LIMIT_FILL = 60.0, 1.0, 0.98
_LIMIT_SAMPLES, _LIMIT_SEQ_LENGTH = 665_000, 4096


def benchmark_packing(
    samples: int = 665_000, stage: int = 2, seq_lengths: tuple[int, ...] = (2048, 4096, 8192)
) -> dict:
    """Plan ``samples`` at each of ``seq_lengths``; returns plain values (see benchmarks/README.md).

    UserError: too few samples, rows shorter than a sample.
    """
    if samples < ROWS_PER_STEP:
        raise UserError(f"--samples {samples}: at least {ROWS_PER_STEP} are needed")
    lengths, _ = llava_lengths(samples, stage)
    if min(seq_lengths) < lengths.max():
        raise UserError(f"--seq-lengths {min(seq_lengths)}: samples have up to {lengths.max()} positions")
    plans = [{**_measure_plan(samples, stage, size), "baselines": _baselines(lengths, size)} for size in seq_lengths]
    return {
        "benchmark": "packing",
        **machine.describe(tempfile.gettempdir()),
        "samples": samples,
        "stage": stage,
        "lengths": {
            "parts": [asdict(part) for part in STAGES[stage]],
            "mean": float(lengths.mean()),
            "shortest": int(lengths.min()),
            "longest": int(lengths.max()),
        },
        "rows_per_step": ROWS_PER_STEP,
        "plans": plans,
        "limits": [entry for plan in plans for entry in _limits(plan, samples, stage)],
    }


def _measure_plan(samples: int, stage: int, seq_length: int) -> dict:
    words = [str(number) for number in (samples, stage, seq_length)]
    # It stays a moment, so that it is seen.
    bare = measure([sys.executable, "-c", "import numpy, time; time.sleep(0.3)"])
    path = os.pathsep.join(filter(None, (machine.ROOT, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "dc_megatron.benchmark.packing", *words]
    done = measure(command, os.environ | {"PYTHONPATH": path})
    return {
        "seq_length": seq_length,
        **json.loads(done.output),
        "peak_resident_gb": done.peak_resident / 1e9,
        "peak_above_interpreter_gb": (done.peak_resident - bare.peak_resident) / 1e9,
    }


def make_plan(samples: int, stage: int, seq_length: int) -> dict:
    """Plan an epoch into a file and describe it: what a process started for it prints."""
    lengths, tiles = llava_lengths(samples, stage)
    config = DataConfig(
        sources=(DataSource("llava", "images"),),
        tokenizer_path="",
        version="v1",
        image_aspect_ratio="pad",
        model_max_length=seq_length,
        seq_length=seq_length,
        tiling=ImageTiling(tile_size=336, tile_tokens=576, side=24),
        packing="best-fit",
    )
    sources = np.zeros(samples, dtype=np.int16)
    with tempfile.TemporaryDirectory() as folder:
        start, cpu = time.perf_counter(), time.process_time()
        RowPlan(lengths, tiles, sources, config, rows_per_step=ROWS_PER_STEP, folder=folder)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        start = time.perf_counter()
        plan = RowPlan(lengths, tiles, sources, config, rows_per_step=ROWS_PER_STEP, folder=folder)
        reading = time.perf_counter() - start
        (path,) = glob.glob(os.path.join(folder, "*.npy"))
        planned = statistics(read_plan(path), lengths, tiles, seq_length, ROWS_PER_STEP, DATA_PARALLEL_SIZES)
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "seconds_from_the_file": reading,
            "file_mb": os.path.getsize(path) / 1e6,
            **asdict(plan.statistics(DATA_PARALLEL_SIZES)),
            "imbalance_before_steps_are_sorted": planned.imbalance,
        }


def _baselines(lengths: np.ndarray, seq_length: int) -> dict:
    start = time.perf_counter()
    rows = first_fit_decreasing(lengths, seq_length)
    return {
        "first_fit_decreasing_whole_epoch": {
            "fill": int(lengths.sum()) / (rows * seq_length),
            "rows": rows,
            "seconds": time.perf_counter() - start,
        },
        f"padded_to_the_longest_of_{PADDED_BATCH}": {"fill": padded_fill(lengths, PADDED_BATCH)},
    }


def first_fit_decreasing(lengths: np.ndarray, limit: int) -> int:
    """Rows that first-fit decreasing takes for all samples: the longest first, each in the first row with room."""
    # Two rows in a row are more than ``limit`` long together, which bounds their number.
    leaves = 1 << max(1, (2 * int(lengths.sum(dtype=np.int64)) // limit + 1).bit_length())
    # The most room of any row below a node; the rows are the leaves from left to right.
    room = [limit] * (2 * leaves)
    used = 0
    for length in np.sort(lengths)[::-1].tolist():
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < length
        used = max(used, node - leaves + 1)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return used


def padded_fill(lengths: np.ndarray, batch: int) -> float:
    """Part of the positions that samples take where each row of a batch is as long as its longest sample."""
    whole = lengths[: len(lengths) // batch * batch].reshape(-1, batch)
    return float(whole.sum(dtype=np.int64) / (whole.max(axis=1).sum(dtype=np.int64) * batch))


def _limits(plan: dict, samples: int, stage: int) -> list[dict]:
    limits = []
    if plan["seq_length"] == _LIMIT_SEQ_LENGTH and stage == 2:
        limits.append(("fill at least", plan["fill"], LIMIT_FILL, plan["fill"] >= LIMIT_FILL))
    if samples <= _LIMIT_SAMPLES:
        seconds, memory = plan["seconds"], plan["peak_resident_gb"]
        limits.append(("seconds at most", seconds, LIMIT_SECONDS, seconds <= LIMIT_SECONDS))
        limits.append(("GB of the process at most", memory, LIMIT_GB, memory <= LIMIT_GB))
    return [
        {"quantity": f"{plan['seq_length']}: {what}", "value": value, "limit": limit, "holds": holds}
        for what, value, limit, holds in limits
    ]


def as_text(result: dict) -> str:
    """The result as a table and the limits, for people."""
    sizes = "".join(f"  tiles x{size}" for size in DATA_PARALLEL_SIZES)
    lines = [
        f"{result['samples']} samples like stage {result['stage']}, of {result['lengths']['mean']:.0f} positions each",
        f"seq_length   fill  first-fit  padded  seconds  peak GB  samples/row  tiles/row (min-max, std){sizes}",
    ]
    for plan in result["plans"]:
        first_fit, padded = (baseline["fill"] for baseline in plan["baselines"].values())
        tiles = f"{plan['tiles_mean']:.2f} ({plan['tiles_min']}-{plan['tiles_max']}, {plan['tiles_std']:.2f})"
        imbalance = "".join(f"{plan['imbalance'].get(str(size), float('nan')):10.3f}" for size in DATA_PARALLEL_SIZES)
        lines.append(
            f"{plan['seq_length']:10}{plan['fill']:7.3f}{first_fit:11.3f}{padded:8.3f}{plan['seconds']:9.1f}"
            f"{plan['peak_resident_gb']:9.2f}{plan['samples_per_row']:13.2f}{tiles:>26}{imbalance}"
        )
    for entry in result["limits"]:
        state = "holds" if entry["holds"] else "FAILS"
        lines.append(f"{state}: {entry['quantity']} {entry['limit']:g}: {entry['value']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(make_plan(*map(int, sys.argv[1:]))))
