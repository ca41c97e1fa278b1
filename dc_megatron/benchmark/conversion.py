"""Import and export of a whole checkpoint against `cp` and `sync` of the same files, on the same disk, in one run.

The three are whole processes and take turns, so that a disk whose speed drifts favours none of them. Before each one
the disk is idle and the page cache empty; what it wrote is removed before the next needs the room.
"""

from __future__ import annotations

import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dc_megatron.benchmark import machine
from dc_megatron.benchmark.checkpoint_shapes import shape_of
from dc_megatron.benchmark.child_process import Measurement, measure
from dc_megatron.benchmark.work_folder import SOURCE, WorkFolder, size_below
from dc_megatron.errors import UserError

BASELINE = "cp + sync"
# What the steps make beside the source.
COPY, TREE, EXPORT = "copy", "tree", "export"

# What must hold: (step, quantity) -> upper bound.
LIMITS = {
    ("import", "ratio"): 1.3,
    ("export", "ratio"): 1.3,
    ("import", "peak_anonymous_gb"): 1.0,
    ("export", "peak_anonymous_gb"): 1.0,
    ("import", "peak_resident_gb"): 1.5,
    ("export", "peak_resident_gb"): 1.5,
    ("import", "cpu_seconds_per_gb"): 5.0,
}
WHAT = {
    "ratio": "wall time / median of cp + sync",
    "peak_anonymous_gb": "GB of anonymous memory at its peak",
    "peak_resident_gb": "GB of resident memory at its peak (VmHWM)",
    "cpu_seconds_per_gb": "CPU seconds per GB",
}


@dataclass(frozen=True)
class Step:
    """``command`` with ``{source}``, ``{copy}``, ``{tree}`` and ``{export}`` for folders; it makes ``makes``."""

    name: str
    command: tuple[str, ...]
    makes: str | None


@dataclass(frozen=True)
class Turn:
    """One run of a step. ``sync_seconds``: how long the disk was still busy with its data when it had ended."""

    measurement: Measurement
    sync_seconds: float
    bytes_made: int


def conversion_steps(converter: Sequence[str], verify: bool = False, baseline: bool = True) -> list[Step]:
    """The steps of one round in their order; ``converter``: the words that start it."""
    steps = []
    if baseline:
        steps.append(Step(BASELINE, ("sh", "-c", "cp -r {source} {copy} && sync"), COPY))
    steps.append(Step("import", (*converter, "import", "--hf", "{source}", "--save", "{tree}"), TREE))
    if verify:
        steps.append(Step("verify", (*converter, "verify", "{source}", "{tree}"), None))
    export = (*converter, "export", "--load", "{tree}", "--format", "hf", "--save", "{export}")
    return [*steps, Step("export", export, EXPORT)]


def in_turn(steps: list[Step], number: int) -> list[Step]:
    """The order of round ``number``: the baseline is first, in the middle or last; an export needs an import."""
    if steps[0].name != BASELINE:
        return steps
    others = steps[1:]
    place = number % len(steps)
    return [*others[:place], steps[0], *others[place:]]


def benchmark_conversion(
    shape: str,
    folder: str,
    runs: int = 3,
    layers: int | None = None,
    sparse: bool = False,
    verify: bool = False,
    keep: bool = False,
    whole_cache: bool = True,
    converter: Sequence[str] = (sys.executable, os.path.join(machine.ROOT, "tools", "convert.py")),
    report: Callable[[str], None] = lambda line: None,
) -> dict:
    """Run the whole benchmark below ``folder``; returns the result as plain values (see benchmarks/README.md).

    At most three copies of the checkpoint lie on the disk at once; all are removed at the end, but the source where
    ``keep``. ``whole_cache``: see ``machine.empty_page_cache``. ``report`` is told about every step as it ends.
    UserError: no room, a step that fails.
    """
    if runs < 1:
        raise UserError(f"--runs {runs}: at least 1 is needed")
    # A hole is copied as a hole, so cp of a sparse source measures nothing.
    steps = conversion_steps(converter, verify, baseline=not sparse)
    facts = machine.describe(folder)
    # Beside the source lie the tree and either the copy or the export.
    with WorkFolder(folder, shape, layers, sparse, copies=2, keep=keep) as work:
        turns, cache = _all_turns(steps, runs, work, whole_cache, report)
    steps_done = summary(turns, work.size)
    for step in steps:
        steps_done[step.name]["command"] = _readable(step.command)
    return {
        "benchmark": "conversion",
        **facts,
        "checkpoint": {
            "shape": shape,
            "layers": shape_of(shape, layers).config["num_hidden_layers"],
            "layers_of_the_real_model": shape_of(shape).config["num_hidden_layers"],
            "gb": work.size / 1e9,
            "content": "holes that read as zeros" if sparse else "random",
        },
        "page_cache_before_each_step": cache,
        "runs": runs,
        "steps": steps_done,
        "limits": against_limits(steps_done),
    }


def _readable(command: Sequence[str]) -> str:
    """A step's command without the paths of this machine."""
    if command[0] == "sh":
        return command[-1]
    shown = [os.path.relpath(word, machine.ROOT) if word.startswith(machine.ROOT) else word for word in command]
    return " ".join(["python" if word == sys.executable else seen for word, seen in zip(command, shown, strict=True)])


