#!/usr/bin/env python
"""What is installed, which backends a run would use on this machine, and why."""

from __future__ import annotations

import argparse
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

EXAMPLE = """\
examples:
  python tools/doctor.py
  python tools/doctor.py --json
  DC_DEVICE=cpu python tools/doctor.py      # what a run without the GPU would use
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)

    from dc_megatron.reports.doctor import as_text, examine
    from dc_megatron.training.arguments import backend_argv

    report = examine()
    report["engine_flags"] = backend_argv(
        cuda=report["machine"]["cuda"],
        transformer_engine=report["backends"]["layers"]["choice"] == "transformer_engine",
        apex=report["optional"]["apex"]["error"] is None,
    )
    print(json.dumps(report, indent=2) if options.json else as_text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
