"""The definition of correct pixels, with PIL: what the Hugging Face processors and LLaVA's ``pad`` compute.

square: CLIP resizes the shortest edge and crops the centre (CLIPImageProcessor), SigLIP resizes both edges
(SiglipImageProcessor). pad: LLaVA's expand2square on a canvas of int(mean * 255), then the same processor. anyres:
LLaVA-1.6's process_anyres_image, the whole picture squashed into one tile, then the tiles of its grid. EXIF orientation
is not applied, as in the original.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dc_megatron.config import ImageTiling, VisionConfig
from dc_megatron.data.picture import Picture

# A strip this narrow would be blown up to gigabytes before the crop throws almost all of it away.
MAX_ASPECT_RATIO = 200
# PIL refuses to decode more; told from the header, so that a decompression bomb costs nothing.
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS
# PIL knows more formats: EPS starts a program to draw itself, and some have no signature to know them by.
_WANTED = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
Image.init()
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)


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

    Raises ValueError for an image that ``check_shape`` refuses.
    """
    check_shape(width, height)
    target = vision.image_size
    if aspect_ratio == "pad":
        long = max(width, height)
        if long * long > MAX_PIXELS:
            raise ValueError(f"an image of {width} x {height} pixels is too large to pad (limit {MAX_PIXELS} pixels)")
        start = (-((width - height) // 2), 0) if width > height else (0, -((height - width) // 2))
        return Geometry(start, (long, long), (target, target), (0, 0))
    if not vision.about.crops:
        return Geometry((0, 0), (height, width), (target, target), (0, 0))
    # transformers get_resize_output_image_size: the long edge is truncated, not rounded.
    short, long = min(width, height), max(width, height)
    other = int(target * long / short)
    resized = (other, target) if height > width else (target, other)
    crop = ((resized[0] - target) // 2, (resized[1] - target) // 2)
    return Geometry((0, 0), (height, width), resized, crop)


def check_shape(width: int, height: int) -> None:
    """Raise ValueError for an image that is empty, narrower than 1 : MAX_ASPECT_RATIO or larger than MAX_PIXELS."""
    short, long = min(width, height), max(width, height)
    if short < 1 or long > MAX_ASPECT_RATIO * short:
        raise ValueError(f"an image of {width} x {height} pixels is too narrow (limit 1 : {MAX_ASPECT_RATIO})")
    if width * height > MAX_PIXELS:
        raise ValueError(f"an image of {width} x {height} pixels is too large (limit {MAX_PIXELS} pixels)")


def preprocess(image_file, vision: VisionConfig, aspect_ratio: str) -> np.ndarray:
    """float32 [3, image_size, image_size] of a path, a binary file object or a PIL image; ``square`` or ``pad``.

    Raises OSError, ValueError and the like (see DECODE_ERRORS) where the image cannot be read.
    """
    image = as_rgb(image_file)
    place = geometry(image.width, image.height, vision, aspect_ratio)
    if aspect_ratio == "pad" and image.width != image.height:
        canvas = Image.new("RGB", place.canvas_size[::-1], vision.pad_color)
        canvas.paste(image, (-place.canvas_start[1], -place.canvas_start[0]))
        image = canvas
    image = image.resize(place.resized[::-1], Image.Resampling.BICUBIC)
    top, left = place.crop_start
    return normalise(_crop(np.asarray(image), top, left, vision.image_size), vision)


def tiles_of(image_file, vision: VisionConfig, tiling: ImageTiling, wanted: range) -> np.ndarray:
    """float32 [len(wanted), 3, image_size, image_size]: the AnyRes tiles ``wanted`` of an image (see ``as_rgb``).

    Tile 0 is the whole image, resized without keeping its aspect. The others are the grid's, row by row: the image is
    fitted into the best resolution, centred on black.
    """
    image = as_rgb(image_file)
    check_shape(image.width, image.height)
    shape, size = tiling.of(image.width, image.height), vision.image_size
    pixels = []
    if 0 in wanted:
        pixels.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))
    grid = [number for number in wanted if number > 0]
    if grid:
        canvas = Image.new("RGB", (shape.columns * size, shape.rows * size))
        fitted = image.resize(shape.fitted, Image.Resampling.BICUBIC)
        canvas.paste(fitted, ((canvas.width - fitted.width) // 2, (canvas.height - fitted.height) // 2))
        canvas = np.asarray(canvas)
        for number in grid:
            row, column = divmod(number - 1, shape.columns)
            pixels.append(_crop(canvas, row * size, column * size, size))
    return np.stack([normalise(tile, vision) for tile in pixels])


def pixels_of(
    image_file, vision: VisionConfig, aspect_ratio: str, tiling: ImageTiling, picture: Picture, wanted: range
) -> np.ndarray:
    """float32 [len(wanted), 3, image_size, image_size]: the tiles ``wanted`` of ``picture`` under any aspect ratio.

    image_file: as in ``as_rgb``. Under AnyRes an image that has not the indexed size is a ValueError: the sequence has
    positions for a picture of that size.
    """
    if aspect_ratio != "anyres":
        return preprocess(image_file, vision, aspect_ratio)[None]
    image = as_rgb(image_file)
    check_indexed_size(image.width, image.height, picture)
    return tiles_of(image, vision, tiling, wanted)


def pixels_of_bytes(data: bytes, *arguments) -> np.ndarray:
    """``pixels_of`` an encoded image in memory."""
    return pixels_of(io.BytesIO(data), *arguments)


def check_indexed_size(width: int, height: int, picture: Picture) -> None:
    """Raise ValueError where an image is not as large as the index says, or ``check_shape`` refuses it."""
    check_shape(width, height)
    if (width, height) != (picture.width, picture.height):
        raise ValueError(
            f"it has {width} x {height} pixels and had {picture.width} x {picture.height} when it was indexed"
        )


def as_rgb(image_file) -> Image.Image:
    """A path, a binary file object, a PIL image or an array uint8 [H, W, 3] as a decoded PIL image in RGB.

    Raises ValueError for a shape that ``check_shape`` refuses, before anything is decoded, and else DECODE_ERRORS.
    """
    if isinstance(image_file, np.ndarray):
        return Image.fromarray(image_file)
    if isinstance(image_file, Image.Image):
        return image_file.convert("RGB")
    with open_image(image_file) as opened:
        try:
            return opened.convert("RGB")
        # What PIL's readers trip over in a damaged file is any kind of error.
        except Exception as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


def open_image(image_file) -> Image.Image:
    """A path or a binary file object as a PIL image, of which only the header was read.

    Raises OSError or ValueError for what is no image in one of FORMATS, or has a shape that ``check_shape`` refuses.
    """
    try:
        image = Image.open(image_file, formats=FORMATS)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    try:
        check_shape(*image.size)
    except ValueError:
        image.close()
        raise
    return image


def _crop(pixels: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    return pixels[top : top + size, left : left + size]


def normalise(pixels: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """uint8 [H, W, 3] to float32 [3, H, W], rescaled by 1/255 and normalised by the tower's mean and deviation."""
    table = _normalised(tuple(vision.image_mean), tuple(vision.image_std))
    return np.stack([table[channel].take(pixels[:, :, channel]) for channel in range(3)])


@functools.cache
def _normalised(mean: tuple[float, ...], deviation: tuple[float, ...]) -> np.ndarray:
    """float32 [3, 256]: what each byte becomes in each channel, rounded as the processors round."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.array(mean, dtype=np.float32)[:, None]) / np.array(deviation, dtype=np.float32)[:, None]


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
