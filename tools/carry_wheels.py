#!/usr/bin/env python
"""Brings wheels to a machine without a network in pieces that fit its door. Plain Python: runs on both machines.

``split`` writes each wheel whole or in numbered parts, with a list of hashes; ``join`` puts the wheels together again
and checks them. Transformer Engine's library holds its kernels once for each generation of GPUs: ``--gpu-arch 90``
empties the others', which makes 276 MB some 50 MB.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import struct
import sys
import zipfile
import zlib

EXAMPLE = """\
examples:
  python tools/carry_wheels.py split wheels/*.whl --save parts --gpu-arch 90 --part-mib 50
  python tools/carry_wheels.py join parts --save wheels
"""
LIST = "wheels.json"
_MAGIC = struct.pack("<I", 0xBA55ED50)  # of a "fat binary", cuobjdump's name for the copies of a kernel
_ELF = 2  # kind of an entry: machine code of one generation (1 is PTX, which every later one can take)


class CarryError(Exception):
    """What the user can put right."""


def only_arch(library: bytes, arch: int) -> tuple[bytes, int]:
    """``library`` with the machine code of other GPU generations than ``arch`` (90: sm_90) zeroed, and bytes zeroed.

    Places and sizes stay as they were. A fat binary without code for ``arch`` is left alone: the driver may still find
    something in it that runs there.
    """
    thin, zeroed, place = bytearray(library), 0, library.find(_MAGIC)
    while place >= 0:
        end, entries = _entries(library, place)
        if any(kind == _ELF and of == arch for kind, of, _, _ in entries):
            for kind, of, start, size in entries:
                if kind == _ELF and of != arch:
                    thin[start : start + size] = bytes(size)
                    zeroed += size
        place = library.find(_MAGIC, max(end, place + 4))
    return bytes(thin), zeroed


def _entries(library: bytes, place: int) -> tuple[int, list[tuple[int, int, int, int]]]:
    """(end, entries) of the fat binary at ``place``; an entry: kind, arch, start and size of its content.

    The layout as found in libraries of CUDA 13: u32 magic, u16 version, u16 header, u64 size; then entries of u16 kind,
    u16 version, u32 header, u64 size, ..., u32 arch at byte 28. What does not look so is taken for no fat binary.
    """
    if place + 16 > len(library):
        return place, []
    _, _, header, size = struct.unpack_from("<IHHQ", library, place)
    end, at, entries = place + header + size, place + header, []
    if end > len(library) or header < 16:
        return place, []
    while at + 32 <= end:
        kind, _, entry_header, content = struct.unpack_from("<HHIQ", library, at)
        (arch,) = struct.unpack_from("<I", library, at + 28)
        if kind not in (1, 2) or entry_header < 32 or at + entry_header + content > end:
            return place, []
        entries.append((kind, arch, at + entry_header, content))
        at += entry_header + content
    return end, entries


def thin_wheel(source: str, target: str, arch: int) -> int:
    """Write ``source`` to ``target`` with its libraries thinned (``only_arch``) and RECORD to match; bytes zeroed."""
    zeroed, hashes = 0, {}
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for item in sorted(old.infolist(), key=lambda item: item.filename.endswith(".dist-info/RECORD")):
            content = old.read(item)
            if item.filename.endswith(".so"):
                content, count = only_arch(content, arch)
                zeroed += count
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                hashes[item.filename] = digest
            elif item.filename.endswith(".dist-info/RECORD"):
                content = _record(content.decode(), hashes).encode()
            new.writestr(item, content, zipfile.ZIP_DEFLATED, 9)
    return zeroed


def _record(text: str, hashes: dict[str, str]) -> str:
    lines = []
    for line in text.splitlines():
        name = line.split(",")[0]
        lines.append(f"{name},sha256={hashes[name]},{line.split(',')[-1]}" if name in hashes else line)
    return "\n".join(lines) + "\n"


def split(wheels: list[str], folder: str, part_bytes: int, arch: int | None = None) -> list[dict]:
    """Fill ``folder`` with ``wheels``, none of its files larger than ``part_bytes``. Returns a row for each wheel.

    A row: name, bytes, sha256, parts (file names), zeroed (bytes of other GPUs' code). wheels.json holds the rows.
    """
    os.makedirs(folder, exist_ok=True)
    rows = []
    for wheel in wheels:
        if not zipfile.is_zipfile(wheel):
            raise CarryError(f"{wheel}: no wheel (a wheel is a zip file)")
        name, zeroed = os.path.basename(wheel), 0
        if arch is not None:
            thinned = os.path.join(folder, name + ".thin")
            try:
                zeroed = thin_wheel(wheel, thinned, arch)
            except (zipfile.BadZipFile, zlib.error) as error:
                os.remove(thinned)
                raise CarryError(f"{wheel}: damaged ({error}); download it again") from None
            wheel = thinned if zeroed else wheel
        with open(wheel, "rb") as file:
            content = file.read()
        if arch is not None:
            os.remove(thinned)
        count = max(1, -(-len(content) // part_bytes))
        parts = [name] if count == 1 else [f"{name}.part{i:02d}" for i in range(count)]
        for i, part in enumerate(parts):
            with open(os.path.join(folder, part), "wb") as file:
                file.write(content[i * part_bytes : (i + 1) * part_bytes])
        digest = hashlib.sha256(content).hexdigest()
        rows.append({"name": name, "bytes": len(content), "sha256": digest, "parts": parts, "zeroed": zeroed})
    with open(os.path.join(folder, LIST), "w", encoding="utf-8") as file:
        json.dump(rows, file, indent=1)
    return rows


def join(folders: list[str], target: str) -> list[str]:
    """Put the wheels whose parts lie in ``folders`` together in ``target``; returns their paths.

    CarryError: no list of parts or a damaged one, a part that is missing, or a wheel that is not what was split.
    """
    lists = [os.path.join(folder, LIST) for folder in folders if os.path.exists(os.path.join(folder, LIST))]
    if not lists:
        raise CarryError(f"{' '.join(folders)}: no {LIST} there; 'split' writes it, and it has to travel too")
    os.makedirs(target, exist_ok=True)
    rows = []
    for path in lists:
        with open(path, encoding="utf-8") as file:
            try:
                rows += json.load(file)
            except ValueError as error:
                raise CarryError(f"{path}: damaged ({error}); bring it again") from None
    joined = []
    for row in rows:
        content = b"".join(_read_part(folders, part) for part in row["parts"])
        if hashlib.sha256(content).hexdigest() != row["sha256"]:
            raise CarryError(
                f"{row['name']}: the parts are not those that were split (sha256 differs); bring them again"
            )
        path = os.path.join(target, row["name"])
        with open(path, "wb") as file:
            file.write(content)
        joined.append(path)
    return joined


def _read_part(folders: list[str], name: str) -> bytes:
    for folder in folders:
        path = os.path.join(folder, name)
        if os.path.exists(path):
            with open(path, "rb") as file:
                return file.read()
    raise CarryError(f"{name}: not in {' '.join(folders)}; bring this part too")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("split", help="wheels -> parts")
    one.add_argument("wheels", nargs="+", metavar="WHEEL")
    one.add_argument("--part-mib", type=int, default=50, metavar="N", help="largest file (default: 50)")
    one.add_argument("--gpu-arch", type=int, metavar="SM", help="keep machine code of this generation alone, e.g. 90")
    two = commands.add_parser("join", help="parts -> wheels")
    two.add_argument("folders", nargs="+", metavar="DIR", help="where the parts lie")
    for each in (one, two):
        each.add_argument("--save", required=True, metavar="DIR", help="where to write")
        each.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    try:
        if options.command == "join":
            result = join(options.folders, options.save)
            text = "\n".join(result)
        else:
            if options.part_mib < 1:
                raise CarryError(f"--part-mib {options.part_mib}: at least 1")
            result = split(options.wheels, options.save, options.part_mib << 20, options.gpu_arch)
            text = "\n".join(
                f"{row['name']}: {row['bytes'] / 1e6:.1f} MB in {len(row['parts'])} files" for row in result
            )
    except (CarryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result) if options.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
