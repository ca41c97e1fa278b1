"""Training on packed rows against training on rows padded to the longest of their micro-batch, in one run on the CPU.

Both are whole training runs of the same model, samples and LLaVA batch flags. They take turns, so that a machine whose
speed drifts favours neither.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from dc_megatron.benchmark import machine, packed_material
from dc_megatron.benchmark.child_process import Measurement, measure
from dc_megatron.errors import UserError

PACKED, PADDED = "best-fit", "none"
LIMIT = 1.8  # samples a second, packed / padded
# Of metrics.jsonl.
_SUMMED = ("samples", "tokens", "positions", "step_seconds", "data_wait_seconds")
# What the calling shell may have set for a launch of its own.
_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Workload:
    """``per_device`` x ``accumulation`` samples a step and process: LLaVA's batch flags.

    ``steps`` are measured, after one that is not. ``seq_length``: of a packed row; a step has a whole number of rows,
    and of the default length it is 5.02 that 32 samples fill, so that both kinds train on as many. ``samples``: records
    of the data. ``scale``: see ``packed_material.make_material``.
    """

    per_device: int = 16
    accumulation: int = 2
    steps: int = 3
    tensor_parallel: int = 1
    seq_length: int = 5120
    samples: int = 1000
    scale: int = 1


def training_command(work: Workload, packing: str, folder: str, output: str, seed: int) -> list[str]:
    """The words of one training run on the material in ``folder``; it writes ``output``/metrics.jsonl."""
    launcher = [sys.executable]
    if work.tensor_parallel > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(work.tensor_parallel)]
    inside = {
        "model_name_or_path": packed_material.LANGUAGE_MODEL,
        "vision_tower": packed_material.VISION_TOWER,
        "data_path": packed_material.DATA,
        "image_folder": packed_material.IMAGES,
        "index-folder": "index",
    }
    flags = {
        **{name: os.path.join(folder, value) for name, value in inside.items()},
        "version": packed_material.VERSION,
        "mm_dense_connector_type": "dci",
        "image_aspect_ratio": "pad",
        "model_max_length": packed_material.longest(work.scale),
        "packing": packing,
        "per_device_train_batch_size": work.per_device,
        "gradient_accumulation_steps": work.accumulation,
        "max_steps": 1 + work.steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "tensor-model-parallel-size": work.tensor_parallel,
        "dataloader_num_workers": 1,
        "report_to": "none",
        "save_strategy": "no",
        "seed": seed,
        "output_dir": output,
    }
    if packing != PADDED:
        flags["seq-length"] = work.seq_length
    if work.tensor_parallel > 1:
        flags["sequence-parallel"] = True
    return [*launcher, "-m", "dc_megatron.pretrain", *(f"--{name}={value}" for name, value in flags.items())]


def run_sums(lines: list[dict]) -> dict[str, float]:
    """Sums over the measured steps of a run: all of its metrics.jsonl but the first, in which everything is built."""
    return {"steps": len(lines) - 1} | {name: sum(line[name] for line in lines[1:]) for name in _SUMMED}


def benchmark_packed_training(
    folder: str, work: Workload, rounds: int = 3, report: Callable[[str], None] = lambda line: None
) -> dict:
    """Run the whole benchmark below ``folder``; returns the result as plain values (see benchmarks/README.md).

    ``report`` is told about every run as it ends. UserError: sizes that make no benchmark, a run that fails.
    """
    if min(rounds, *asdict(work).values()) < 1:
        raise UserError("packed-training: all sizes are whole numbers above 0")
    os.makedirs(folder, exist_ok=True)
    facts = machine.describe(folder)
    runs: dict[str, list[dict]] = {PACKED: [], PADDED: []}
    commands = {}
    with tempfile.TemporaryDirectory(prefix="dc-benchmark-packed-", dir=os.path.abspath(folder)) as scratch:
        packed_material.make_material(scratch, work.samples, work.scale)
        for number in range(rounds):
            for packing in (PACKED, PADDED) if number % 2 else (PADDED, PACKED):
                output = os.path.join(scratch, f"{packing}-{number}")
                # Every round trains on the samples in another order.
                command = training_command(work, packing, scratch, output, seed=1 + number)
                commands[packing] = _readable(command, scratch)
                measured = measure(command, env=_environment(work))
                sums = _read_sums(output, work, measured)
                runs[packing].append(sums | {"peak_resident_gb": measured.peak_resident / 1e9})
                report(f"round {number + 1} of {rounds}, {packing}: {_in_words(runs[packing][-1])}")
    done = {packing: summary(of) | {"command": commands[packing]} for packing, of in runs.items()}
    return {
        "benchmark": "packed-training",
        **facts,
        "workload": _described(work),
        "rounds": rounds,
        "packing": done,
        "packed_over_padded": compared(runs),
    }


def summary(runs: list[dict]) -> dict:
    """Rates over all measured steps of all runs of one kind, and every run's samples a second."""
    total = {name: sum(run[name] for run in runs) for name in ("steps", *_SUMMED)}
    seconds = total["step_seconds"]
    return {
        "samples_per_second": total["samples"] / seconds,
        "positions_per_second": total["positions"] / seconds,
        "fill": total["tokens"] / total["positions"],
        "samples_a_step": total["samples"] / total["steps"],
        "tokens_per_sample": total["tokens"] / total["samples"],
        "data_wait_share": total["data_wait_seconds"] / seconds,
        "peak_resident_gb": max(run["peak_resident_gb"] for run in runs),
        "samples": [run["samples"] for run in runs],
        "seconds": [run["step_seconds"] for run in runs],
    }