def _all_turns(
    steps: list[Step], runs: int, work: WorkFolder, whole_cache: bool, report: Callable[[str], None]
) -> tuple[dict[str, list[Turn]], str]:
    """step name -> its turns, and how the page cache was emptied."""
    turns: dict[str, list[Turn]] = {step.name: [] for step in steps}
    cache = ""
    for number in range(runs):
        for step in in_turn(steps, number):
            cache = machine.empty_page_cache([work.path], whole_cache)
            turn = _take_turn(step, work)
            turns[step.name].append(turn)
            report(f"run {number + 1} of {runs}, {step.name}: {_in_words(turn.measurement, work.size)}")
            if step.makes in (COPY, EXPORT):
                work.remove(step.makes)
        work.remove(TREE)
    return turns, cache


def _in_words(taken: Measurement, size: int) -> str:
    return (
        f"{taken.seconds:.1f} s, {size / 1e9 / taken.seconds:.2f} GB/s, {taken.cpu_seconds:.1f} s of CPU,"
        f" {taken.peak_anonymous / 1e9:.2f} GB anonymous, {taken.peak_resident / 1e9:.2f} GB resident,"
        f" {taken.disk_read / 1e9:.2f} GB from the disk"
    )


def _take_turn(step: Step, work: WorkFolder) -> Turn:
    quote = shlex.quote if step.command[0] == "sh" else str
    paths = {name: quote(work.inside(name)) for name in (SOURCE, COPY, TREE, EXPORT)}
    measurement = measure([word.format(**paths) for word in step.command])
    start = time.perf_counter()
    os.sync()
    sync_seconds = time.perf_counter() - start
    made = work.inside(step.makes) if step.makes else None
    if made and not os.path.isdir(made):
        raise UserError(f"{step.name}: ended well and made no {step.makes}\n{measurement.output}")
    return Turn(measurement, sync_seconds, size_below(made) if made else 0)


def summary(turns: dict[str, list[Turn]], size: int) -> dict[str, dict]:
    """Per step: each run's figures, the median time and its ratio to the baseline's; the worst of the other figures.

    ``size``: bytes of the checkpoint's tensors; all rates count them.
    """
    gb = size / 1e9
    base = turns.get(BASELINE)
    base_seconds = statistics.median(turn.measurement.seconds for turn in base) if base else None
    steps = {}
    for name, taken in turns.items():
        runs = [turn.measurement for turn in taken]
        seconds = statistics.median(run.seconds for run in runs)
        steps[name] = {
            "seconds": [run.seconds for run in runs],
            "median_seconds": seconds,
            "ratio": seconds / base_seconds if base_seconds else None,
            "gb_per_second": gb / seconds,
            "cpu_seconds_per_gb": max(run.cpu_seconds for run in runs) / gb,
            "peak_anonymous_gb": max(run.peak_anonymous for run in runs) / 1e9,
            "peak_resident_gb": max(run.peak_resident for run in runs) / 1e9,
            "disk_read_gb": max(run.disk_read for run in runs) / 1e9,
            "sync_seconds_afterwards": max(turn.sync_seconds for turn in taken),
            "gb_made": taken[-1].bytes_made / 1e9,
        }
    return steps


def against_limits(steps: dict[str, dict]) -> list[dict]:
    """One entry for each limit whose quantity was measured."""
    measured = [(*key, limit, steps[key[0]][key[1]]) for key, limit in LIMITS.items() if key[0] in steps]
    return [
        {"step": step, "quantity": quantity, "limit": limit, "value": value, "holds": value <= limit}
        for step, quantity, limit, value in measured
        if value is not None
    ]


def as_text(result: dict) -> str:
    """The result as a table and the limits, for people."""
    checkpoint, machine_facts = result["checkpoint"], result["machine"]
    lines = [
        f"{checkpoint['shape']} shape, {checkpoint['layers']} of {checkpoint['layers_of_the_real_model']} layers,"
        f" {checkpoint['gb']:.2f} GB of tensors ({checkpoint['content']});"
        f" {machine_facts['cores']} cores, {machine_facts['memory_gb']} GB, {machine_facts['filesystem']}",
        "",
        "step        median s   ratio   GB/s   CPU s/GB   anonymous GB   resident GB   read GB   all runs, s",
    ]
    for name, step in result["steps"].items():
        ratio = "-" if step["ratio"] is None else f"{step['ratio']:.2f}"
        figures = (
            f"{step['median_seconds']:10.1f}{ratio:>8}{step['gb_per_second']:7.2f}{step['cpu_seconds_per_gb']:11.2f}"
            f"{step['peak_anonymous_gb']:15.3f}{step['peak_resident_gb']:14.3f}{step['disk_read_gb']:10.2f}   "
        )
        lines.append(f"{name:10}{figures}" + " ".join(f"{seconds:.1f}" for seconds in step["seconds"]))
    lines.append("")
    for entry in result["limits"]:
        lines.append(
            f"{'holds' if entry['holds'] else 'FAILS'}: {entry['step']}, {WHAT[entry['quantity']]}:"
            f" {entry['value']:.2f} (at most {entry['limit']})"
        )
    return "\n".join(lines)
