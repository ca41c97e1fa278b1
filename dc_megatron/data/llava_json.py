"""LLaVA data files: a JSON list of records, or JSON Lines with one record a line."""

from __future__ import annotations

from dataclasses import dataclass

from dc_megatron.data.faults import RecordFault
from dc_megatron.data.json_stream import json_chunks, parse_chunk
from dc_megatron.errors import UserError

_LONGEST_IDENTIFIER = 200


@dataclass(frozen=True)
class Record:
    """One conversation as read; images and videos: names as written in the record, messages: ``conversations``."""

    identifier: str
    images: tuple[str, ...]
    messages: list
    videos: tuple[str, ...] = ()


def read_records(path: str, flag: str = "--data_path") -> list:
    """All records of a file at once, unchecked (see parse_record); for files that are known to be small.

    Raises UserError that names file and line where the file is not valid JSON, and where it holds no record.
    """
    records = [record for chunk in json_chunks(path, flag) for record in parse_chunk(chunk)]
    for number, record in records:
        if isinstance(record, RecordFault):
            raise UserError(f"{flag} {path}: record {number}: {record}")
    return [record for _, record in records]


def parse_record(record, index: int) -> Record:
    """Check the outer shape of one record; raises RecordFault.

    ``image`` and ``video`` are absent, null, a name or a list of names each.
    """
    if isinstance(record, RecordFault):
        raise record
    if not isinstance(record, dict):
        raise RecordFault(RecordFault.STRUCTURE, f"the record is a {type(record).__name__}, not an object")
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise RecordFault(RecordFault.STRUCTURE, "conversations is not a list with messages in it")
    return Record(identifier(record, index), _names(record, "image"), messages, _names(record, "video"))


def identifier(record, index: int) -> str:
    """The record's ``id`` as a short text; its number where it has none, or one that is no name."""
    value = record.get("id") if isinstance(record, dict) else None
    text = str(value if isinstance(value, str | int | float) else index)
    # Half of a surrogate pair is no text that a file could hold.
    return text[:_LONGEST_IDENTIFIER].encode("utf-8", "backslashreplace").decode("utf-8")


def image_names(record) -> tuple[str, ...]:
    """The names in ``image`` of an unchecked record, where there are any."""
    try:
        return _names(record, "image") if isinstance(record, dict) else ()
    except RecordFault:
        return ()


def _names(record: dict, key: str) -> tuple[str, ...]:
    names = record.get(key)
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise RecordFault(RecordFault.STRUCTURE, f"{key} is neither a file name nor a list of file names")
    return tuple(names)
