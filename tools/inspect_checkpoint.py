#!/usr/bin/env python
"""What a checkpoint, export, model folder or projector holds, whether it is complete and whether it is undamaged."""

from __future__ import annotations

import argparse
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

EXAMPLE = """\
examples:
  python tools/inspect_checkpoint.py runs/stage2
  python tools/inspect_checkpoint.py runs/stage2 --check          # read every file and compare its hash
  python tools/inspect_checkpoint.py runs/stage2/iter_0000500 --tensors
  python tools/inspect_checkpoint.py my-export --check --json

exit status: 0 nothing is wrong, 1 damaged or incomplete, 2 nothing that is known here
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", metavar="DIR", help="folder, or mm_projector file")
    parser.add_argument("--check", action="store_true", help="read every file and compare its hash")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with shape and dtype")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    from dc_megatron.errors import UserError

    try:
        from dc_megatron.reports.checkpoint_report import examine
        from dc_megatron.reports.checkpoint_text import as_text
        from dc_megatron.weights.progress import Progress

        bars = []

        def progress(total: int):
            if not sys.stderr.isatty():
                return None
            bars.append(Progress("check", total))
            return bars[-1]

        report = examine(options.path, check=options.check, progress=progress)
        for bar in bars:
            bar.finish()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        shown = report if options.tensors else {name: report[name] for name in report if name != "tensors"}
        print(json.dumps(shown, indent=1))
    else:
        print(as_text(report, options.tensors))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
