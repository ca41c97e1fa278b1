"""Tar shards: members by name, by shard and name; damaged and hostile tars."""

from __future__ import annotations

import io
import logging
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from dc_megatron.data import tar_list
from dc_megatron.data.image_store import UnsafeName, open_store
from dc_megatron.data.tar_members import DamagedTar, Member, scan
from dc_megatron.errors import UserError

LONG = "d" * 120 + "/" + "e" * 60 + "/ä.jpg"
FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def write_tar(path, members: dict[str, bytes], form: str = "gnu") -> bytes:
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for name, content in members.items():
            information = tarfile.TarInfo(name)
            information.size = len(content)
            tar.addfile(information, io.BytesIO(content))
    return path.read_bytes()


def members_of(data: bytes) -> list[Member]:
    return list(scan(io.BytesIO(data), len(data)))


@pytest.fixture
def shards(tmp_path):
    """Three shards in the three formats; ``same.jpg`` is in all."""
    for number, form in enumerate(FORMATS):
        own = f"of shard {number}".encode()
        members = {f"only{number}.jpg": own, "./same.jpg": own, LONG: own, "empty.jpg": b""}
        write_tar(tmp_path / f"{number:03d}.tar", members, form)
    return tmp_path


@pytest.mark.parametrize("spelling", ["{000..002}.tar", "*.tar", "00{0..2}.tar", "00[0-9].tar"])
def test_members_are_found_by_name_and_by_shard(shards, spelling):
    store = open_store(str(shards / spelling))
    for number in range(3):
        own = f"of shard {number}".encode()
        assert store.read(f"only{number}.jpg") == own
        for name in ("same.jpg", LONG, "./same.jpg"):
            assert store.read(f"{number:03d}/{name}") == own
            assert store.read(f"{number:03d}.tar/{name}") == own
            assert store.read(name) == b"of shard 0"
    assert store.read("empty.jpg") == store.open("empty.jpg").read() == b""


def test_one_tar_is_a_store(shards):
    store = open_store(str(shards / "001.tar"))
    assert store.read("only1.jpg") == b"of shard 1"
    with pytest.raises(FileNotFoundError):
        store.read("only0.jpg")


def test_names_without_a_member_are_missing_or_refused(shards):
    store = open_store(str(shards / "*.tar"))
    for name in ("none.jpg", "d" * 120, "003/same.jpg", "000", "000/none.jpg", "", "x" * 9000, "\ud800"):
        with pytest.raises(FileNotFoundError):
            store.read(name)
    for name in ("../same.jpg", "/same.jpg", "000/../../x", "C:/x"):
        with pytest.raises(UnsafeName):
            store.open(name)


def test_an_open_member_behaves_like_a_file(tmp_path):
    content = bytes(random.Random(0).randbytes(300_000))
    write_tar(tmp_path / "a.tar", {"before": b"x" * 700, "big.bin": content, "after": b"y" * 700})
    with open_store(str(tmp_path / "a.tar")).open("big.bin", block_bytes=1000) as file:
        assert file.read(10) == content[:10]
        assert file.seek(-7, io.SEEK_END) == len(content) - 7
        assert file.read() == content[-7:]
        assert file.seek(123_456) == file.tell() == 123_456
        assert file.read(5000) == content[123_456:128_456]
        file.seek(len(content) + 10)
        assert file.read(5) == b""
        file.seek(0)
        assert file.read() == content


def test_threads_read_side_by_side(tmp_path):
    contents = {f"{n}.jpg": random.Random(n).randbytes(3000 + n) for n in range(100)}
    write_tar(tmp_path / "a.tar", contents)
    store = open_store(str(tmp_path / "a.tar"))
    with ThreadPoolExecutor(8) as pool:
        for name, data in zip(contents, pool.map(store.read, contents), strict=True):
            assert data == contents[name]


def test_repeated_names_are_counted_in_one_warning(shards, caplog):
    open_store(str(shards / "*.tar"))
    (warning,) = caplog.messages
    assert "6 files have the name of an earlier one" in warning


