"""LLaVA data files: a JSON list of records, or JSON Lines with one record a line."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from dc_megatron.data.faults import RecordFault
from dc_megatron.errors import UserError


@dataclass(frozen=True)
class Record:
    """One conversation as read; images: file names as written in the record, messages: its ``conversations``."""

    identifier: str
    images: tuple[str, ...]
    messages: list


def read_records(path: str, flag: str = "--data_path") -> list:
    """All records of a file, unchecked (see parse_record).

    Raises UserError that names file and line where the file is not valid JSON, and where it holds no record.
    """
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: no such file")
    with open(path, "rb") as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{flag} {path}: line {line}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    records = _read_list(text, path, flag) if text.lstrip()[:1] == "[" else _read_lines(text, path, flag)
    if not records:
        raise UserError(f"{flag} {path}: holds no record; give a LLaVA JSON list or JSON Lines")
    return records


def parse_record(record, index: int) -> Record:
    """Check the outer shape of one record; raises RecordFault. ``image`` is absent, null, a name or a list of names."""
    if not isinstance(record, dict):
        raise RecordFault(RecordFault.STRUCTURE, f"the record is a {type(record).__name__}, not an object")
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise RecordFault(RecordFault.STRUCTURE, "conversations is not a list with messages in it")
    images = record.get("image")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise RecordFault(RecordFault.STRUCTURE, "image is neither a file name nor a list of file names")
    return Record(str(record.get("id", index)), tuple(images), messages)


def _read_list(text: str, path: str, flag: str) -> list:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{flag} {path}: {_place(error)}: not valid JSON: {error.msg}") from None


def _read_lines(text: str, path: str, flag: str) -> list:
    records = []
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{flag} {path}: line {number}, column {error.colno}: not valid JSON: {error.msg}"
            ) from None
    return records


def _place(error: json.JSONDecodeError) -> str:
    return f"line {error.lineno}, column {error.colno}"