def compared(runs: Mapping[str, list[dict]]) -> dict:
    """Packed over padded: the median of the rounds' ratios of samples a second, what it comes from, and its limit.

    A ratio is the padded run's positions a sample over the packed one's, times the packed one's positions a second over
    the padded one's.
    """
    pairs = list(zip(runs[PACKED], runs[PADDED], strict=True))

    def ratios(count: str, per: str) -> list[float]:
        return [packed[count] / packed[per] / (padded[count] / padded[per]) for packed, padded in pairs]

    in_samples = ratios("samples", "step_seconds")
    ratio = statistics.median(in_samples)
    return {
        "samples_per_second": ratio,
        "of_each_round": in_samples,
        "fewer_positions_per_sample": statistics.median(1 / each for each in ratios("positions", "samples")),
        "more_positions_per_second": statistics.median(ratios("positions", "step_seconds")),
        "at_least": LIMIT,
        "holds": ratio >= LIMIT,
    }


def _environment(work: Workload) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCH}
    path = os.pathsep.join(filter(None, (machine.ROOT, kept.get("PYTHONPATH"))))
    return {"OMP_NUM_THREADS": str(_threads(work)), **kept, "DC_DEVICE": "cpu", "PYTHONPATH": path}


def _threads(work: Workload) -> int:
    """Of a process: its share of the cores."""
    return max(1, len(os.sched_getaffinity(0)) // work.tensor_parallel)


def _described(work: Workload) -> dict:
    lengths, tiles = packed_material.lengths_of(work.samples, work.scale, seed=0)
    return {
        **asdict(work),
        "samples_a_step": work.per_device * work.accumulation * work.tensor_parallel,
        "threads_of_a_process": int(_environment(work)["OMP_NUM_THREADS"]),
        "language_model": packed_material.SHAPE | {"vocab_size": packed_material.VOCABULARY},
        "mean_length": float(lengths.mean()),
        "longest": int(lengths.max()),
        "with_picture": float((tiles > 0).mean()),
    }


def _read_sums(output: str, work: Workload, measured: Measurement) -> dict[str, float]:
    with open(os.path.join(output, "metrics.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    if len(lines) != 1 + work.steps:
        raise UserError(f"a run of {1 + work.steps} steps logged {len(lines)}\n{measured.output[-4000:]}")
    return run_sums(lines)


def _readable(command: list[str], scratch: str) -> str:
    """A run's command without the paths of this machine."""
    shown = ["python" if word == sys.executable else word.replace(scratch, "FOLDER") for word in command]
    return " ".join(shown)


def _in_words(run: dict) -> str:
    rate, fill = run["samples"] / run["step_seconds"], run["tokens"] / run["positions"]
    return (
        f"{rate:.2f} samples a second, fill {100 * fill:.1f} %, {run['samples']} samples in {run['step_seconds']:.1f} s"
    )


def as_text(result: dict) -> str:
    """The result as a table and the limit, for people."""
    work, ratio = result["workload"], result["packed_over_padded"]
    lines = [
        f"{work['samples_a_step']} samples a step, {work['mean_length']:.0f} positions on average,"
        f" {work['tensor_parallel']} processes of {work['threads_of_a_process']} threads,"
        f" {result['rounds']} rounds of {work['steps']} steps",
        "",
        "packing      samples/s   positions/s    fill   samples/step   tokens/sample   peak GB   seconds of the rounds",
    ]
    for name, of in result["packing"].items():
        lines.append(
            f"{name:10}{of['samples_per_second']:12.2f}{of['positions_per_second']:14.0f}{100 * of['fill']:7.1f}%"
            f"{of['samples_a_step']:15.1f}{of['tokens_per_sample']:16.0f}{of['peak_resident_gb']:10.2f}   "
            + " ".join(f"{seconds:.1f}" for seconds in of["seconds"])
        )
    each = " ".join(f"{one:.2f}" for one in ratio["of_each_round"])
    return "\n".join(
        [
            *lines,
            "",
            f"{'holds' if ratio['holds'] else 'FAILS'}: samples a second, packed / padded:"
            f" {ratio['samples_per_second']:.2f} (at least {ratio['at_least']}; rounds {each}), of which"
            f" {ratio['fewer_positions_per_sample']:.2f} by fewer positions a sample and"
            f" {ratio['more_positions_per_second']:.2f} by more positions a second",
        ]
    )