def test_the_list_is_kept_until_a_shard_changes(shards, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "inner"
    first = open_store(str(shards / "*.tar"), cache=str(cache))
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(tar_list, "scan", lambda *_: pytest.fail("scanned again"))
        second = open_store(str(shards / "*.tar"), cache=str(cache))
    assert second.read("002/same.jpg") == first.read("002/same.jpg") == b"of shard 2"
    write_tar(shards / "001.tar", {"new.jpg": b"new" * 400})
    third = open_store(str(shards / "*.tar"), cache=str(cache))
    assert third.read("new.jpg") == b"new" * 400
    assert len(list(cache.iterdir())) == 2


def test_folders_of_frames_are_listed(tmp_path):
    frames = ("v/f10.jpg", "v/f9.jpg", "v/notes.txt", "v/deeper/f1.jpg", "v.jpg", "w/f1.jpg")
    write_tar(tmp_path / "0.tar", dict.fromkeys(frames, b"0"))
    write_tar(tmp_path / "1.tar", {"v/f3.jpg": b"1"})
    store = open_store(str(tmp_path / "{0..1}.tar"))
    assert store.list("v") == ["v/f3.jpg", "v/f9.jpg", "v/f10.jpg"]
    assert store.list("1/v/") == ["1/v/f3.jpg"]
    assert store.read(store.list("1/v")[0]) == b"1"
    for name in ("none", "v.jpg", "2/v"):
        with pytest.raises(FileNotFoundError):
            store.list(name)


def test_links_mean_the_file_before_them(tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("d/"))
        information = tarfile.TarInfo("d/a.jpg")
        information.size = 3
        tar.addfile(information, io.BytesIO(b"abc"))
        links = [("hard.jpg", "d/a.jpg", tarfile.LNKTYPE), ("d/soft.jpg", "a.jpg", tarfile.SYMTYPE)]
        links += [("again.jpg", "hard.jpg", tarfile.LNKTYPE), ("out.jpg", "../../etc/passwd", tarfile.SYMTYPE)]
        for name, target, kind in links:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    store = open_store(str(tmp_path / "a.tar"))
    assert [store.read(name) for name in ("hard.jpg", "d/soft.jpg", "again.jpg")] == [b"abc"] * 3
    with pytest.raises(FileNotFoundError):
        store.read("out.jpg")
    assert any("1 links lead to no file" in message for message in caplog.messages)


def test_names_in_a_tar_are_keys_and_nothing_else(tmp_path):
    write_tar(tmp_path / "a.tar", {"../../evil.jpg": b"evil", "/abs.jpg": b"abs", "ok.jpg": b"ok"})
    store = open_store(str(tmp_path / "a.tar"), cache=str(tmp_path / "cache"))
    for name in ("../../evil.jpg", "/abs.jpg"):
        with pytest.raises(UnsafeName):
            store.read(name)
    assert store.read("ok.jpg") == b"ok"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "cache"]


@pytest.mark.parametrize("cut", [512 + 3, 1024 + 100, 1024 + 512 + 20])
def test_a_shard_that_was_cut_off_gives_what_is_before(tmp_path, caplog, cut):
    """Two members of 400 bytes, 1024 bytes each: inside the first one's content, the second's header and content."""
    whole = write_tar(tmp_path / "a.tar", {"1.jpg": b"1" * 400, "2.jpg": b"2" * 400})
    (tmp_path / "a.tar").write_bytes(whole[:cut])
    if cut < 1024:
        with pytest.raises(UserError, match=r"a\.tar is no uncompressed tar"):
            open_store(str(tmp_path / "a.tar"))
        return
    store = open_store(str(tmp_path / "a.tar"))
    assert store.read("1.jpg") == b"1" * 400
    with pytest.raises(FileNotFoundError):
        store.read("2.jpg")
    (warning,) = caplog.messages
    assert "byte 1024" in warning
    assert "the 1 files before that are used" in warning


def test_a_tar_without_its_end_mark_is_complete(tmp_path, caplog):
    whole = write_tar(tmp_path / "a.tar", {"1.jpg": b"1" * 400, "2.jpg": b"2" * 400})
    for end in (2048, 2048 - 112):
        (tmp_path / "a.tar").write_bytes(whole[:end])
        assert open_store(str(tmp_path / "a.tar")).read("2.jpg") == b"2" * 400
    assert caplog.messages == []


