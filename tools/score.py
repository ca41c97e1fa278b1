#!/usr/bin/env python
"""Per-sample loss and token counts of a data set under a model; JSON lines, then a total."""

from __future__ import annotations

import argparse
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

EXAMPLE = """\
examples:
  python tools/score.py --load runs/quickstart/stage2 --data_path held_out.json --image_folder images
  torchrun --nproc-per-node 2 tools/score.py --tensor-model-parallel-size 2 --load runs/stage2 \\
    --data_path mix665k.json --image_folder images --output scores.jsonl
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    from dc_megatron.inference.flags import add_flag, add_model_flags

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_flag(parser, "data_path", required=True, metavar="FILE", help="LLaVA JSON or JSON lines")
    add_flag(parser, "image_folder", default="", metavar="DIR", help="where its pictures lie")
    add_flag(parser, "model_max_length", type=int, metavar="N", help="default: the checkpoint's, else 2048")
    add_flag(parser, "max_bad_sample_rate", type=float, default=0.001, metavar="RATE", help="default: 0.001")
    add_flag(parser, "batch_size", type=int, default=8, metavar="N", help="samples at once (default: 8)")
    parser.add_argument("--output", default="", metavar="FILE", help="write there instead of printing")
    parser.add_argument("--json", action="store_true", help="print the total only, as one JSON object")
    add_model_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    from dc_megatron.errors import UserError

    try:
        from dc_megatron.inference.flags import source_of
        from dc_megatron.inference.score import score_file

        entries, total = score_file(
            source_of(options),
            options.data_path,
            options.image_folder,
            model_max_length=options.model_max_length,
            max_bad_sample_rate=options.max_bad_sample_rate,
            image_backend=options.image_backend,
            rows=options.batch_size,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if int(os.environ.get("RANK", "0")):
        return 0
    out = open(options.output, "w", encoding="utf-8") if options.output else sys.stdout  # noqa: SIM115
    if options.output or not options.json:
        for entry in [*entries, total]:
            print(json.dumps(entry), file=out)
    if options.output or options.json:
        print(json.dumps(total))
    return 0


if __name__ == "__main__":
    sys.exit(main())
