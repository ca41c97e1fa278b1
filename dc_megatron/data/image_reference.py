"""The definition of correct pixels, with PIL: what the Hugging Face processors and LLaVA's ``pad`` compute.

square: CLIP resizes the shortest edge and crops the centre (CLIPImageProcessor), SigLIP resizes both edges
(SiglipImageProcessor). pad: LLaVA's expand2square on a canvas of int(mean * 255), then the same processor. EXIF
orientation is not applied, as in the original.
"""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dc_megatron.config import VisionConfig
from dc_megatron.data.faults import RecordFault

# A strip this narrow would be blown up to gigabytes before the crop throws almost all of it away.
MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class Geometry:
    """Where pixels go, as (vertical, horizontal) integers.

    canvas_start, canvas_size: the window cut from the decoded image (outside of it: the pad colour). resized: its size
    after bicubic resizing. crop_start: the corner of the final [image_size, image_size] window in that.
    """

    canvas_start: tuple[int, int]
    canvas_size: tuple[int, int]
    resized: tuple[int, int]
    crop_start: tuple[int, int]


def geometry(width: int, height: int, vision: VisionConfig, aspect_ratio: str) -> Geometry:
    """Sizes and offsets for an image of ``width`` x ``height``, rounded as the processors round.

    Raises ValueError for an image that is empty or narrower than 1 : MAX_ASPECT_RATIO.
    """
    short, long = min(width, height), max(width, height)
    if short < 1 or long > MAX_ASPECT_RATIO * short:
        raise ValueError(f"an image of {width} x {height} pixels is too narrow (limit 1 : {MAX_ASPECT_RATIO})")
    target = vision.image_size
    if aspect_ratio == "pad":
        start = (-((width - height) // 2), 0) if width > height else (0, -((height - width) // 2))
        return Geometry(start, (long, long), (target, target), (0, 0))
    if vision.family == "siglip":
        return Geometry((0, 0), (height, width), (target, target), (0, 0))
    # transformers get_resize_output_image_size: the long edge is truncated, not rounded.
    other = int(target * long / short)
    resized = (other, target) if height > width else (target, other)
    crop = ((resized[0] - target) // 2, (resized[1] - target) // 2)
    return Geometry((0, 0), (height, width), resized, crop)


def preprocess(image_file, vision: VisionConfig, aspect_ratio: str) -> np.ndarray:
    """float32 [3, image_size, image_size] of a path, a binary file object or a PIL image.

    Raises OSError, ValueError and the like (see DECODE_ERRORS) where the image cannot be read.
    """
    if isinstance(image_file, Image.Image):
        image = image_file.convert("RGB")
    else:
        with Image.open(image_file) as opened:
            image = opened.convert("RGB")
    place = geometry(image.width, image.height, vision, aspect_ratio)
    if aspect_ratio == "pad" and image.width != image.height:
        canvas = Image.new("RGB", place.canvas_size[::-1], vision.pad_color)
        canvas.paste(image, (-place.canvas_start[1], -place.canvas_start[0]))
        image = canvas
    image = image.resize(place.resized[::-1], Image.Resampling.BICUBIC)
    top, left = place.crop_start
    pixels = np.asarray(image)[top : top + vision.image_size, left : left + vision.image_size]
    return normalise(pixels, vision)


def normalise(pixels: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """uint8 [H, W, 3] to float32 [3, H, W], rescaled by 1/255 and normalised by the tower's mean and deviation."""
    scaled = (pixels.transpose(2, 0, 1).astype(np.float64) * (1 / 255)).astype(np.float32)
    mean = np.array(vision.image_mean, dtype=np.float32)[:, None, None]
    deviation = np.array(vision.image_std, dtype=np.float32)[:, None, None]
    return (scaled - mean) / deviation


def substitute(vision: VisionConfig) -> np.ndarray:
    """float32 [3, image_size, image_size]: the picture of the pad colour, which is 0 up to its rounding."""
    size = vision.image_size
    canvas = np.broadcast_to(np.array(vision.pad_color, dtype=np.uint8), (size, size, 3))
    return normalise(canvas, vision)


# What PIL raises for files that are no image, broken or too large; SyntaxError comes from its PNG reader.
DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    Image.DecompressionBombError,
)


def check_header(path: str) -> None:
    """Raise RecordFault unless ``path`` is a file whose header PIL can read and whose shape can be used.

    Costs one small read; the pixels are not decoded.
    """
    if not os.path.isfile(path):
        raise RecordFault(RecordFault.MISSING_IMAGE, f"no file {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
    except DECODE_ERRORS as error:
        raise RecordFault(RecordFault.CORRUPT_IMAGE, f"{path}: {error}") from None
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise RecordFault(RecordFault.CORRUPT_IMAGE, f"{path}: {width} x {height} pixels is too narrow to use")


def open_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def preprocess_bytes(data: bytes, vision: VisionConfig, aspect_ratio: str) -> np.ndarray:
    """``preprocess`` of an encoded image in memory."""
    return preprocess(io.BytesIO(data), vision, aspect_ratio)
