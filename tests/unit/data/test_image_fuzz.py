"""Damaged pictures through the loader: no crash, no hang, and every picture is either decoded or counted."""

import io
import logging
import random

import numpy as np
import pytest
import torch

from dc_megatron.benchmark.picture_files import KINDS, SMALL_KINDS, StoreInMemory, photograph
from dc_megatron.data.image_loading import image_loader
from dc_megatron.data.image_reference import FORMATS, substitute
from tests.helpers.data_files import vision_config
from tests.helpers.image_requests import request, tiling_for

SIZE = (37, 29)


def good_files():
    """One file of each kind and format, all of SIZE."""
    image = photograph(np.random.default_rng(3), *SIZE)
    files = [encode(image) for encode in (KINDS | SMALL_KINDS).values()]
    for name in FORMATS:
        file = io.BytesIO()
        image.save(file, name)
        files.append(file.getvalue())
    return files


def damaged(chance: random.Random, files: list[bytes]) -> bytes:
    """A file with one to three kinds of damage, or no picture at all."""
    data = bytearray(chance.choice(files))
    for _ in range(chance.randint(1, 3)):
        kind, place = chance.randrange(8), chance.randrange(len(data) or 1)
        # Half of the damage in headers: there it does more.
        place = min(place, chance.choice([60, len(data)]))
        if kind == 0:
            del data[place:]
        elif kind == 1:
            for _ in range(chance.randint(1, 8)):
                if data:
                    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif kind == 2:
            data[place : place + chance.randint(1, 16)] = chance.randbytes(chance.randint(1, 16))
        elif kind == 3:
            data[place : place + 4] = chance.choice(
                [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xd9"]
            )
        elif kind == 4:
            del data[place : place + chance.randint(1, 40)]
        elif kind == 5:
            data[place:place] = data[place : place + chance.randint(1, 60)]
        elif kind == 6:
            other = chance.choice(files)
            data[place:] = other[chance.randrange(len(other)) :]
        else:
            data = bytearray(chance.randbytes(chance.randint(0, 200))) if chance.random() < 0.2 else data
    return bytes(data)


def load_damaged(seed: int, count: int, aspect_ratio: str, caplog) -> tuple[int, int]:
    """(decoded, failed) of ``count`` files, with everything checked that holds for each."""
    vision = vision_config(image_size=28)
    chance, files = random.Random(seed), good_files()
    loader = image_loader("auto", vision, aspect_ratio, tiling_for(vision, aspect_ratio), threads=2)
    blank, failures = torch.from_numpy(substitute(vision)), 0
    for start in range(0, count, 100):
        store = StoreInMemory({f"{start + n}.jpg": damaged(chance, files) for n in range(100)})
        good = request(StoreInMemory({"good": files[0]}), "good", loader.tiling, SIZE)
        requests = [*(request(store, name, loader.tiling, SIZE) for name in store.names()), good]
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="dc_megatron"):
            pixels, failed = loader.load(requests)
        parts = pixels.split([len(one.tiles) for one in requests])
        assert len(parts) == len(requests)
        assert pixels.isfinite().all()
        # A good picture among damaged ones is itself, and every failure is named.
        assert 100 not in failed
        assert all((parts[number] == blank).all() for number in failed)
        named = {record.getMessage().split()[1] for record in caplog.records if "cannot be decoded" in record.msg}
        assert named == {requests[number].picture.name for number in failed}
        failures += len(failed)
    return count - failures, failures


@pytest.mark.parametrize("aspect_ratio", ["pad", "square", "anyres"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_pictures_are_decoded_or_counted(caplog, aspect_ratio):
    decoded, failed = load_damaged(11, 1000, aspect_ratio, caplog)
    # Both happen often: the damage is neither harmless nor total.
    assert min(decoded, failed) > 100


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_ten_thousand_damaged_pictures_are_decoded_or_counted(caplog):
    for seed, aspect_ratio in ((21, "pad"), (22, "square"), (23, "anyres")):
        decoded, failed = load_damaged(seed, 3400, aspect_ratio, caplog)
        assert decoded + failed == 3400
        assert min(decoded, failed) > 340
