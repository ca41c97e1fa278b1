"""Writes docs/flags.md from the flag table: ``python -m tests.helpers.flag_tables``. A test compares the two."""

from __future__ import annotations

from pathlib import Path

from dc_megatron.training.engine_flags import NEUTRAL, REFUSED
from dc_megatron.training.flag_table import AVAILABLE, FLAGS, NO_MEANING, NOT_YET, Flag

PAGE = Path(__file__).resolve().parents[2] / "docs" / "flags.md"

# Flags that neither LLaVA nor Megatron has.
OURS = (
    *("trainable", "packing", "data-order", "image-backend", "max-bad-sample-rate", "index-folder"),
    *("loss-reduction", "log-images", "verify-checkpoint", "fp8-check-interval"),
    *("recompute", "pipeline-split", "vision-tower-stages", "vision_tower_lr", "dry-run"),
    *("eval_data_path", "eval_image_folder"),
)
# Flags that keep the meaning they have in Megatron, under Megatron's name.
MEGATRONS = (
    *("seq-length", "global-batch-size", "micro-batch-size", "min-lr", "load"),
    *("fp8-format", "fp8-recipe", "eval-iters"),
    *("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size", "sequence-parallel"),
)

_HEAD = """\
# Flags

This page is written by `python -m tests.helpers.flag_tables` from `dc_megatron/training/flag_table.py`; a test compares
the two. `--help` prints the same table, `--help-megatron` the options of Megatron's engine.

How a command line is read:

- Every flag may be written in snake_case or kebab-case, as `--seed 7` or `--seed=7`.
- Switches may carry `True` or `False`: `--bf16 True`, `--bf16 False`, `--bf16`.
- Of a flag given twice the last one counts, whichever of its names was used. So flags at the end override a recipe.
- Abbreviations and unknown flags are refused; the message names the nearest known flag.
- `--data_path` and `--data-path` are ours. Megatron's parser never gets them.
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _values(flag: Flag) -> str:
    if flag.choices:
        return ", ".join(f"`{choice}`" for choice in flag.choices if choice not in flag.refused)
    return {bool: "switch", int: "whole number", float: "number", str: "text"}[flag.type]


def _default(flag: Flag) -> str:
    return "" if flag.default in (None, "", ()) else f"`{flag.default}`"


def _note(flag: Flag) -> str:
    refused = "".join(f"; `{value}`: {why}" for value, why in flag.refused.items())
    return _cell(flag.help + refused)


def _available(flags: list[Flag], two_names: bool = False) -> list[str]:
    column = " Megatron's name |" if two_names else ""
    lines = [f"| flag |{column} values | default | what it does |", "|---|" + "---|" * (4 if two_names else 3)]
    for flag in flags:
        other = flag.engine and flag.engine[2:].replace("-", "_") != flag.key
        engine = (f" `{flag.engine}` |" if other else " |") if two_names else ""
        lines.append(f"| `--{flag.name}` |{engine} {_values(flag)} | {_default(flag)} | {_note(flag)} |")
    return lines


def _others(status: str) -> list[str]:
    accepted = " | accepted value" if status == NOT_YET else ""
    lines = [f"| flag{accepted} | note |", "|---|---|" + ("---|" if accepted else "")]
    for flag in FLAGS:
        if flag.status == status:
            values = ", ".join(f"`{value}`" if value else "empty" for value in flag.neutral)
            lines.append(f"| `--{flag.name}`{f' | {values}' if accepted else ''} | {_cell(flag.help)} |")
    return lines


def _refused() -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        value = f" (but `{NEUTRAL[name]}`)" if name in NEUTRAL else ""
        by_reason.setdefault(reason, []).append(f"`--{name}`{value}")
    rows = [f"| {', '.join(names)} | {_cell(reason)} |" for reason, names in by_reason.items()]
    return ["| option | why |", "|---|---|", *rows]


def page() -> str:
    """The text of docs/flags.md."""
    available = [flag for flag in FLAGS if flag.status == AVAILABLE]
    llava = [flag for flag in available if flag.name not in (*OURS, *MEGATRONS)]
    sections = [
        _HEAD,
        "## LLaVA's names\n",
        "Where a second name stands, it is Megatron's option of the same meaning, and both may be used.\n",
        *_available(llava, two_names=True),
        "\n## Megatron's names that are read here first\n",
        *_available([flag for flag in available if flag.name in MEGATRONS]),
        "\nEvery other option of Megatron goes to its parser as it was typed, except those in the last table, and",
        "shape options that contradict the model's `config.json` (`--num-layers 10` for a model of 32 layers).",
        "\n## New names\n",
        *_available([flag for flag in available if flag.name in OURS]),
        "\n## LLaVA's flags that do nothing here\n",
        "They are accepted, and a note says why nothing happens.\n",
        *_others(NO_MEANING),
        "\n## LLaVA's flags that are not available yet\n",
        "They are refused, except with a value that asks for what happens anyway.\n",
        *_others(NOT_YET),
        "\n## Megatron's options that are refused\n",
        "Megatron's parser would take them, and this program could not honour them.\n",
        *_refused(),
        "",
    ]
    return "\n".join(sections)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
