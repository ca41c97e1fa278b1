"""``python -m dc_megatron.training.check_argv FLAGS``: would this run start? Answers in a tenth of a second.

The launchers call it once before they start WORLD_SIZE processes, each of which would have to say what is wrong. With
DC_PRINT_ARGV=1 in the environment it looks at no file, and prints the flags, each as it counts in the end, and what
Megatron's parser gets of them.
"""

from __future__ import annotations

import os
import sys

from dc_megatron.errors import UserError
from dc_megatron.training.argv import REQUIRED_FOR_TRAINING, translate
from dc_megatron.training.flag_help import requested_help
from dc_megatron.training.printed_argv import described
from dc_megatron.training.run import check


def main(argv: list[str]) -> int:
    page = requested_help(argv)
    if page is not None:
        print(page)
        return 0
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        if os.environ.get("DC_PRINT_ARGV") == "1":
            print(described(translate(argv, required=REQUIRED_FOR_TRAINING), argv, processes))
        else:
            check(argv, processes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
