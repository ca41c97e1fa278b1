"""The benchmarks of decoding, small: what they count, compare and say."""

import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dc_megatron.benchmark import decode, pixels
from dc_megatron.benchmark.picture_files import MIXED_SIZES, mixed_photographs, varied_pictures
from dc_megatron.data.picture import make_picture
from dc_megatron.errors import UserError
from tests.helpers.image_requests import tiling_for


@pytest.fixture(autouse=True)
def threads_of_torch():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_small_decode_benchmark():
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    told = []
    result = decode.benchmark_decode(count=6, rounds=2, threads=2, report=told.append)
    assert [entry["quantity"].split(":")[0] for entry in result["limits"]] == ["pad", "square"]
    for found in result["aspect_ratios"].values():
        for name, rates in found.items():
            if rates == decode.NOT_INSTALLED:
                assert name == decode.SHOWN
                continue
            assert len(rates["pictures_per_second"]) == len(rates["ratios"]) == 2
            base = found[decode.BASELINE]["pictures_per_second"]
            assert rates["ratios"] == [
                mine / theirs for mine, theirs in zip(rates["pictures_per_second"], base, strict=True)
            ]
    text = decode.as_text(result)
    assert "pad, dali" in text
    assert re.search(
        r"(holds|FAILS): square: pictures a second / those of transformers, PIL: \d+\.\d+ \(at least 2.5\)", text
    )
    assert "/tmp" not in json.dumps(result)
    assert len(told) >= 2 * 2 * 3


def test_contenders_make_the_same_pictures(tmp_path):
    vision = pixels.tower("clip")
    files = mixed_photographs(3, seed=4)
    for number, file in enumerate(files):
        (tmp_path / str(number)).write_bytes(file.data)
    for ratio in decode.ASPECT_RATIOS:
        tiling = tiling_for(vision, ratio)
        pictures = [make_picture(tiling, str(n), file.width, file.height) for n, file in enumerate(files)]
        base = decode._transformers("pil", vision, ratio, str(tmp_path), 2)(pictures)
        ours = decode._ours("pil", vision, ratio, str(tmp_path), 2)(pictures)
        assert base.shape == ours.shape == (3, 3, 336, 336)
        assert (base - ours).abs().max() <= 1e-6


def test_numbers_below_one_are_refused():
    with pytest.raises(UserError, match="--rounds"):
        decode.benchmark_decode(count=1, rounds=0)
    with pytest.raises(UserError, match="--pictures 1"):
        pixels.benchmark_pixels(1)


def test_mixed_photographs_have_the_sizes_and_weights_said():
    files = mixed_photographs(20, seed=0)
    assert sum(share for share, _, _ in MIXED_SIZES) == 100
    # 32 of 100 have 640 x 480 pixels, 20 of 100 have 640 x 427.
    assert sum((file.width, file.height) == (640, 480) for file in files) in (6, 7)
    assert sum((file.width, file.height) == (640, 427) for file in files) == 4
    weights = [len(file.data) / file.width / file.height for file in files]
    assert 0.5 < np.mean(weights) < 0.6
    assert mixed_photographs(2, seed=0)[1].data == mixed_photographs(2, seed=0)[1].data


def test_varied_pictures_have_their_sizes():
    pictures = list(varied_pictures(24, seed=2, longest=(300, 200)))
    assert (pictures[0].width, pictures[0].height) == (1, 1)
    assert (pictures[1].width, pictures[1].height) == (300, 200)
    for picture in pictures:
        with Image.open(io.BytesIO(picture.data)) as image:
            assert image.size == (picture.width, picture.height)
            assert image.format.upper() == picture.kind.split()[0].upper()


def test_differences_are_summed_up():
    entry = {"picture": None, "family": "clip", "aspect_ratio": "pad"}
    plain = [{**entry, "plain": True, "mean": mean, "max": 10 * mean} for mean in (0.1, 0.2, 0.6)]
    result = pixels.summary([*plain, {**entry, "plain": False, "mean": 0.0, "max": 0.0}])
    (row,) = result["differences"]
    assert (row["plain_pictures"], row["other_pictures"], row["max"], row["max_of_a_pixel"]) == (3, 1, 0.6, 6.0)
    assert row["mean"] == pytest.approx(0.3)
    assert [limit["holds"] for limit in result["limits"]] == [False, True]
    text = pixels.as_text({"pictures": 4, "device": "cpu", **result})
    assert "FAILS: mean difference of a picture, of 255: 0.6000" in text
    assert "holds: difference where PIL decodes" in text
