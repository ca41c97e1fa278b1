"""Sizes and oddities from headers, few bytes read, and every way in which a picture cannot be used."""

import errno
import io
import zlib

import numpy as np
import pytest
from PIL import Image

from dc_megatron.data.faults import RecordFault
from dc_megatron.data.image_header import NOTES, read_header
from dc_megatron.data.image_store import ImageStore, open_store
from dc_megatron.data.retrying import StoreFailure
from dc_megatron.errors import UserError
from tests.helpers.data_files import photo


@pytest.fixture
def folder(tmp_path):
    photo(tmp_path / "plain.jpg", 80, 64)
    return tmp_path


def header(folder, name):
    return read_header(open_store(str(folder)), name)


def fault(folder, name):
    with pytest.raises(RecordFault) as caught:
        header(folder, name)
    return caught.value.reason, caught.value.detail


def sixteen_bit_png(path):
    """A PNG with 16 bits a colour, which PIL reads and cannot write."""

    def chunk(kind, content):
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    size = (20).to_bytes(4) * 2 + bytes([16, 2, 0, 0, 0])
    pixels = zlib.compress(bytes(20 * (1 + 20 * 6)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def odd_pictures(folder):
    """name -> the notes it should have."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.Exif()
    upright[0x0112] = 1
    grey = Image.new("L", (40, 32), 128)
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    photo(folder / "turned.jpg", exif=exif)
    photo(folder / "upright.jpg", exif=upright)
    photo(folder / "broken_exif.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    photo(folder / "cmyk.jpg", mode="CMYK")
    photo(folder / "alpha.png", mode="RGBA")
    grey.save(folder / "grey.png")
    grey.convert("P").save(folder / "palette.png")
    Image.fromarray(np.zeros((20, 20), dtype=np.uint16)).save(folder / "deep_grey.png")
    sixteen_bit_png(folder / "deep.png")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (40, 7)).save(folder / "low.png")
    Image.new("1", (8000, 6251)).save(folder / "large.png")
    grey.save(folder / "still.gif")
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return {
        "plain.jpg": (),
        "turned.jpg": ("exif_rotated",),
        "upright.jpg": (),
        "broken_exif.jpg": (),
        "cmyk.jpg": ("cmyk",),
        "alpha.png": ("palette_or_alpha",),
        "grey.png": (),
        "palette.png": ("palette_or_alpha",),
        "deep_grey.png": ("16_bit",),
        "deep.png": ("16_bit",),
        "dot.png": ("one_pixel",),
        "low.png": ("tiny",),
        "large.png": ("huge",),
        "still.gif": ("gif",),
        "moving.gif": ("gif", "animated"),
    }


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_oddities_are_noted(folder):
    expected = odd_pictures(folder)
    assert {name: header(folder, name).notes for name in expected} == expected
    assert {note for notes in expected.values() for note in notes} == set(NOTES)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_sizes_are_those_of_the_decoded_picture(folder):
    for name in odd_pictures(folder):
        with Image.open(folder / name) as image:
            found = header(folder, name)
            assert (found.width, found.height) == image.size
            assert (found.format, found.mode) == (image.format, image.mode)


class CountingStore(ImageStore):
    """Files in memory; counts the bytes that are read of them."""

    location = "memory"

    def __init__(self, content):
        self.content, self.taken = content, 0

    def open(self, name, block_bytes=0):
        store = self

        class Counted(io.BytesIO):
            def read(self, *size):
                data = super().read(*size)
                store.taken += len(data)
                return data

        return Counted(self.content)

    def read(self, name):
        raise AssertionError("a header needs no whole file")

    def list(self, name):
        raise AssertionError


def test_pixels_are_not_read(folder):
    noise = np.random.RandomState(0).randint(0, 256, (900, 1200, 3), dtype=np.uint8)
    for kind in ("JPEG", "PNG", "GIF", "BMP"):
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, kind)
        store = CountingStore(stream.getvalue())
        assert read_header(store, "x").width == 1200
        assert store.taken < 5000 or kind == "GIF", (kind, store.taken)


def test_pictures_that_cannot_be_used(folder):
    (folder / "text.jpg").write_bytes(b"not an image")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "half.png").write_bytes((folder / "plain.jpg").read_bytes()[:30])
    (folder / "folder.jpg").mkdir()
    photo(folder / "strip.png", 4100, 8)
    for name in ("text.jpg", "empty.jpg", "half.png", "strip.png"):
        reason, detail = fault(folder, name)
        assert reason == RecordFault.CORRUPT_IMAGE
        assert detail.startswith(str(folder / name))
    assert "too narrow" in fault(folder, "strip.png")[1]
    for name in ("none.jpg", "plain.jpg/x.jpg", "folder.jpg", "x" * 5000, "\ud800.jpg"):
        assert fault(folder, name)[0] == RecordFault.MISSING_IMAGE
    for name in ("../plain.jpg", "/etc/passwd", "a/../../x", "nul\0.jpg", "..\\..\\x"):
        assert fault(folder, name)[0] == RecordFault.UNSAFE_PATH


class FailingStore(CountingStore):
    def __init__(self, error):
        self.error = error

    def open(self, name, block_bytes=0):
        raise self.error


def test_a_store_that_fails_is_no_fault_of_the_record():
    with pytest.raises(UserError, match=r"--image_folder memory: bucket: failed 5 times.*start again"):
        read_header(FailingStore(StoreFailure("bucket: failed 5 times")), "x")
    with pytest.raises(RecordFault, match=r"corrupt image: memory/x: cannot be read.*denied"):
        read_header(FailingStore(PermissionError(errno.EACCES, "denied")), "x")
