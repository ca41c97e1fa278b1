"""The PIL reference against the processors of transformers and the original's padding."""

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from dc_megatron.data.faults import RecordFault
from dc_megatron.data.image_reference import check_header, preprocess, substitute
from tests.helpers.data_files import photo, vision_config

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


def test_headers_are_checked_without_decoding(tmp_path):
    check_header(photo(tmp_path / "good.jpg"))
    (tmp_path / "bad.jpg").write_bytes(b"not an image")
    photo(tmp_path / "strip.png", 4100, 8)
    with pytest.raises(RecordFault) as corrupt:
        check_header(str(tmp_path / "bad.jpg"))
    assert corrupt.value.reason == RecordFault.CORRUPT_IMAGE
    with pytest.raises(RecordFault, match="too narrow"):
        check_header(str(tmp_path / "strip.png"))
    with pytest.raises(RecordFault) as missing:
        check_header(str(tmp_path / "none.jpg"))
    assert missing.value.reason == RecordFault.MISSING_IMAGE
