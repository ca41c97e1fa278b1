"""Writes the frozen list of Megatron's options: ``python -m tests.helpers.freeze_megatron_flags``.

Run it after a change of the megatron-core version and read the difference before committing it.
"""

from __future__ import annotations

import argparse
import enum
from importlib.metadata import version

from dc_megatron.training.engine_flags import FROZEN_LIST


def _choice(value) -> str:
    return value.name if isinstance(value, enum.Enum) else str(value)


def _line(action: argparse.Action) -> str:
    arity = "1" if action.nargs is None else str(action.nargs)
    type_name = action.type.__name__ if action.type in (int, float) else ""
    choices = " ".join(_choice(c) for c in action.choices or ())
    return f"{' '.join(action.option_strings)} | {arity} | {type_name} | {choices}".rstrip()


def frozen_text() -> str:
    """The list as the installed engine would have it. Importing the engine takes seconds."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, add_help=False))
    lines = sorted(_line(action) for action in parser._actions)
    return "\n".join([f"# options of megatron-core {version('megatron-core')}", *lines, ""])


if __name__ == "__main__":
    FROZEN_LIST.write_text(frozen_text(), encoding="utf-8")
    print(FROZEN_LIST)
