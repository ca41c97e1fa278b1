#!/usr/bin/env python
"""Runs a benchmark's question file; answers in the layouts of the original's scripts, and metrics without a judge."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

EXAMPLE = """\
examples:
  python tools/evaluate.py --benchmark textvqa --load runs/stage2 --output_dir results/textvqa \\
    --question_file llava_textvqa_val_v051_ocr.jsonl --image_folder train_images --annotations TextVQA_0.5.1_val.json
  torchrun --nproc-per-node 8 tools/evaluate.py --tensor-model-parallel-size 2 --benchmark mmbench --load runs/stage2 \\
    --question_file mmbench_dev_20230712.tsv --output_dir results/mmbench

A run that was stopped goes on when it is started again with the same --output_dir, on any number of processes.
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    from dc_megatron.evaluation.benchmarks import BENCHMARKS
    from dc_megatron.inference.flags import add_flag, add_model_flags

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--benchmark", required=True, choices=tuple(BENCHMARKS), help="other: answers and no metric")
    add_flag(parser, "question_file", required=True, metavar="FILE", help="LLaVA's .jsonl, a .json, MMBench's .tsv")
    add_flag(parser, "image_folder", default="", metavar="DIR", help="where its pictures lie")
    add_flag(
        parser, "image_name", default="", metavar="FORM", help="for records with an image_id: '{image_id:012}.jpg'"
    )
    parser.add_argument(
        "--annotations", default="", metavar="PATH", help="what is right; without it nothing is counted"
    )
    parser.add_argument("--split", default="test", metavar="NAME", help="sqa: of pid_splits.json (default: test)")
    add_flag(parser, "all_rounds", action="store_true", help="mmbench: ask once for each option, options moved up")
    add_flag(parser, "output_dir", required=True, metavar="DIR", help="answers and metrics; one folder for all nodes")
    parser.add_argument("--restart", action="store_true", help="throw away what an earlier run left in --output_dir")
    add_flag(parser, "max_new_tokens", type=int, metavar="N", help="default: 128; 1024 for mmvet and other")
    add_flag(parser, "batch_size", type=int, default=16, metavar="N", help="questions asked at once (default: 16)")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    add_model_flags(parser)
    options = parser.parse_args(argv)
    for flag in ("batch_size", "max_new_tokens"):
        if getattr(options, flag) is not None and getattr(options, flag) < 1:
            parser.error(f"--{flag} {getattr(options, flag)}: at least 1")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    from dc_megatron.errors import UserError

    is_first = int(os.environ.get("RANK", "0")) == 0
    try:
        from dc_megatron.evaluation.run_benchmark import Request, run_benchmark
        from dc_megatron.inference.flags import source_of
        from dc_megatron.reports.benchmark_text import summary_lines
        from dc_megatron.reports.progress_line import ProgressLine

        request = Request(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Request)})
        line = ProgressLine()
        summary = run_benchmark(source_of(options), request, line if is_first else None)
        line.finish()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if is_first:
        print(json.dumps(summary) if options.json else "\n".join(summary_lines(summary)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
