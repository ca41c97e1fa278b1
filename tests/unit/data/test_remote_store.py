"""Object stores through fsspec: requests, retries with growing waits, time limits, what is told and what is not."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from PIL import Image

from dc_megatron.data.image_store import UnsafeName, open_store
from dc_megatron.data.retrying import LimitedWarnings, Retrying, warnings_of_retries
from dc_megatron.errors import UserError


class FlakyFileSystem(MemoryFileSystem):
    """Raises ``errors`` one after the other before it answers; ``seconds``: how long each of the next reads takes."""

    protocol = "flaky"
    store: dict = {}  # noqa: RUF012 as in MemoryFileSystem
    pseudo_dirs = [""]  # noqa: RUF012
    errors: list = []  # noqa: RUF012
    seconds: list = []  # noqa: RUF012
    requests: list = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def cat_file(self, path, start=None, end=None, **more):
        self.requests.append((path, start, end))
        if self.seconds:
            time.sleep(self.seconds.pop(0))
        if self.errors:
            raise self.errors.pop(0)
        return super().cat_file(path, start=start, end=end, **more)


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


@pytest.fixture
def flaky(monkeypatch):
    """The file system of ``flaky://``, with one picture and an empty file; warnings are not held back."""
    system = fsspec.filesystem("flaky")
    for listed in (FlakyFileSystem.errors, FlakyFileSystem.seconds, FlakyFileSystem.requests):
        listed.clear()
    system.pipe({"/p/a.jpg": b"picture a", "/p/empty.jpg": b"", "/p/v/f10.jpg": b"10", "/p/v/f9.jpg": b"9"})
    monkeypatch.setattr(warnings_of_retries, "_seconds", 0)
    monkeypatch.setattr(warnings_of_retries, "_next", float("-inf"))
    return system


@pytest.fixture
def waits():
    return []


@pytest.fixture
def store(flaky, waits):
    return open_store("flaky://p", retrying=Retrying(sleep=waits.append))


def test_files_are_read_opened_and_listed(store):
    assert store.read("a.jpg") == store.open("./a.jpg").read() == b"picture a"
    assert store.read("empty.jpg") == store.open("empty.jpg").read() == b""
    assert store.list("v") == ["v/f9.jpg", "v/f10.jpg"]
    assert store.read(store.list("v")[1]) == b"10"


def test_a_header_costs_one_request(flaky, store):
    picture = io.BytesIO()
    Image.effect_noise((600, 600), 100).save(picture, "PNG")
    flaky.pipe("/p/noise.png", picture.getvalue())
    assert len(picture.getvalue()) > 2 * 64 * 1024
    with store.open("noise.png") as file, Image.open(file) as image:
        assert image.size == (600, 600)
    assert flaky.requests == [("/p/noise.png", 0, 64 * 1024)]
    with store.open("a.jpg") as file:
        file.read()
        file.read()
    assert len(flaky.requests) == 2


def test_missing_files_are_told_without_a_retry(flaky, store, waits):
    for name in ("none.jpg", "v", "a.jpg/b.jpg"):
        for method in (store.read, store.open):
            with pytest.raises(FileNotFoundError):
                method(name)
    for name in ("none", "a.jpg"):
        with pytest.raises(FileNotFoundError):
            store.list(name)
    for name in ("../x.jpg", "/p/a.jpg", "a\0.jpg"):
        with pytest.raises(UnsafeName):
            store.read(name)
    flaky.errors += [PermissionError("no entry")]
    with pytest.raises(PermissionError):
        store.read("a.jpg")
    assert waits == []


@pytest.mark.parametrize("error", [OSError("reset"), TimeoutError(), RuntimeError("503 slow down"), KeyError("body")])
def test_a_store_that_fails_for_a_while_is_asked_again(flaky, store, waits, caplog, error):
    flaky.errors += [error] * 4
    assert store.read("a.jpg") == b"picture a"
    assert len(flaky.requests) == 5
    for wait, longest in zip(waits, (0.5, 1, 2, 4), strict=True):
        assert longest / 2 <= wait <= longest
    assert len(caplog.messages) == 4
    assert "try 5 of 5" in caplog.messages[-1]
    assert "/p/a.jpg" in caplog.messages[-1]


