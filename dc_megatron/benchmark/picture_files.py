"""Encoded pictures made from a seed: of every kind that data sets hold, and of the sizes that LLaVA's mix has."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image

from dc_megatron.benchmark.jpeg_writer import write_jpeg
from dc_megatron.data.image_reference import MAX_ASPECT_RATIO
from dc_megatron.data.image_store import ImageStore

# (share in percent, width, height). Most of LLaVA's mix are COCO's pictures, whose longer edge has 640 pixels.
MIXED_SIZES = (
    (32, 640, 480),
    (20, 640, 427),
    (10, 480, 640),
    (8, 427, 640),
    (5, 640, 360),
    (7, 500, 375),
    (4, 375, 500),
    (6, 800, 600),
    (3, 768, 1024),
    (4, 1024, 768),
    (1, 1600, 1200),
)
# 0.55 bytes a pixel with the noise of ``photograph``, as photographs on the web have.
_MIXED_QUALITY = 95


@dataclass(frozen=True)
class PictureFile:
    """``kind`` as in ``KINDS``; width and height in pixels."""

    kind: str
    width: int
    height: int
    data: bytes


def photograph(generator: np.random.Generator, width: int, height: int, noise: float = 8.0) -> Image.Image:
    """Large, middle and small structures, an edge or two, and noise: what compresses and resizes as photographs do."""
    canvas = np.zeros((height, width, 3), dtype=np.float32)
    for cells, amplitude in ((4, 0.75), (16, 0.5), (64, 0.3)):
        shape = (max(height * cells // 640, 1), max(width * cells // 640, 1), 3)
        coarse = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        canvas += (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 128) * amplitude
    top, left = int(generator.integers(height)), int(generator.integers(width))
    canvas[top : top + height // 3, left : left + width // 3] += generator.integers(-90, 90, 3)
    # The same noise in all colours, as a camera's is mostly brightness. One row's worth is drawn for several rows.
    rows = generator.normal(0, noise, (min(height, 64), width, 1)).astype(np.float32)
    canvas += np.resize(rows, (height, width, 1))
    return Image.fromarray(np.clip(canvas + 128, 0, 255).astype(np.uint8))


def _saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _jpeg(subsampling: int | None = None, mode: str = "RGB", **options) -> Callable[[Image.Image], bytes]:
    if subsampling is not None:
        options["subsampling"] = subsampling
    return lambda image: _saved(image.convert(mode), "JPEG", quality=90, **options)


def _png(mode: str, **options) -> Callable[[Image.Image], bytes]:
    return lambda image: _saved(image.convert(mode), "PNG", compress_level=1, **options)


def _transparent(image: Image.Image) -> bytes:
    with_alpha = image.convert("RGBA")
    with_alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    return _saved(with_alpha, "PNG", compress_level=1)


def _sixteen_bits(image: Image.Image) -> bytes:
    return _saved(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG", compress_level=1)


def _written(across: int, down: int) -> Callable[[Image.Image], bytes]:
    return lambda image: write_jpeg(np.asarray(image), (across, down))


# kind -> its encoder. The last ones are slow to make, and made of small pictures only.
KINDS: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG 4:4:4": _jpeg(0),
    "JPEG 4:2:2": _jpeg(1),
    "JPEG 4:2:0": _jpeg(2),
    "JPEG 4:2:0 progressive": _jpeg(2, progressive=True),
    "JPEG 4:4:4 progressive": _jpeg(0, progressive=True),
    "JPEG grey": _jpeg(mode="L"),
    "JPEG CMYK": _jpeg(mode="CMYK"),
    "JPEG coded as RGB": _jpeg(keep_rgb=True),
    "PNG": _png("RGB"),
    "PNG grey": _png("L"),
    "PNG with alpha": _transparent,
    "PNG palette": _png("P"),
    "PNG 16 bit": _sixteen_bits,
    "GIF": lambda image: _saved(image, "GIF"),
    "WebP": lambda image: _saved(image, "WEBP", quality=80, method=0),
    "BMP": lambda image: _saved(image, "BMP"),
}
SMALL_KINDS: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG 4:1:1": _written(4, 1),
    "JPEG 4:4:0": _written(1, 2),
    "JPEG 4:1:0": _written(4, 2),
}
_SMALL_EDGE = 160


def varied_pictures(count: int, seed: int, longest: tuple[int, int] = (4000, 3000)) -> Iterator[PictureFile]:
    """``count`` pictures of all kinds in turn, 1 x 1 and ``longest`` among them.

    Edges are drawn evenly in their logarithm, so that small pictures are as frequent as large ones; of one picture in
    five evenly in pixels. A picture too narrow to be trained on is drawn again.
    """
    generator = np.random.default_rng(seed)
    kinds = [*KINDS, *SMALL_KINDS]
    for number in range(count):
        kind = kinds[number % len(kinds)]
        limits = longest if kind in KINDS else (_SMALL_EDGE, _SMALL_EDGE)
        width, height = _size(generator, number, limits)
        data = (KINDS | SMALL_KINDS)[kind](photograph(generator, width, height))
        yield PictureFile(kind, width, height, data)


def _size(generator: np.random.Generator, number: int, longest: tuple[int, int]) -> tuple[int, int]:
    if number < 2:
        return ((1, 1), longest)[number]
    evenly = generator.random() < 0.2
    while True:
        drawn = generator.random(2)
        edges = (1 + (edge - 1) * x if evenly else edge**x for edge, x in zip(longest, drawn, strict=True))
        width, height = (round(float(edge)) for edge in edges)
        if max(width, height) <= MAX_ASPECT_RATIO * min(width, height):
            return width, height


def mixed_photographs(count: int, seed: int) -> list[PictureFile]:
    """``count`` JPEGs 4:2:0 of MIXED_SIZES, each size as often as its share says, in an order drawn from ``seed``."""
    generator = np.random.default_rng(seed)
    ends = np.cumsum([share for share, _, _ in MIXED_SIZES])
    # Evenly spread over the shares: the same sizes whatever the seed.
    places = np.searchsorted(ends, (np.arange(count) + 0.5) * ends[-1] / count, side="right")
    pictures = []
    for place in generator.permutation(places):
        _, width, height = MIXED_SIZES[place]
        data = _saved(photograph(generator, width, height), "JPEG", quality=_MIXED_QUALITY)
        pictures.append(PictureFile("JPEG 4:2:0", width, height, data))
    return pictures


class StoreInMemory(ImageStore):
    """Pictures by name; what they are read with costs nothing."""

    location = "memory"

    def __init__(self, files: dict[str, bytes]):
        self._files = files

    def names(self) -> tuple[str, ...]:
        """Of all files."""
        return tuple(self._files)

    def open(self, name: str, block_bytes: int = 0) -> BinaryIO:
        return io.BytesIO(self.read(name))

    def read(self, name: str) -> bytes:
        try:
            return self._files[name]
        except KeyError:
            raise FileNotFoundError(name) from None

    def list(self, name: str) -> list[str]:
        return sorted(file for file in self._files if file.startswith(name + "/"))
