"""A picture of a sample as the index keeps it: where it lies, its size, and what it takes of tower and sequence."""

from __future__ import annotations

from dataclasses import dataclass

from dc_megatron.config import ImageTiling, PictureTiles


@dataclass(frozen=True)
class Picture:
    """One image, or one frame of a video.

    name: as in the record, below the image folder of data source ``source``. width, height: pixels as stored (EXIF
    orientation not applied). tokens: positions of the sequence; tiles: pictures that the tower encodes. frame: which
    frame of a video file, -1 for an image.
    """

    name: str
    width: int
    height: int
    tokens: int
    tiles: int = 1
    source: int = 0
    frame: int = -1


def make_picture(
    tiling: ImageTiling, name: str, width: int, height: int, *, source: int = 0, frame: int = -1
) -> Picture:
    """The picture with its tiles and positions."""
    shape: PictureTiles = tiling.of(width, height)
    return Picture(name, width, height, shape.tokens, shape.tiles, source, frame)
