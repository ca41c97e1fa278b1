"""Annotation files as the benchmarks ship them. No torch."""

from __future__ import annotations

import json

from dc_megatron.errors import UserError


def read_json(path: str):
    """The content of a JSON file; UserError names --annotations."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"--annotations {path}: cannot be read: {error}") from None


def read_json_lines(path: str) -> list[dict]:
    """The objects of a JSON Lines file; UserError names --annotations and the line."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--annotations {path}: cannot be read: {error}") from None
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise UserError(f"--annotations {path}: line {number}: not JSON: {error}") from None
    return entries


def not_those(path: str, what: str) -> UserError:
    """The error for annotations that are not those of the questions."""
    return UserError(f"--annotations {path}: {what}; give the annotations of this question file")
