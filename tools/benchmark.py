#!/usr/bin/env python
"""Measures this program on this machine: one sub-command a benchmark, see benchmarks/README.md."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

EXAMPLE = """\
examples:
  python tools/benchmark.py conversion --shape 7b --folder scratch --output benchmarks/results/conversion_7b.json
  python tools/benchmark.py conversion --shape 70b --layers 8 --sparse --folder scratch
  python tools/benchmark.py direct-load --shape 7b --folder scratch --tensor-parallel 2
  python tools/benchmark.py packing --output benchmarks/results/packing.json
  python tools/benchmark.py index --folder scratch --output benchmarks/results/index.json
  python tools/benchmark.py packed-training --folder scratch --output benchmarks/results/packed_training.json
  python tools/benchmark.py decode --output benchmarks/results/decode.json
  python tools/benchmark.py pixels --output benchmarks/results/pixels.json
  python tools/benchmark.py cpu-small --output benchmarks/results/cpu-small.json
  python tools/benchmark.py 7b-stage2 --baseline hf,text-only,ours-fp8 --set steps=5 --profile profiles
  python tools/benchmark.py conversion --help
"""
WORKLOADS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "benchmarks", "workloads")


def run_conversion(options: argparse.Namespace) -> tuple[dict, str]:
    from dc_megatron.benchmark.conversion import as_text, benchmark_conversion

    result = benchmark_conversion(
        options.shape,
        options.folder,
        runs=options.runs,
        layers=options.layers,
        sparse=options.sparse,
        verify="verify" in options.include,
        keep=options.keep,
        whole_cache=options.page_cache == "all",
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return result, as_text(result)


def run_direct_load(options: argparse.Namespace) -> tuple[dict, str]:
    from dc_megatron.benchmark.direct_load import as_text, benchmark_direct_load

    result = benchmark_direct_load(
        options.shape,
        options.folder,
        options.tensor_parallel,
        layers=options.layers,
        keep=options.keep,
        whole_cache=options.page_cache == "all",
    )
    return result, as_text(result)


def run_packing(options: argparse.Namespace) -> tuple[dict, str]:
    from dc_megatron.benchmark.packing import as_text, benchmark_packing

    result = benchmark_packing(options.samples, options.stage, tuple(options.seq_lengths))
    return result, as_text(result)


def run_packed_training(options: argparse.Namespace) -> tuple[dict, str]:
    from dc_megatron.benchmark.packed_training import Workload, as_text, benchmark_packed_training

    workload = Workload(
        per_device=options.per_device,
        accumulation=options.accumulation,
        steps=options.steps,
        tensor_parallel=options.tensor_parallel,
        seq_length=options.seq_length,
        samples=options.samples,
        scale=options.scale,
    )
    show = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    result = benchmark_packed_training(options.folder, workload, options.rounds, show)
    return result, as_text(result)


def run_index(options: argparse.Namespace) -> tuple[dict, str]:
    from dc_megatron.benchmark.data_index import as_text, benchmark_index

    result = benchmark_index(options.samples, options.folder, tuple(options.workers), options.memory_samples)
    return result, as_text(result)


def run_decode(options: argparse.Namespace) -> tuple[dict, str]:
    from dc_megatron.benchmark.decode import as_text, benchmark_decode

    show = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    result = benchmark_decode(options.pictures, options.rounds, options.threads, show)
    return result, as_text(result)


def run_pixels(options: argparse.Namespace) -> tuple[dict, str]:
    from dc_megatron.benchmark.pixels import as_text, benchmark_pixels

    result = benchmark_pixels(options.pictures, options.seed, options.device)
    return result, as_text(result)


def run_steps(options: argparse.Namespace) -> tuple[dict, str]:
    from dc_megatron.benchmark.step_speed import benchmark_steps
    from dc_megatron.benchmark.step_text import as_text, read_settings

    names = None if options.baseline is None else [name for name in options.baseline.split(",") if name]
    profiled = {}
    if options.profile:
        os.makedirs(options.profile, exist_ok=True)
        profiled = {
            name: os.path.join(options.profile, f"{options.benchmark}-{name}-kernels.txt")
            for name in options.profiled.split(",")
        }
    show = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    result = benchmark_steps(options.benchmark, names, read_settings(options.set), profiled, show)
    return result, as_text(result)


def run_head_memory(options: argparse.Namespace) -> tuple[dict, str]:
    from dc_megatron.benchmark.head_memory import as_text, benchmark_head_memory

    result = benchmark_head_memory(options.vocabulary, options.positions, options.supervised, dtype=options.dtype)
    return result, as_text(result)


def add_head_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocabulary", type=int, default=128_256, metavar="N", help="default: 128256")
    parser.add_argument("--positions", type=int, default=8192, metavar="N", help="default: 8192")
    parser.add_argument("--supervised", type=float, default=0.15, metavar="SHARE", help="default: 0.15")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: bfloat16")


def add_steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--baseline", metavar="NAME,...", help="measured beside ours (default: the workload's); '' for none"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replaces a value of the workload's file"
    )
    parser.add_argument("--profile", metavar="DIR", help="write the most costly kernels of a step there")
    parser.add_argument(
        "--profiled", default="ours,ours-fp8", metavar="NAME,...", help="of which (default: ours,ours-fp8)"
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", required=True, metavar="NAME", help="7b, 70b or tiny")
    parser.add_argument("--folder", required=True, metavar="DIR", help="on the disk to measure")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the real model has")
    parser.add_argument("--keep", action="store_true", help="leave the source there for the next benchmark")
    parser.add_argument(
        "--page-cache",
        choices=["all", "files"],
        default="all",
        help="what is emptied before each step: the machine's cache (root only; default), or the files' part",
    )


def add_conversion(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument("--sparse", action="store_true", help="a source without content; no baseline, memory only")
    parser.add_argument("--include", action="append", default=[], choices=["verify"], help="a further step")


def add_direct_load(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--tensor-parallel", type=int, default=2, metavar="N", help="ranks (default: 2)")


def add_packing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=665_000, metavar="N", help="of an epoch (default: 665000)")
    parser.add_argument("--stage", type=int, choices=[1, 2], default=2, help="whose lengths are drawn (default: 2)")
    parser.add_argument(
        "--seq-lengths", type=int, nargs="+", default=[2048, 4096, 8192], metavar="N", help="default: 2048 4096 8192"
    )


def add_packed_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", required=True, metavar="DIR", help="where models, data and runs are made")
    sizes = {
        "rounds": (3, "runs of each kind, in turn"),
        "steps": (3, "measured in every run, after the first"),
        "per-device": (16, "LLaVA's samples of a process, and rows of a padded micro-batch"),
        "accumulation": (2, "LLaVA's gradient accumulation steps"),
        "tensor-parallel": (1, "processes"),
        "seq-length": (5120, "positions of a packed row"),
        "samples": (1000, "records of the data"),
        "scale": (1, "divides all lengths: 1, 4 or 16"),
    }
    for name, (default, what) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")


def add_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=100_000, metavar="N", help="records (default: 100000)")
    parser.add_argument("--folder", metavar="DIR", help="where the data lies meanwhile (default: a temporary one)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument(
        "--memory-samples",
        type=int,
        default=20_000,
        metavar="N",
        help="memory is compared between N texts and ten times as many (default: 20000)",
    )


def add_decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=256, metavar="N", help="in a round (default: 256)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of each contender (default: 2)")


def add_pixels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=500, metavar="N", help="default: 500")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the pictures (default: 1)")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="where DALI decodes (default: cpu)")


# name -> (what it measures, its flags, its function)
BENCHMARKS = {
    "conversion": ("import and export of a checkpoint against cp and sync", add_conversion, run_conversion),
    "packing": ("fill, balance, time and memory of the plan of an epoch", add_packing, run_packing),
    "packed-training": (
        "samples a second of training on packed rows against padded rows",
        add_packed_training,
        run_packed_training,
    ),
    "decode": ("pictures a second, decoded and preprocessed, against transformers", add_decode, run_decode),
    "pixels": ("differences between pixels from DALI and from PIL", add_pixels, run_pixels),
    "index": ("speed and memory of the data index", add_index, run_index),
    "head-memory": ("peak memory of the head against Megatron's", add_head_memory, run_head_memory),
    "direct-load": ("bytes that a rank reads of a Hugging Face folder", add_direct_load, run_direct_load),
}


def workloads() -> list[str]:
    """Names of the workloads of training steps: each is a benchmark of its own."""
    return sorted(name.removesuffix(".json") for name in os.listdir(WORKLOADS) if name.endswith(".json"))


def parse(argv: list[str]) -> argparse.Namespace:
    look = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, **look)
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    steps = {name: (f"training steps of workload {name}", add_steps, run_steps) for name in workloads()}
    for name, (what, add_flags, function) in {**BENCHMARKS, **steps}.items():
        command = commands.add_parser(name, help=what, description=what, epilog=EXAMPLE, **look)
        add_flags(command)
        command.set_defaults(function=function)
        command.add_argument("--output", default="", metavar="FILE", help="write the result there as JSON, too")
        command.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser.parse_args(argv)


def _refuse_unwritable(output: str) -> None:
    """Minutes of measuring are not to end in an error of a mistyped path."""
    from dc_megatron.errors import UserError

    folder = os.path.dirname(os.path.abspath(output))
    if output and not os.access(folder, os.W_OK):
        raise UserError(f"--output {output}: no folder {folder} that can be written to")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    from dc_megatron.errors import UserError

    try:
        _refuse_unwritable(options.output)
        result, text = options.function(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {"command": shlex.join(["python", "tools/benchmark.py", *argv]), **result}
    content = json.dumps(result, indent=2)
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            file.write(content + "\n")
    print(content if options.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
