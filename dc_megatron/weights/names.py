"""Compare the names and shapes of a folder with those its configuration asks for."""

from __future__ import annotations

from collections.abc import Iterable

from dc_megatron.errors import UserError

_SHOWN = 8


def refuse_wrong_names(what: str, missing: Iterable[str], unknown: Iterable[str], advice: str) -> None:
    """UserError that lists the first names of each kind and counts the rest; nothing where both are empty."""
    faults = []
    for kind, names in (("missing", sorted(missing)), ("not known here", sorted(unknown))):
        if names:
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            faults.append(f"{len(names)} weights {kind}: {shown}")
    if faults:
        raise UserError(f"{what}: {'; '.join(faults)}. {advice}")


def refuse_wrong_shape(what: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """UserError with both shapes where they differ."""
    if tuple(found) != tuple(expected):
        raise UserError(
            f"{what}: {name} has shape {list(found)}, but config.json asks for {list(expected)}: configuration and"
            " weights are of different models"
        )
