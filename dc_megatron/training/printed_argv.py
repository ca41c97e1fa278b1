"""What ``DC_PRINT_ARGV=1`` makes of a command line, as text and back again. No torch."""

from __future__ import annotations

import shlex

from dc_megatron.errors import UserError
from dc_megatron.training.argv import Translation
from dc_megatron.training.flag_table import flags_by_key

_PROCESSES, _WORDS = "# processes: ", "# command line: "


def described(translation: Translation, argv: list[str], processes: int) -> str:
    """Each flag as it counts in the end, what Megatron's parser gets of them, and how many processes there would be.

    argv: the words that ``translation`` was made of.
    """
    settings = translation.settings
    lines = [f"{_PROCESSES}{processes}", f"{_WORDS}{shlex.join(argv)}", "# flags of the run"]
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


def read_printed(text: str) -> tuple[list[str], int]:
    """(words of the command line, processes) of ``described``'s text. UserError where it is none."""
    found = {}
    for line in text.splitlines():
        for start in (_PROCESSES, _WORDS):
            if line.startswith(start):
                found[start] = line.removeprefix(start)
    if len(found) < 2:
        raise UserError(
            "no command line was printed under DC_PRINT_ARGV=1; a recipe ends with launch of examples/launch.sh"
        )
    return shlex.split(found[_WORDS]), int(found[_PROCESSES])
