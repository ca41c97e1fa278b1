"""Folders of pictures: names that lead elsewhere, what is no plain file, the order of frames."""

from __future__ import annotations

import os

import pytest

from dc_megatron.config import DataSource
from dc_megatron.data import image_store
from dc_megatron.data.image_store import FolderStore, UnsafeName, frames_of, open_store, open_stores
from dc_megatron.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Pictures below ``images``; beside it a file that no name may reach."""
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "images" / "a.jpg").write_bytes(b"picture a")
    (tmp_path / "images" / "sub" / "b.jpg").write_bytes(b"picture b")
    return tmp_path / "images"


def test_files_are_read_whole_and_opened(folder):
    store = open_store(str(folder))
    assert isinstance(store, FolderStore)
    assert store.read("a.jpg") == b"picture a"
    assert store.read("./sub//../sub/b.jpg") == b"picture b"
    with store.open("sub/b.jpg") as file:
        assert (file.seek(8), file.read()) == (8, b"b")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.jpg",
        "sub/../../secret.jpg",
        "..",
        "/etc/passwd",
        "//etc/passwd",
        "../../etc/passwd",
        "sub/" + "../" * 50 + "etc/passwd",
        "..\\secret.jpg",
        "sub\\..\\..\\secret.jpg",
        "\\\\server\\share\\a.jpg",
        "C:\\a.jpg",
        "c:/a.jpg",
        "a.jpg\0.png",
    ],
)
def test_names_that_lead_out_are_refused_before_anything_is_opened(folder, name, monkeypatch):
    store = FolderStore(str(folder))
    monkeypatch.setattr(os, "stat", lambda *_, **__: pytest.fail("looked at the file"))
    for method in (store.open, store.read, store.list):
        with pytest.raises(UnsafeName) as caught:
            method(name)
        assert "\0" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", ".", "sub", "no.jpg", "a.jpg/b.jpg", "x" * 5000, "d/" * 4000, "\ud800.jpg", "loop", "pipe", "\n.jpg"]
)
def test_what_is_no_plain_file_is_missing_with_a_short_message(folder, name):
    os.symlink("loop", folder / "loop")
    os.mkfifo(folder / "pipe")
    store = FolderStore(str(folder))
    for method in (store.open, store.read):
        with pytest.raises(FileNotFoundError) as caught:
            method(name)
        assert len(str(caught.value)) < 500
        str(caught.value).encode()
    assert len(store.where(name)) < 500


def test_links_inside_the_folder_are_followed(folder):
    os.symlink(folder.parent / "secret.jpg", folder / "link.jpg")
    assert FolderStore(str(folder)).read("link.jpg") == b"secret"


def test_without_a_location_names_are_plain_paths(folder, monkeypatch):
    monkeypatch.chdir(folder)
    store = open_store("")
    assert store.read(str(folder / "a.jpg")) == b"picture a"
    assert store.read("../secret.jpg") == b"secret"
    with pytest.raises(FileNotFoundError):
        store.read("")


def test_an_unreadable_file_is_an_error_but_not_a_missing_one(folder, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(PermissionError):
        FolderStore(str(folder)).open("a.jpg")


def test_a_file_too_large_for_a_picture_is_not_read(folder):
    with open(folder / "huge.jpg", "wb") as file:
        file.truncate(image_store.MAX_WHOLE_BYTES + 1)
    store = FolderStore(str(folder))
    with pytest.raises(OSError, match="limit"):
        store.read("huge.jpg")
    store.open("huge.jpg").close()


def test_frames_are_listed_in_natural_order(folder):
    frames = folder / "clip"
    (frames / "more.jpg").mkdir(parents=True)
    for name in ("frame10.jpg", "frame2.PNG", "frame1.jpg", "notes.txt", ".hidden.jpg", "._frame1.jpg"):
        (frames / name).touch()
    store = FolderStore(str(folder))
    assert store.list("clip") == ["clip/frame1.jpg", "clip/frame2.PNG", "clip/frame10.jpg"]
    assert store.list("clip/") == store.list("clip")
    for name in store.list("clip"):
        assert store.read(name) == b""
    for name in ("a.jpg", "none", ""):
        with pytest.raises(FileNotFoundError):
            store.list(name)


def test_natural_order_takes_any_names():
    names = [f"{stem}.jpg" for stem in ("a" + "9" * 5000, "b", "a10", "1a", "a1", "01", "1", "x٣")]
    assert frames_of("v", names)[:4] == ["v/01.jpg", "v/1.jpg", "v/1a.jpg", "v/a1.jpg"]
    assert len(frames_of("v", names)) == len(names)


@pytest.mark.parametrize("location", ["nowhere", "pictures.tar.gz", "pictures.tgz", "nowhere.tar"])
def test_a_location_where_nothing_is_stops_the_run(location):
    with pytest.raises(UserError, match="--image_folder"):
        open_store(location)


def test_a_folder_stays_a_folder_whatever_its_name(tmp_path):
    (tmp_path / "x.tar").mkdir()
    assert isinstance(open_store(str(tmp_path / "x.tar")), FolderStore)


def test_sources_at_one_location_share_a_store(folder):
    here, other = str(folder), str(folder / "sub")
    stores = open_stores([DataSource("1.json", here), DataSource("2.json", other), DataSource("3.json", here, 0.5)])
    assert [store.location for store in stores] == [here, other, here]
    assert stores[0] is stores[2]


def test_whole_paths_below_the_folder_are_inside_it(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.jpg").write_bytes(b"b")
    (tmp_path / "c.jpg").write_bytes(b"c")
    store = FolderStore(str(tmp_path / "a"))
    assert store.read(str(tmp_path / "a" / "b.jpg")) == b"b"
    for name in (tmp_path / "c.jpg", tmp_path / "a" / ".." / "c.jpg", "/etc/passwd"):
        with pytest.raises(UnsafeName):
            store.read(str(name))
    # Names of all kinds start from the root.
    assert FolderStore("/").read(str(tmp_path / "c.jpg")) == b"c"
