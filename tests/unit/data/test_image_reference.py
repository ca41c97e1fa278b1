"""The PIL reference against the processors of transformers, the original's padding and its AnyRes tiles."""

import io
import math

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from dc_megatron.data.image_reference import (
    FORMATS,
    as_rgb,
    geometry,
    normalise,
    open_image,
    preprocess,
    substitute,
    tiles_of,
)
from tests.helpers.data_files import photo, vision_config
from tests.helpers.image_requests import tiling_for

SIZES = [(40, 40), (41, 67), (67, 41), (300, 17), (17, 300), (5, 3), (28, 28), (29, 28), (99, 100), (640, 479)]


def processor(vision):
    size, mean, deviation = vision.image_size, list(vision.image_mean), list(vision.image_std)
    if vision.family == "clip":
        return CLIPImageProcessorPil(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_mean=mean,
            image_std=deviation,
        )
    return SiglipImageProcessorPil(size={"height": size, "width": size}, image_mean=mean, image_std=deviation)


def squared(image, colour):
    """The original's padding, restated: a square canvas, the picture in its middle."""
    side = max(image.size)
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    canvas[:] = colour
    top, left = (side - image.height) // 2, (side - image.width) // 2
    canvas[top : top + image.height, left : left + image.width] = np.asarray(image)
    return Image.fromarray(canvas)


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
@pytest.mark.parametrize("image_size", [28, 35])
def test_equals_the_processor_of_transformers(tmp_path, family, aspect_ratio, image_size):
    vision = vision_config(family, image_size)
    reference = processor(vision)
    for number, (width, height) in enumerate(SIZES):
        path = photo(tmp_path / f"{number}.png", width, height, seed=number)
        image = Image.open(path).convert("RGB")
        if aspect_ratio == "pad":
            image = squared(image, vision.pad_color)
        expected = np.asarray(reference(image, return_tensors="np")["pixel_values"])[0]
        got = preprocess(path, vision, aspect_ratio)
        assert got.shape == expected.shape == (3, image_size, image_size)
        assert got.dtype == np.float32
        assert np.abs(got - expected).max() <= 1e-6, (width, height)


def test_pad_colours_are_the_originals():
    assert vision_config("clip").pad_color == (122, 116, 104)
    assert vision_config("siglip").pad_color == (127, 127, 127)
    assert np.abs(substitute(vision_config("clip"))).max() < 0.02


def test_exif_orientation_is_not_applied(tmp_path):
    vision = vision_config()
    image = Image.open(photo(tmp_path / "a.png", 40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image.save(tmp_path / "upright.jpg", quality=95)
    turned, upright = (preprocess(tmp_path / name, vision, "pad") for name in ("turned.jpg", "upright.jpg"))
    assert (turned == upright).all()


def llava_tiles(image, pinpoints, size):
    """LLaVA's process_anyres_image, restated: the whole picture squashed, then the tiles of its grid."""
    best, most, least = None, 0, float("inf")
    for across, down in pinpoints:
        scale = min(across / image.width, down / image.height)
        effective = min(int(image.width * scale) * int(image.height * scale), image.width * image.height)
        wasted = across * down - effective
        if effective > most or (effective == most and wasted < least):
            best, most, least = (across, down), effective, wasted
    scales = best[0] / image.width, best[1] / image.height
    if scales[0] < scales[1]:
        fitted = best[0], min(math.ceil(image.height * scales[0]), best[1])
    else:
        fitted = min(math.ceil(image.width * scales[1]), best[0]), best[1]
    canvas = Image.new("RGB", best, (0, 0, 0))
    canvas.paste(image.resize(fitted), ((best[0] - fitted[0]) // 2, (best[1] - fitted[1]) // 2))
    corners = [(x, y) for y in range(0, best[1], size) for x in range(0, best[0], size)]
    return [image.resize((size, size)), *(canvas.crop((x, y, x + size, y + size)) for x, y in corners)]


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_anyres_tiles_are_the_originals(tmp_path, family):
    vision = vision_config(family, 28)
    tiling, reference = tiling_for(vision, "anyres"), processor(vision)
    for number, (width, height) in enumerate(SIZES):
        path = photo(tmp_path / f"{number}.png", width, height, seed=number)
        tiles = llava_tiles(Image.open(path), tiling.pinpoints, 28)
        assert len(tiles) == tiling.of(width, height).tiles
        expected = np.stack([np.asarray(reference(tile, return_tensors="np")["pixel_values"])[0] for tile in tiles])
        got = tiles_of(path, vision, tiling, range(len(tiles)))
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= 1e-6, (width, height)
        assert (tiles_of(path, vision, tiling, range(1, 3)) == got[1:3]).all()


def test_anyres_tiles_are_those_of_the_processor_that_an_export_names(tmp_path):
    vision = vision_config("clip", 28)
    tiling = tiling_for(vision, "anyres")
    settings = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    settings |= {"image_mean": list(vision.image_mean), "image_std": list(vision.image_std)}
    # transformers takes (height, width).
    reference = LlavaNextImageProcessorPil(image_grid_pinpoints=[list(p[::-1]) for p in tiling.pinpoints], **settings)
    for width, height in ((41, 67), (300, 17), (29, 28), (640, 479)):
        path = photo(tmp_path / f"{width}.png", width, height)
        expected = np.asarray(reference(Image.open(path), return_tensors="np")["pixel_values"])[0]
        got = tiles_of(path, vision, tiling, range(tiling.of(width, height).tiles))
        assert np.abs(got - expected).max() <= 1e-6, (width, height)


def test_a_normalised_byte_is_rounded_as_the_processors_round():
    vision = vision_config("clip")
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    scaled = (every.transpose(2, 0, 1).astype(np.float64) * (1 / 255)).astype(np.float32)
    mean, deviation = (np.array(v, np.float32)[:, None, None] for v in (vision.image_mean, vision.image_std))
    assert (normalise(every, vision) == (scaled - mean) / deviation).all()


@pytest.mark.parametrize(("width", "height"), [(4100, 8), (60_000, 60_000), (0, 5)])
def test_shapes_that_cannot_be_used_are_refused_by_the_header(width, height):
    png = bytearray(png_of(8, 8))
    png[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    with pytest.raises((OSError, ValueError)):
        open_image(io.BytesIO(bytes(png)))


def test_padding_has_the_limit_of_decoding():
    vision = vision_config("clip")
    assert geometry(13_000, 200, vision, "pad").canvas_size == (13_000, 13_000)
    with pytest.raises(ValueError, match="too large to pad"):
        geometry(14_000, 200, vision, "pad")
    geometry(14_000, 200, vision, "square")


def png_of(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_formats_that_run_programs_are_no_pictures():
    assert {"JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"} <= set(FORMATS)
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with Image.open(io.BytesIO(drawing)) as image:
        assert image.format == "EPS"
    with pytest.raises(OSError, match="cannot identify"):
        as_rgb(io.BytesIO(drawing))


def test_any_error_of_a_reader_is_a_value_error(monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: [][1])
    with pytest.raises(ValueError, match="IndexError: list index"):
        as_rgb(io.BytesIO(png_of(3, 3)))
