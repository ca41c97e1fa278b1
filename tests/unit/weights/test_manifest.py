"""A manifest tells every change: of a file it lists, and of itself."""

from __future__ import annotations

import json
import os

import pytest

from dc_megatron.weights.durable_files import hash_file
from dc_megatron.weights.manifest import MANIFEST, damaged_files, manifest_bytes, read_manifest, write_manifest

CONTENT = {"iteration": 5, "consumed_tokens": {"processed": 96, "supervised": 40}, "note": "ü"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "one.bin").write_bytes(bytes(range(256)))
    (tmp_path / "sub" / "two.bin").write_bytes(b"")
    files = {name: hash_file(tmp_path / name) for name in ("one.bin", "sub/two.bin")}
    write_manifest(str(tmp_path), CONTENT, files)
    return tmp_path


def flip(path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_what_was_written_is_read(folder):
    manifest, problem = read_manifest(str(folder))
    assert problem == ""
    assert manifest.content == CONTENT
    assert {name: digest.size for name, digest in manifest.files.items()} == {"one.bin": 256, "sub/two.bin": 0}
    assert damaged_files(str(folder), manifest) == []


def test_every_flipped_bit_of_a_manifest_is_noticed(folder):
    whole = (folder / MANIFEST).read_bytes()
    for bit in range(8 * len(whole)):
        flip(folder / MANIFEST, bit)
        assert read_manifest(str(folder)) == (None, f"{MANIFEST} is damaged"), f"bit {bit}"
        (folder / MANIFEST).write_bytes(whole)
    assert read_manifest(str(folder))[0] is not None


def test_every_cut_of_a_manifest_is_noticed(folder):
    whole = (folder / MANIFEST).read_bytes()
    for length in range(len(whole)):
        (folder / MANIFEST).write_bytes(whole[:length])
        assert read_manifest(str(folder))[0] is None, f"{length} bytes"
    (folder / MANIFEST).write_bytes(whole + b"\n")
    assert read_manifest(str(folder))[0] is None


def test_every_flipped_bit_of_a_file_is_found_by_its_hash_and_the_file_named(folder):
    manifest, _ = read_manifest(str(folder))
    for bit in range(8 * 256):
        flip(folder / "one.bin", bit)
        (line,) = damaged_files(str(folder), manifest)
        assert line.startswith("one.bin is damaged")
        flip(folder / "one.bin", bit)


def test_a_missing_manifest_a_missing_file_and_another_size(folder):
    assert read_manifest(str(folder / "sub"))[1].startswith(f"{MANIFEST} is missing")
    os.truncate(folder / "one.bin", 255)
    assert read_manifest(str(folder)) == (None, "one.bin has 255 bytes instead of 256")
    (folder / "one.bin").unlink()
    assert read_manifest(str(folder)) == (None, "one.bin is missing")


def test_files_that_went_after_it_was_read_are_named(folder):
    manifest, _ = read_manifest(str(folder))
    (folder / "one.bin").write_bytes(b"short")
    (folder / "sub" / "two.bin").unlink()
    first, second = damaged_files(str(folder), manifest)
    assert first == "one.bin has 5 bytes instead of 256"
    assert second.startswith("sub/two.bin cannot be read")


def test_files_of_others_do_not_matter(folder):
    (folder / ".nfs000123").write_bytes(b"x")
    manifest, _ = read_manifest(str(folder))
    assert damaged_files(str(folder), manifest) == []


def test_progress_counts_the_bytes(folder):
    manifest, _ = read_manifest(str(folder))
    seen = []
    assert damaged_files(str(folder), manifest, ["one.bin"], seen.append) == []
    assert sum(seen) == 256


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", "a\0b", ".."])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    digest = hash_file(__file__)
    (tmp_path / MANIFEST).write_bytes(manifest_bytes({}, {name: digest}))
    assert read_manifest(str(tmp_path)) == (None, f"{MANIFEST} is damaged")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        '"x"',
        "{}",
        '{"files": {}}',
        '{"files": [], "manifest_xxh3_64": "0"}',
        '{"files": {"a": 1}, "manifest_xxh3_64": "0"}',
        '{"files": {"a": {"size": "1", "xxh3_64": ""}}, "manifest_xxh3_64": "0"}',
        "[" * 100_000,
        json.dumps({"iteration": 4, "files": {"__0_0.distcp": 10}}),
    ],
)
def test_other_texts_are_no_manifest(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    assert read_manifest(str(tmp_path)) == (None, f"{MANIFEST} is damaged")
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe" + text.encode())
    assert read_manifest(str(tmp_path)) == (None, f"{MANIFEST} is damaged")
