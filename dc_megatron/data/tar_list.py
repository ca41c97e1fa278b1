"""The list of all members of tar shards, sorted by name: made by one scan, kept as an Arrow file, mapped into memory.

Some tens of bytes a member, so that a million and a half of them cost no process much.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from dc_megatron.data.tar_members import DamagedTar, scan
from dc_megatron.errors import UserError

logger = logging.getLogger(__name__)

# Changes with what is listed, or how; older lists are then not used.
LIST_VERSION = 1
SCHEMA = pa.schema([("name", pa.large_binary()), ("shard", pa.int32()), ("offset", pa.int64()), ("size", pa.int64())])
# Several shards are scanned at once: what takes time is waiting for the disk or the store.
SCANNERS = 8
# What stores tell of a file that changes when the file does.
_STAMPS = ("mtime", "ETag", "etag", "LastModified", "last_modified", "md5Hash", "updated", "created")


class ShardFiles(Protocol):
    def facts(self, path: str) -> dict: ...

    def reader(self, path: str, size: int) -> BinaryIO: ...


def member_list(files: ShardFiles, shards: Sequence[str], cache: str | None, location: str) -> pa.Table:
    """Name, number of the shard, first byte and size of every member, sorted by name and then by shard.

    cache: a folder that keeps it, under a name made of the shards' names, sizes and times; None: in memory only. Warns
    about damaged shards and repeated names. UserError: a shard is missing, unreadable or no tar.
    """
    with ThreadPoolExecutor(SCANNERS) as pool:
        facts = list(pool.map(lambda path: _facts(files, path, location), shards))
        path = _cache_path(cache, shards, facts) if cache else None
        if path and os.path.exists(path):
            return _mapped(path)
        numbers, sizes = range(len(shards)), [one["size"] for one in facts]
        pieces = list(pool.map(lambda *shard: _scanned(files, *shard, location), numbers, shards, sizes))
    table = pa.concat_tables(pieces).sort_by([(name, "ascending") for name in ("name", "shard", "offset")])
    table = table.combine_chunks()
    _warn_of_repeats(table["name"], location)
    if not path:
        return table
    _write(table, path)
    return _mapped(path)


def _facts(files: ShardFiles, path: str, location: str) -> dict:
    """Size in bytes and stamps of a shard."""
    try:
        facts = files.facts(path)
    except FileNotFoundError:
        raise UserError(f"--image_folder {location}: there is no {path}") from None
    except OSError as error:
        raise UserError(f"--image_folder {location}: {path} cannot be read: {error}") from None
    return {"size": int(facts["size"]), **{key: str(facts[key]) for key in _STAMPS if key in facts}}


def _scanned(files: ShardFiles, number: int, path: str, size: int, location: str) -> pa.Table:
    """The files of shard ``number``; links stand for what they mean. Damage behind the first file is warned about."""
    places: dict[bytes, tuple[int, int]] = {}
    rows: list[tuple[bytes, int, int]] = []
    dangling = 0
    damage = ""
    try:
        with files.reader(path, size) as file:
            for member in scan(file, size):
                place = (member.offset, member.size) if member.target is None else places.get(member.target)
                if place is None:
                    dangling += 1
                    continue
                places.setdefault(member.name, place)
                rows.append((member.name, *place))
    except DamagedTar as error:
        damage = str(error)
    except OSError as error:
        raise UserError(f"--image_folder {location}: {path} cannot be read: {error}") from None
    if damage and not rows:
        raise UserError(f"--image_folder {location}: {path} is no uncompressed tar: {damage}")
    if damage:
        logger.warning("%s is damaged: %s; the %d files before that are used, copy it anew", path, damage, len(rows))
    if dangling:
        logger.warning("%s: %d links lead to no file before them and are left out", path, dangling)
    names, offsets, sizes = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table([names, [number] * len(rows), offsets, sizes], schema=SCHEMA)


def _warn_of_repeats(names: pa.ChunkedArray, location: str) -> None:
    repeats = pc.sum(pc.equal(names[1:], names[:-1])).as_py() if len(names) > 1 else 0
    if repeats:
        logger.warning(
            "%s: %d files have the name of an earlier one; the name alone means the first, shard/name another",
            *(location, repeats),
        )


def _cache_path(cache: str, shards: Sequence[str], facts: list[dict]) -> str:
    key = hashlib.sha256(json.dumps([LIST_VERSION, list(zip(shards, facts, strict=True))]).encode())
    return os.path.join(cache, f"tar-members-{key.hexdigest()[:20]}.arrow")


def _write(table: pa.Table, path: str) -> None:
    """To a name of its own first: several processes may do this at once, and one may be killed."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".tar-members-")
    try:
        with os.fdopen(handle, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def _mapped(path: str) -> pa.Table:
    with pa.memory_map(path) as file:
        return pa.ipc.open_file(file).read_all()
