"""Files that are whole or not there, and folders that appear under their name only when they are."""

from __future__ import annotations

import json
import os

import pytest
import xxhash

from dc_megatron.errors import UserError
from dc_megatron.weights import durable_files
from dc_megatron.weights.durable_files import Digest, HashedFile, PartialFolder, exchange, hash_file, write_file

SEAM = ("write_all", "flush_file", "flush_folder", "rename")


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def stop_at(monkeypatch):
    """``stop_at(k)``: the k-th write, flush or rename from now on raises before it does anything. Counts them all."""
    originals = {name: getattr(durable_files, name) for name in SEAM}
    calls: list[str] = []

    def install(position: int | None) -> list[str]:
        calls.clear()
        for name, original in originals.items():

            def stopping(*args, _name=name, _original=original):
                calls.append(_name)
                if len(calls) - 1 == position:
                    raise Killed(f"{_name} {args}")
                return _original(*args)

            monkeypatch.setattr(durable_files, name, stopping)
        return calls

    return install


def digest_of(data: bytes) -> Digest:
    return Digest(len(data), xxhash.xxh3_64_hexdigest(data))


def test_a_hashed_file_knows_size_and_hash(tmp_path):
    with HashedFile(str(tmp_path / "f")) as file:
        assert file.write(b"ab") == 2
        assert file.write(memoryview(b"cdef").cast("B")) == 4
        digest = file.finish()
    assert digest == digest_of(b"abcdef") == hash_file(str(tmp_path / "f"))
    assert (tmp_path / "f").read_bytes() == b"abcdef"


def test_hashing_tells_its_progress_and_reads_large_files_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(durable_files, "_BLOCK", 1000)
    data = os.urandom(2500)
    (tmp_path / "f").write_bytes(data)
    seen = []
    assert hash_file(str(tmp_path / "f"), seen.append, flush=True) == digest_of(data)
    assert seen == [1000, 1000, 500]


def test_write_file_leaves_the_old_or_the_new_content_at_every_stop(tmp_path, stop_at):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    points = stop_at(None)
    assert write_file(str(path), b"newer") == digest_of(b"newer")
    names = list(points)
    assert names == ["write_all", "flush_file", "rename", "flush_folder"]
    for position, name in enumerate(names):
        path.write_bytes(b"old")
        stop_at(position)
        with pytest.raises(Killed):
            write_file(str(path), b"newer")
        assert path.read_bytes() == (b"newer" if name == "flush_folder" else b"old"), name
        assert os.listdir(tmp_path) == ["f"]


