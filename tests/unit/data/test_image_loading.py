"""DALI against the PIL reference, and what happens to files that cannot be decoded."""

import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dc_megatron.data.image_loading import PilImageLoader, image_loader
from dc_megatron.data.image_reference import preprocess, substitute
from dc_megatron.errors import UserError
from tests.helpers.data_files import photo, vision_config

SIZES = [(80, 64), (64, 80), (41, 67), (150, 33), (33, 150), (56, 56), (57, 56), (20, 20), (333, 251)]


def dali_loader(vision, aspect_ratio, **options):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from dc_megatron.data.image_dali import DaliImageLoader

    return DaliImageLoader(vision, aspect_ratio, **options)


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
def test_dali_is_close_to_the_reference(tmp_path, family, aspect_ratio):
    vision = vision_config(family, 56)
    files = [photo(tmp_path / f"{n}.jpg", w, h, seed=n, quality=90) for n, (w, h) in enumerate(SIZES)]
    files += [photo(tmp_path / "grey.jpg", mode="L"), photo(tmp_path / "progressive.jpg", progressive=True)]
    files += [photo(tmp_path / f"{n}.png", w, h, seed=n) for n, (w, h) in enumerate(SIZES[:3])]
    pixels, failed = dali_loader(vision, aspect_ratio, max_batch_size=4).load(files)
    assert failed == []
    assert pixels.dtype == torch.float32
    scale = 255 * np.array(vision.image_std)[:, None, None]
    for path, image in zip(files, pixels.numpy(), strict=True):
        difference = np.abs(image - preprocess(path, vision, aspect_ratio)) * scale
        assert difference.mean() < 0.5, path
        assert difference.max() < 8, path


def test_dali_really_decodes_plain_files(tmp_path, monkeypatch):
    loader = dali_loader(vision_config(image_size=56), "square")
    monkeypatch.setattr(loader, "_reference", lambda *_: pytest.fail("went through PIL"))
    loader.load([photo(tmp_path / "a.jpg"), photo(tmp_path / "b.png"), photo(tmp_path / "c.jpg", mode="L")])


def odd_files(folder):
    """Files that DALI refuses or reads in another way; PIL reads them all."""
    files = [
        photo(folder / "a.gif"),
        photo(folder / "cmyk.jpg", mode="CMYK"),
        photo(folder / "palette.png", mode="P"),
        photo(folder / "alpha.png", mode="RGBA"),
        photo(folder / "a.webp"),
        photo(folder / "a.bmp"),
        photo(folder / "coded_as_rgb.jpg", keep_rgb=True),
    ]
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 15).save(folder / "sixteen.png")
    return [*files, str(folder / "sixteen.png")]


def test_what_dali_cannot_take_is_the_reference_exactly(tmp_path):
    vision = vision_config(image_size=56)
    files = odd_files(tmp_path)
    pixels, failed = dali_loader(vision, "pad").load([photo(tmp_path / "plain.jpg"), *files])
    assert failed == []
    for path, image in zip(files, pixels[1:].numpy(), strict=True):
        assert (image == preprocess(path, vision, "pad")).all(), path


def broken_files(folder):
    good = Path(photo(folder / "good.jpg", 80, 64)).read_bytes()
    png = Path(photo(folder / "good.png")).read_bytes()
    contents = {
        "text.jpg": b"no image",
        "empty.jpg": b"",
        "cut.jpg": good[: len(good) // 2],
        "cut.png": png[:900],
        # Looks whole from outside: only the decoder finds out.
        "header_only.jpg": good[:200] + b"\xff\xd9",
        "hidden.png": _without_pixels(png),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in contents] + [str(folder / "missing.jpg")]


def _without_pixels(png):
    start = png.index(b"IDAT") + 4
    return png[:start] + b"\0" * 200 + png[start + 200 :]


def test_files_that_were_cut_off_do_not_cost_a_pipeline(tmp_path, monkeypatch):
    loader = dali_loader(vision_config(image_size=56), "pad")
    monkeypatch.setattr(loader, "_run", lambda *_: pytest.fail("went to DALI"))
    cut = [path for path in broken_files(tmp_path) if os.path.basename(path).startswith("cut.")]
    assert loader.load(cut)[1] == [0, 1]


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_broken_files_are_substituted_and_named_once(tmp_path, caplog, backend):
    vision = vision_config(image_size=56)
    broken = broken_files(tmp_path)
    good = photo(tmp_path / "good.jpg", 80, 64)
    loader = PilImageLoader(vision, "pad") if backend == "pil" else dali_loader(vision, "pad")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            pixels, failed = loader.load([good, *broken, good])
            assert failed == list(range(1, len(broken) + 1))
            for image in pixels[1:-1].numpy():
                assert (image == substitute(vision)).all()
            for image in (pixels[0], pixels[-1]):
                assert np.abs(image.numpy() - preprocess(good, vision, "pad")).mean() < 0.01
    for path in broken:
        assert sum(os.path.basename(path) in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("backend", ["pil", "auto"])
def test_no_files_give_an_empty_batch(backend):
    pixels, failed = image_loader(backend, vision_config(image_size=56), "pad").load([])
    assert (tuple(pixels.shape), failed) == ((0, 3, 56, 56), [])


def test_backends_are_chosen_by_name(monkeypatch):
    vision = vision_config()
    assert image_loader("pil", vision, "pad").name == "pil"
    with pytest.raises(UserError, match=r"--image-backend dal: .*did you mean 'dali'"):
        image_loader("dal", vision, "pad")
    # As on a machine without DALI.
    monkeypatch.setitem(sys.modules, "dc_megatron.data.image_dali", None)
    assert image_loader("auto", vision, "pad").name == "pil"
    with pytest.raises(UserError, match="--image-backend pil"):
        image_loader("dali", vision, "pad")
