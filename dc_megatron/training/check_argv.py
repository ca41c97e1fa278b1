"""``python -m dc_megatron.training.check_argv FLAGS``: would this run start? Answers in a tenth of a second.

The launchers call it once before they start WORLD_SIZE processes, each of which would have to say what is wrong. With
DC_PRINT_ARGV=1 in the environment it looks at no file, and prints the flags, each as it counts in the end, and what
Megatron's parser gets of them.
"""

from __future__ import annotations

import os
import shlex
import sys

from dc_megatron.errors import UserError
from dc_megatron.training.argv import REQUIRED_FOR_TRAINING, Translation, translate
from dc_megatron.training.flag_help import requested_help
from dc_megatron.training.flag_table import flags_by_key
from dc_megatron.training.run import check


def _described(translation: Translation) -> str:
    settings = translation.settings
    lines = ["# flags of the run"]
    for name in settings.given:
        value = getattr(settings, name)
        words = value if flags_by_key()[name].many else [",".join(value) if isinstance(value, tuple) else str(value)]
        lines.append(" ".join([f"--{name}", *map(shlex.quote, words)]))
    lines.append("# for Megatron's parser, before data, model and machine add theirs")
    for word in translation.megatron_argv:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return "\n".join([*lines, *(f"# note: {note}" for note in translation.notes)])


def main(argv: list[str]) -> int:
    page = requested_help(argv)
    if page is not None:
        print(page)
        return 0
    try:
        if os.environ.get("DC_PRINT_ARGV") == "1":
            print(_described(translate(argv, required=REQUIRED_FOR_TRAINING)))
        else:
            check(argv, int(os.environ.get("WORLD_SIZE", "1")))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