def test_names_change_places_in_one_step(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    if not exchange(str(tmp_path / "a"), str(tmp_path / "b")):
        pytest.skip("this file system cannot exchange names")
    assert (os.listdir(tmp_path / "a"), os.listdir(tmp_path / "b")) == (["b"], ["a"])
    with pytest.raises(FileNotFoundError):
        exchange(str(tmp_path / "a"), str(tmp_path / "absent"))


# Folders


def make(folder, plan: str = "plan", files: dict[str, bytes] | None = None) -> None:
    """What a conversion does: whatever an earlier attempt left unfinished, then the folder's name."""
    with PartialFolder(str(folder), plan) as partial:
        for name, data in (files or FILES).items():
            if name not in partial.finished:
                partial.write(name, data)
        partial.finish()


# The last one as every folder has it: it tells one that is whole, and lacks its name, from what is not ours.
FILES = {"one": b"1" * 10, "sub/two": b"2" * 20, "three": b"3", "dc_manifest.json": b"{}"}


def content(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_appears_whole(tmp_path):
    make(tmp_path / "out")
    assert content(tmp_path / "out") == FILES
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("there", ["file", "folder with a file", "dangling link"])
def test_nothing_is_overwritten(tmp_path, there):
    out = tmp_path / "out"
    if there == "file":
        out.write_text("x")
    elif there == "folder with a file":
        out.mkdir()
        (out / "x").write_text("x")
    else:
        os.symlink(tmp_path / "nowhere", out)
    with pytest.raises(UserError, match=r"--save .*out: is there already; nothing is overwritten"):
        make(out)
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_of_that_name_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    assert content(tmp_path / "out") == FILES


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    os.symlink("disk", tmp_path / "out")
    make(tmp_path / "out")
    assert os.path.islink(tmp_path / "out")
    assert content(tmp_path / "disk") == FILES
    assert sorted(os.listdir(tmp_path)) == ["disk", "out"]


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"--save .*out: a disk is mounted there"):
        make(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("there", ["file", "folder"])
def test_a_partial_folder_of_somebody_else_is_not_emptied(tmp_path, there):
    other = tmp_path / "out.partial"
    if there == "folder":
        (other / "sub").mkdir(parents=True)
    precious = other / "sub" / "thesis.txt" if there == "folder" else other
    precious.write_text("years of work")
    with pytest.raises(UserError, match=r"--save .*out: .*out\.partial"):
        make(tmp_path / "out")
    assert precious.read_text() == "years of work"
    assert os.listdir(tmp_path) == ["out.partial"]


def test_at_every_stop_the_folder_is_absent_or_whole_and_the_next_attempt_finishes_it(tmp_path, stop_at):
    points = stop_at(None)
    make(tmp_path / "counted")
    names = list(points)
    assert names.count("rename") == 1
    for position in range(len(names)):
        out = tmp_path / f"out{position}"
        stop_at(position)
        with pytest.raises(Killed):
            make(out)
        # Only the flush behind the last rename comes when the folder has its name.
        if out.exists():
            assert position == len(names) - 1
            assert content(out) == FILES
            continue
        stop_at(None)
        make(out)
        assert content(out) == FILES
        assert not os.path.exists(f"{out}.partial")


def test_a_later_attempt_keeps_what_was_finished_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    with PartialFolder(str(out), "plan") as partial:
        partial.record("sub/one", _finished(partial, "sub/one", b"11"), note={"rows": 2})
        _finished(partial, "two", b"not recorded")
        (tmp_path / "out.partial" / "empty").mkdir()
        os.symlink("/etc", tmp_path / "out.partial" / "link")
    with PartialFolder(str(out), "plan") as partial:
        assert partial.finished == {"sub/one": digest_of(b"11")}
        assert partial.notes == {"sub/one": {"rows": 2}}
        found = content(tmp_path / "out.partial")
        assert {name for name in found if not name.startswith((".lock", "journal"))} == {"sub/one"}
        assert not (tmp_path / "out.partial" / "empty").exists()
        assert not os.path.islink(tmp_path / "out.partial" / "link")
        partial.finish()
    assert content(out) == {"sub/one": b"11"}


def _finished(partial: PartialFolder, name: str, data: bytes) -> Digest:
    with partial.create(name) as file:
        file.write(data)
        return file.finish()


def test_another_plan_starts_over(tmp_path):
    with PartialFolder(str(tmp_path / "out"), "plan") as partial:
        partial.write("one", b"1")
    with PartialFolder(str(tmp_path / "out"), "another plan") as partial:
        assert partial.finished == {}
        assert "one" not in content(tmp_path / "out.partial")
    with PartialFolder(str(tmp_path / "out"), "plan") as partial:
        assert partial.finished == {}


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_journal_that_ends_in_half_a_line_loses_that_line(tmp_path, cut):
    out, journal = tmp_path / "out", tmp_path / "out.partial" / "journal.jsonl"
    with PartialFolder(str(out), "plan") as partial:
        partial.write("one", b"1")
        partial.write("two", b"2")
    whole = journal.read_bytes()
    assert len(whole.splitlines()[-1]) > 60
    journal.write_bytes(whole[:-cut])
    with PartialFolder(str(out), "plan") as partial:
        assert list(partial.finished) == ["one"]
        # Half a line does not spoil the lines that follow.
        partial.write("two", b"22")
    with PartialFolder(str(out), "plan") as partial:
        assert partial.finished == {"one": digest_of(b"1"), "two": digest_of(b"22")}


@pytest.mark.parametrize("line", [b"not json\n", b"[]\n", b'{"file": "one"}\n', b"3\n", b'{"file": [], "size": 1}\n'])
def test_a_journal_with_another_line_in_it_starts_over(tmp_path, line):
    out, journal = tmp_path / "out", tmp_path / "out.partial" / "journal.jsonl"
    with PartialFolder(str(out), "plan") as partial:
        partial.write("one", b"1")
    journal.write_bytes(journal.read_bytes() + line)
    with PartialFolder(str(out), "plan") as partial:
        assert partial.finished == {}


def test_a_finished_file_that_went_or_changed_its_size_is_made_again(tmp_path):
    with PartialFolder(str(tmp_path / "out"), "plan") as partial:
        for name in ("one", "two", "three"):
            partial.write(name, name.encode())
    (tmp_path / "out.partial" / "one").unlink()
    (tmp_path / "out.partial" / "two").write_bytes(b"2")
    with PartialFolder(str(tmp_path / "out"), "plan") as partial:
        assert list(partial.finished) == ["three"]


def test_two_attempts_at_once_are_refused(tmp_path):
    with PartialFolder(str(tmp_path / "out"), "plan") as partial:
        partial.write("one", b"1")
        with pytest.raises(UserError, match="another process is writing"):
            PartialFolder(str(tmp_path / "out"), "plan")
        assert "one" in partial.finished
        assert (tmp_path / "out.partial" / "one").exists()
    PartialFolder(str(tmp_path / "out"), "plan").close()


def test_copies_are_hashed(tmp_path):
    (tmp_path / "source").write_bytes(b"abc")
    with PartialFolder(str(tmp_path / "out"), "plan") as partial:
        assert partial.copy(str(tmp_path / "source"), "copy") == digest_of(b"abc")
        partial.finish()
    assert content(tmp_path / "out") == {"copy": b"abc"}


def test_a_small_disk_is_refused_and_finished_files_count(tmp_path, monkeypatch):
    with PartialFolder(str(tmp_path / "out"), "plan") as partial:
        partial.write("one", b"1" * 1000)
        usage = durable_files.shutil.disk_usage(tmp_path)
        monkeypatch.setattr(durable_files.shutil, "disk_usage", lambda _: usage._replace(free=10**9))
        partial.refuse_small_disk(10**9 + 1000)
        with pytest.raises(UserError, match=r"needs 1\.0 GB and the disk has 1\.0 GB free"):
            partial.refuse_small_disk(10**9 + 1001)


def test_the_journal_says_what_the_next_attempt_needs(tmp_path):
    with PartialFolder(str(tmp_path / "out"), "plan") as partial:
        partial.write("one", b"1")
    lines = (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"plan": "plan"}
    assert json.loads(lines[1])["file"] == "one"
