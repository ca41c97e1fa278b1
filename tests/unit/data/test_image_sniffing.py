"""What is told from the bytes of a picture: against PIL, for files of every kind, and for files that are none."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from dc_megatron.benchmark.jpeg_writer import write_jpeg
from dc_megatron.benchmark.picture_files import KINDS, SMALL_KINDS, photograph
from dc_megatron.data.image_sniffing import plain_size


def encoded(kind, width=61, height=47):
    return (KINDS | SMALL_KINDS)[kind](photograph(np.random.default_rng(0), width, height))


def saved(kind, mode="RGB", **options):
    file = io.BytesIO()
    photograph(np.random.default_rng(0), 61, 47).convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS | SMALL_KINDS)
def test_sizes_are_pils_and_odd_kinds_are_not_plain(kind):
    odd = not kind.startswith(("JPEG", "PNG")) or kind.split()[-1] in ("CMYK", "RGB", "alpha", "palette", "bit")
    assert plain_size(encoded(kind)) == (None if odd else (61, 47))


def test_rarer_kinds_that_are_plain():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert plain_size(saved("JPEG", exif=exif, comment=b"x" * 300, icc_profile=b"\0" * 70_000)) == (61, 47)
    assert plain_size(saved("JPEG", restart_marker_blocks=2) + b"\0\0\0") == (61, 47)
    # Neither JFIF nor Adobe says what the components are; their numbers do.
    written = write_jpeg(np.zeros((16, 16, 3), np.uint8), (2, 2))
    assert plain_size(written) == (16, 16)
    bare = written[:2] + written[2 + 2 + 16 :]
    assert plain_size(bare) == (16, 16)
    frame = bare.index(b"\xff\xc0")
    assert plain_size(bare[: frame + 10] + b"R" + bare[frame + 11 :]) is None


def test_rarer_kinds_that_are_not_plain():
    written = write_jpeg(np.zeros((16, 16, 3), np.uint8), (1, 1))
    frame = written.index(b"\xff\xc0")
    # Lossless and arithmetic frames, twelve bits.
    for place, value in ((1, 0xC3), (1, 0xC9), (1, 0xCA), (4, 12)):
        changed = bytearray(written)
        changed[frame + place] = value
        assert plain_size(bytes(changed)) is None
    assert plain_size(saved("JPEG")[:-2]) is None
    assert plain_size(saved("JPEG") + b"more") is None
    assert plain_size(saved("PNG", transparency=(1, 2, 3))) is None
    assert plain_size(saved("PNG", mode="I;16") if "I;16" in Image.MODES else saved("PNG", mode="I")) is None
    png = saved("PNG")
    assert plain_size(png[:28] + b"\1" + png[29:]) is None
    assert plain_size(png[:-40]) is None
    first = photograph(np.random.default_rng(0), 30, 30)
    file = io.BytesIO()
    first.save(file, "MPO", save_all=True, append_images=[first])
    assert plain_size(file.getvalue()) is None


def test_any_bytes_have_an_answer():
    chance = random.Random(0)
    for kind in ("JPEG 4:2:0", "PNG", "JPEG 4:1:1"):
        data = encoded(kind)
        for length in range(min(len(data), 700)):
            plain_size(data[:length])
            plain_size(data[:length] + b"\xff\xd9")
            plain_size(data[:length] + b"IEND\xae\x42\x60\x82")
        for _ in range(2000):
            changed = bytearray(data)
            for _ in range(chance.randint(1, 4)):
                changed[chance.randrange(min(len(changed), 400))] = chance.randrange(256)
            plain_size(bytes(changed))
    for _ in range(2000):
        plain_size(chance.choice([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"]) + chance.randbytes(60) + b"\xff\xd9")