def test_a_shard_that_shrinks_after_it_was_listed_is_an_error(tmp_path):
    whole = write_tar(tmp_path / "a.tar", {"1.jpg": b"1" * 400})
    store = open_store(str(tmp_path / "a.tar"))
    (tmp_path / "a.tar").write_bytes(whole[:600])
    with pytest.raises(OSError, match="shorter"):
        store.read("1.jpg")


@pytest.mark.parametrize("content", [b"no tar at all" * 100, b"\x1f\x8b" + bytes(5000), b"x"])
def test_what_is_no_tar_stops_the_run(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar is no uncompressed tar"):
        open_store(str(tmp_path / "a.tar"))


@pytest.mark.parametrize("spelling", ["{000..003}.tar", "no*.tar", "{9..0}.tar", "{0..999999999}.tar"])
def test_shards_that_are_not_there_stop_the_run(shards, spelling):
    with pytest.raises(UserError, match="--image_folder"):
        open_store(str(shards / spelling))


def header(name: bytes = b"a.jpg", size: bytes = b"00000000005\0", kind: bytes = b"0") -> bytes:
    """A header with any size field and a right checksum."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


GOOD = header() + b"hello".ljust(512, b"\0")


@pytest.mark.parametrize(
    "hostile",
    [
        header(size=b"77777777777\0") + bytes(512),
        header(size=b"\xff" * 12) + bytes(512),
        header(size=b"-0000000512\0") + bytes(512),
        header(size=b"\x80" + b"\xff" * 11) + bytes(512),
        header(size=b"not a number"),
        header(kind=b"L", size=b"77777777777\0"),
        header(kind=b"L", size=b"\x80" + bytes(7) + (2 << 20).to_bytes(4, "big")) + bytes(3 << 20),
        header(kind=b"x", size=b"00000000012\0") + b"0 path=evil".ljust(512, b"\0"),
        header(kind=b"x", size=b"00000000024\0") + b"20 size=99999999999\n".ljust(512, b"\0") + GOOD,
        header(kind=b"x", size=b"00000000014\0") + b"12 size=-99\n".ljust(512, b"\0") + GOOD,
        header(kind=b"x", size=b"00000001000\0") + b"9" * 512 + GOOD,
    ],
)
def test_hostile_headers_end_the_scan_after_the_good_member(hostile):
    found = []
    with pytest.raises(DamagedTar):
        found.extend(scan(io.BytesIO(GOOD + hostile), len(GOOD + hostile)))
    reached = iter(scan(io.BytesIO(GOOD + hostile), len(GOOD + hostile)))
    assert next(reached) == Member(b"a.jpg", 512, 5)


def test_a_large_size_in_base_256_is_read():
    size = b"\x80" + (1000).to_bytes(11, "big")
    assert members_of(header(size=size) + bytes(1024)) == [Member(b"a.jpg", 512, 1000)]


def test_tars_changed_at_random_are_read_or_refused(tmp_path):
    chance = random.Random(0)
    whole = write_tar(tmp_path / "a.tar", {f"{LONG}{n}": b"x" * 300 for n in range(6)}, "pax")
    ends = {"read": 0, "refused": 0}
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 3, 20))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        data = bytes(data[: chance.randrange(len(data))] if chance.random() < 0.3 else data)
        try:
            for member in members_of(data):
                assert 0 <= member.offset <= member.offset + member.size <= len(data)
            ends["read"] += 1
        except DamagedTar:
            ends["refused"] += 1
    assert min(ends.values()) > 20


def test_shards_in_an_object_store(shards, caplog):
    caplog.set_level(logging.ERROR)
    memory = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        memory.pipe(f"/tar_store_test/{path.name}", path.read_bytes())
    for spelling in ("{000..002}.tar", "*.tar"):
        store = open_store(f"memory://tar_store_test/{spelling}", cache=str(shards / "cache"))
        assert store.read("002/same.jpg") == b"of shard 2"
        assert store.open("only1.jpg").read() == b"of shard 1"
    with pytest.raises(UserError, match="there is no"):
        open_store("memory://tar_store_test/{000..003}.tar")
