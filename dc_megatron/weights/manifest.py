"""``dc_manifest.json``: every file of a checkpoint or an export with size and hash, and a hash of the manifest itself.

It is written last, so a folder that has one was written to its end. Sizes are compared whenever a folder is used; that
costs nothing. Hashes are compared on export, on demand and, by flag, on resume.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import xxhash

from dc_megatron.weights.durable_files import Digest, hash_file, write_file

MANIFEST = "dc_manifest.json"
_OWN_HASH = "manifest_xxh3_64"


@dataclass(frozen=True)
class Manifest:
    """``content``: what the writer said about the folder. ``files``: relative path -> Digest."""

    content: dict
    files: dict[str, Digest]


def manifest_bytes(content: Mapping, files: Mapping[str, Digest]) -> bytes:
    """The one way to write this content: a changed byte anywhere can be told."""
    assert not {"files", _OWN_HASH} & set(content), "these two names are the manifest's own"
    listed = {name: {"size": files[name].size, "xxh3_64": files[name].xxh3_64} for name in sorted(files)}
    text = json.dumps({**content, "files": listed}, indent=1)
    own = xxhash.xxh3_64_hexdigest(text.encode())
    return (text[: -len("\n}")] + f',\n "{_OWN_HASH}": "{own}"\n}}\n').encode()


def write_manifest(folder: str, content: Mapping, files: Mapping[str, Digest]) -> None:
    """Declare ``folder`` complete. Call it when all else is on disk."""
    write_file(os.path.join(folder, MANIFEST), manifest_bytes(content, files))


def read_manifest(folder: str) -> tuple[Manifest | None, str]:
    """(manifest, "") of a complete folder, else (None, what is wrong with which file).

    Every file that it lists must be there with its size. Others do not matter: file managers, network disks and
    copying programs leave theirs.
    """
    try:
        with open(os.path.join(folder, MANIFEST), "rb") as file:
            data = file.read()
    except OSError as error:
        return None, f"{MANIFEST} is missing or cannot be read ({error.strerror}): not written to its end"
    manifest = _parse(data)
    if manifest is None:
        return None, f"{MANIFEST} is damaged"
    for name, digest in manifest.files.items():
        try:
            size = os.path.getsize(os.path.join(folder, name))
        except OSError:
            return None, f"{name} is missing"
        if size != digest.size:
            return None, f"{name} has {size} bytes instead of {digest.size}"
    return manifest, ""


def _parse(data: bytes) -> Manifest | None:
    try:
        content = json.loads(data)
        own = content.pop(_OWN_HASH)
        files = {name: Digest(entry["size"], entry["xxh3_64"]) for name, entry in content.pop("files").items()}
        if not all(_is_inside(name) and type(digest.size) is int for name, digest in files.items()):
            return None
        # Bytes, not meaning: a blank that became a tab is damage as well.
        return Manifest(content, files) if own and manifest_bytes(content, files) == data else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_inside(name: str) -> bool:
    """Whether ``name`` can only mean a file below the folder that the manifest lies in."""
    return bool(name) and not os.path.isabs(name) and ".." not in name.split("/") and "\0" not in name


def damaged_files(
    folder: str, manifest: Manifest, names: list[str] | None = None, progress: Callable[[int], object] | None = None
) -> list[str]:
    """What of ``names`` (default: all) is not as the manifest says, read byte by byte: one line a file, with its name.

    ``progress`` is told the bytes of each block that was read.
    """
    found = []
    for name in sorted(manifest.files) if names is None else names:
        expected = manifest.files[name]
        try:
            digest = hash_file(os.path.join(folder, name), progress)
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
            continue
        if digest.size != expected.size:
            found.append(f"{name} has {digest.size} bytes instead of {expected.size}")
        elif digest != expected:
            found.append(f"{name} is damaged: its bytes are not those that were written (xxh3 {digest.xxh3_64})")
    return found
