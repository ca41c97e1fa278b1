"""tools/carry_wheels.py on made-up wheels: what is emptied, what comes out again, and one line for every mistake."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import struct
import subprocess
import sys
import zipfile

import pytest

_PATH = os.path.join(os.path.dirname(__file__), "..", "..", "..", "tools", "carry_wheels.py")
_MAGIC = 0xBA55ED50
PTX, ELF = 1, 2
PART = 1 << 20


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("carry_wheels_tool", _PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(kind: int, arch: int, content: bytes, header: int = 64) -> bytes:
    """A copy of a kernel for one generation: u16 kind, u16 version, u32 header, u64 size, ..., u32 arch at byte 28."""
    head = bytearray(header)
    struct.pack_into("<HHIQ", head, 0, kind, 0x101, header, len(content))
    struct.pack_into("<I", head, 28, arch)
    return bytes(head) + content


def fat_binary(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", _MAGIC, 1, 16, len(body)) + body


def code(byte: int, size: int = 400) -> bytes:
    return bytes([byte]) * size


def library() -> tuple[bytes, bytes]:
    """(a library as a compiler leaves it, and what is to be left of it for sm_90)."""
    ptx, old, new, single = code(0x11), code(0x22, 333), code(0x33), code(0x44, 100)
    before, between, after = b"\x7fELF host code \x00" * 5, b"more host code" * 3, b"the end"

    def with_old(first: bytes, second: bytes) -> bytes:
        return b"".join(
            [
                before,
                fat_binary(entry(ELF, 80, first), entry(ELF, 90, new), entry(PTX, 80, ptx)),
                between,
                fat_binary(entry(ELF, 90, new, header=96), entry(ELF, 80, second, header=80)),
                between,
                # Nothing for sm_90 in it: the driver may still run what is there.
                fat_binary(entry(ELF, 80, single), entry(PTX, 80, ptx)),
                after,
            ]
        )

    return with_old(old, old), with_old(bytes(len(old)), bytes(len(old)))


def make_wheel(folder, name: str = "kernels-1.0-py3-none-any.whl", padding: int = 0) -> str:
    """``padding``: bytes that do not compress."""
    content = {
        "kernels/__init__.py": b"'''a package'''\n",
        "kernels/lib.so": library()[0],
        "kernels/plain.so": b"no kernels in here",
        "kernels/data.bin": os.urandom(padding),
        "kernels-1.0.dist-info/METADATA": b"Name: kernels\nVersion: 1.0\n",
    }
    lines = [f"{path},sha256={digest_of(data)},{len(data)}" for path, data in content.items()]
    record = "\n".join([*lines, "kernels-1.0.dist-info/RECORD,,", ""])
    path = str(folder / name)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        # Not last, as some builders leave it: the hashes have to be known before it is written.
        wheel.writestr("kernels-1.0.dist-info/RECORD", record)
        for name, data in content.items():
            wheel.writestr(name, data)
    return path


def digest_of(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def read(path) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def test_only_the_machine_code_of_other_generations_is_emptied(tool):
    whole, thinned = library()
    found, zeroed = tool.only_arch(whole, 90)
    assert found == thinned
    assert zeroed == 2 * 333
    assert tool.only_arch(thinned, 90)[0] == thinned


def test_a_generation_that_no_one_has_empties_nothing(tool):
    whole, _ = library()
    assert tool.only_arch(whole, 120) == (whole, 0)


@pytest.mark.parametrize(
    "broken",
    [
        fat_binary(entry(ELF, 80, code(1)), entry(ELF, 90, code(2)))[:-1],
        fat_binary(entry(ELF, 80, code(1)), entry(7, 90, code(2))),
        fat_binary(entry(ELF, 80, code(1)), struct.pack("<HHIQ", ELF, 0, 8, 10) + bytes(48)),
        struct.pack("<I", _MAGIC),
        struct.pack("<IHHQ", _MAGIC, 1, 16, 1 << 60) + code(1),
        struct.pack("<IHHQ", _MAGIC, 1, 0, 100) + code(1),
    ],
    ids=["cut off", "unknown kind", "entry without a head", "the magic alone", "endless", "no head"],
)
def test_what_does_not_look_like_a_fat_binary_is_left_alone(tool, broken):
    assert tool.only_arch(b"host" + broken, 90) == (b"host" + broken, 0)


def test_a_fat_binary_behind_something_that_only_begins_like_one(tool):
    whole, thinned = library()
    chance = struct.pack("<I", _MAGIC)
    assert tool.only_arch(chance + whole, 90) == (chance + thinned, 2 * 333)


def test_a_thinned_wheel_is_a_whole_wheel(tool, tmp_path):
    source, target = make_wheel(tmp_path), str(tmp_path / "thin.whl")
    assert tool.thin_wheel(source, target, 90) == 2 * 333
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target) as new:
        assert new.testzip() is None
        assert sorted(new.namelist()) == sorted(old.namelist())
        for name in old.namelist():
            if name not in ("kernels/lib.so", "kernels-1.0.dist-info/RECORD"):
                assert new.read(name) == old.read(name), name
        assert new.read("kernels/lib.so") == library()[1]
        record = new.read("kernels-1.0.dist-info/RECORD").decode().splitlines()
        assert len(record) == len(old.read("kernels-1.0.dist-info/RECORD").decode().splitlines())
        for line in record[:-1]:
            name, digest, size = line.split(",")
            data = new.read(name)
            assert (digest, size) == (f"sha256={digest_of(data)}", str(len(data))), name
        assert record[-1] == "kernels-1.0.dist-info/RECORD,,"


def test_there_and_back(tool, tmp_path, capsys):
    """One wheel whole, one in parts that do not divide it evenly: byte for byte what they were."""
    small, large = make_wheel(tmp_path, "small.whl"), make_wheel(tmp_path, "large.whl", padding=2 * PART + 5)
    parts, out = tmp_path / "parts", tmp_path / "out"
    assert tool.main(["split", small, large, "--save", str(parts), "--part-mib", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "large.whl: 2.1 MB in 3 files"
    assert sorted(os.listdir(parts)) == [*(f"large.whl.part0{i}" for i in range(3)), "small.whl", "wheels.json"]
    assert max(os.path.getsize(parts / name) for name in os.listdir(parts)) == PART
    assert tool.main(["join", str(parts), "--save", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out / "small.whl"), str(out / "large.whl")]
    assert read(out / "small.whl") == read(small)
    assert read(out / "large.whl") == read(large)


def test_parts_may_lie_in_several_folders(tool, tmp_path):
    wheel, parts, other = make_wheel(tmp_path, padding=2 * PART), tmp_path / "parts", tmp_path / "other"
    tool.split([wheel], str(parts), PART)
    other.mkdir()
    (parts / "kernels-1.0-py3-none-any.whl.part01").rename(other / "kernels-1.0-py3-none-any.whl.part01")
    (joined,) = tool.join([str(other), str(parts)], str(tmp_path / "out"))
    assert read(joined) == read(wheel)


def test_a_thinned_wheel_travels_as_it_is(tool, tmp_path, capsys):
    wheel, parts, out = make_wheel(tmp_path), str(tmp_path / "parts"), str(tmp_path / "out")
    assert tool.main(["split", wheel, "--save", parts, "--gpu-arch", "90", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["zeroed"]) == ("kernels-1.0-py3-none-any.whl", 2 * 333)
    assert sorted(os.listdir(parts)) == [row["name"], "wheels.json"]
    assert tool.main(["join", parts, "--save", out, "--json"]) == 0
    (joined,) = json.loads(capsys.readouterr().out)
    assert hashlib.sha256(read(joined)).hexdigest() == row["sha256"]
    with zipfile.ZipFile(joined) as new:
        assert new.read("kernels/lib.so") == library()[1]


def test_a_wheel_without_code_for_others_is_not_packed_anew(tool, tmp_path):
    wheel = make_wheel(tmp_path)
    (row,) = tool.split([wheel], str(tmp_path / "parts"), PART, arch=120)
    assert row["zeroed"] == 0
    assert read(tmp_path / "parts" / row["name"]) == read(wheel)


@pytest.fixture
def parts(tool, tmp_path) -> str:
    folder = tmp_path / "parts"
    tool.split([make_wheel(tmp_path, padding=2 * PART)], str(folder), PART)
    return folder


def assert_one_line(tool, capsys, words: list[str], message: str) -> None:
    assert tool.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_missing_part(tool, parts, tmp_path, capsys):
    os.remove(parts / "kernels-1.0-py3-none-any.whl.part01")
    words = ["join", str(parts), "--save", str(tmp_path / "out")]
    assert_one_line(tool, capsys, words, f"kernels-1.0-py3-none-any.whl.part01: not in {parts}; bring this part too")
    assert os.listdir(tmp_path / "out") == []


def test_a_damaged_part(tool, parts, tmp_path, capsys):
    with open(parts / "kernels-1.0-py3-none-any.whl.part01", "r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    words = ["join", str(parts), "--save", str(tmp_path / "out")]
    assert_one_line(tool, capsys, words, "kernels-1.0-py3-none-any.whl: the parts are not those that were split")
    assert os.listdir(tmp_path / "out") == []


def test_a_missing_list(tool, parts, tmp_path, capsys):
    os.remove(parts / "wheels.json")
    assert_one_line(tool, capsys, ["join", str(parts), "--save", str(tmp_path / "out")], "no wheels.json there")


def test_a_damaged_list(tool, parts, tmp_path, capsys):
    (parts / "wheels.json").write_text((parts / "wheels.json").read_text()[:-20])
    words = ["join", str(parts), "--save", str(tmp_path / "out")]
    assert_one_line(tool, capsys, words, f"{parts / 'wheels.json'}: damaged (")


def test_no_wheel(tool, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no zip file")
    words = ["split", str(tmp_path / "notes.txt"), "--save", str(tmp_path / "parts")]
    assert_one_line(tool, capsys, words, "notes.txt: no wheel (a wheel is a zip file)")


def test_a_damaged_wheel(tool, tmp_path, capsys):
    wheel = make_wheel(tmp_path)
    content = bytearray(read(wheel))
    place = content.find(b"kernels/lib.so") + len("kernels/lib.so") + 20
    content[place : place + 8] = bytes(8)
    with open(wheel, "wb") as file:
        file.write(content)
    words = ["split", wheel, "--save", str(tmp_path / "parts"), "--gpu-arch", "90"]
    assert_one_line(tool, capsys, words, "kernels-1.0-py3-none-any.whl: damaged (")
    assert os.listdir(tmp_path / "parts") == []


def test_parts_of_no_size(tool, tmp_path, capsys):
    words = ["split", make_wheel(tmp_path), "--save", str(tmp_path / "parts"), "--part-mib", "0"]
    assert_one_line(tool, capsys, words, "--part-mib 0: at least 1")


def test_it_runs_alone_and_helps():
    """On a machine that has nothing but Python: no package is imported."""
    done = subprocess.run([sys.executable, "-I", "-S", _PATH, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "split" in done.stdout
    assert "examples:" in done.stdout