def test_the_fifth_failure_is_an_error_with_its_cause(flaky, store, waits):
    flaky.errors += [RuntimeError(f"failure {n}") for n in range(1, 9)]
    with pytest.raises(OSError, match=r"/p/a\.jpg: failed 5 times, at last with RuntimeError: failure 5") as caught:
        store.read("a.jpg")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert len(waits) == 4


def test_waits_grow_up_to_the_longest():
    waits = []

    def fail():
        raise OSError("down")

    with pytest.raises(OSError, match="failed 9 times"):
        Retrying(tries=9, sleep=waits.append).call("x", fail)
    assert max(waits) <= 8
    assert min(waits[4:]) >= 4


def test_opened_files_retry_each_range(flaky, store, waits):
    file = store.open("a.jpg", block_bytes=4)
    flaky.errors += [OSError("reset")] * 2
    assert file.read() == b"picture a"
    assert len(waits) == 2


def test_a_store_that_does_not_answer_is_asked_again(flaky, waits):
    store = open_store("flaky://p", retrying=Retrying(limit=0.1, sleep=waits.append))
    flaky.seconds += [1.0]
    started = time.monotonic()
    assert store.read("a.jpg") == b"picture a"
    assert time.monotonic() - started < 0.9
    assert len(waits) == 1


def test_many_retries_make_few_lines(caplog):
    now = [0.0]
    limited = LimitedWarnings(10, clock=lambda: now[0])
    for second in range(25):
        now[0] = float(second)
        limited.warn("failure %d", second)
    assert caplog.messages == [
        "failure 0",
        "failure 10 (9 more such warnings since the last one)",
        "failure 20 (9 more such warnings since the last one)",
    ]


def test_servers_that_know_no_ranges_or_refuse_those_behind_the_end(flaky, store, waits, monkeypatch):
    def whole(self, path, start=None, end=None, **_):
        data = MemoryFileSystem.cat_file(self, path)
        if start is not None and start >= len(data):
            raise OSError("InvalidRange: the requested range cannot be satisfied")
        return data

    monkeypatch.setattr(FlakyFileSystem, "cat_file", whole)
    assert store.open("empty.jpg").read() == b""
    with store.open("a.jpg", block_bytes=4) as file:
        assert (file.read(3), file.seek(8), file.read(), file.read()) == (b"pic", 8, b"a", b"")
    assert waits == []


def test_threads_read_side_by_side(flaky, store):
    flaky.pipe({f"/p/{n}.jpg": b"%d" % n * 1000 for n in range(50)})
    with ThreadPoolExecutor(8) as pool:
        for n, data in enumerate(pool.map(lambda n: store.open(f"{n}.jpg", 512).read(), range(50))):
            assert data == b"%d" % n * 1000


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("nonsense://bucket/x", "nonsense"),
        ("flaky://nothing/there", "nothing is stored there"),
        ("file:///nowhere/at/all", "nothing is stored there"),
    ],
)
def test_addresses_that_cannot_be_read_stop_the_run(flaky, location, told):
    with pytest.raises(UserError, match=told):
        open_store(location)


def test_the_package_of_a_scheme_is_named(monkeypatch):
    monkeypatch.setitem(known_implementations, "bucket", {"class": "absent_package.Class", "err": "Install bucketfs"})
    with pytest.raises(UserError, match="Install bucketfs") as caught:
        open_store("bucket://name:password@somewhere/x")
    assert "password" not in str(caught.value)


def test_a_store_that_is_down_stops_the_run_at_its_start(flaky, monkeypatch, waits):
    monkeypatch.setattr(FlakyFileSystem, "info", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"cannot be read: .*ZeroDivisionError"):
        open_store("flaky://p", retrying=Retrying(sleep=waits.append))


def test_local_files_by_address(tmp_path):
    (tmp_path / "a b#c%20?.jpg").write_bytes(b"odd")
    (tmp_path / "sub").mkdir()
    store = open_store(f"file://{tmp_path}")
    assert store.read("a b#c%20?.jpg") == store.open("a b#c%20?.jpg").read() == b"odd"
    with pytest.raises(FileNotFoundError):
        store.read("sub")
    with pytest.raises(UnsafeName):
        store.read("../x")
