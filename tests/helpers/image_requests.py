"""Requests for whole pictures, as the data loader makes them."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from dc_megatron.config import ConnectorConfig, ImageTiling, VisionConfig, tiling_of_flags
from dc_megatron.data.image_loading import ImageRequest
from dc_megatron.data.image_store import ImageStore, open_store
from dc_megatron.data.picture import make_picture


def tiling_for(vision: VisionConfig, aspect_ratio: str) -> ImageTiling:
    """The tiling of a run with ``--image_aspect_ratio``; ``anyres`` with LLaVA-1.6's grids."""
    return tiling_of_flags(vision, ConnectorConfig("none"), aspect_ratio)


def size_of(path) -> tuple[int, int]:
    """(width, height) of an image file."""
    with Image.open(path) as image:
        return image.size


def request(
    store: ImageStore, name: str, tiling: ImageTiling, size: tuple[int, int] = (80, 64), tiles: range | None = None
) -> ImageRequest:
    """For all tiles of a picture that was indexed with ``size``, or for ``tiles``."""
    picture = make_picture(tiling, name, *size)
    return ImageRequest(store, picture, range(picture.tiles) if tiles is None else tiles)


def file_requests(files: Sequence[str], tiling: ImageTiling, size: tuple[int, int] | None = None) -> list[ImageRequest]:
    """For image files by their paths; size: as indexed, their own where left out."""
    store = open_store("")
    return [request(store, str(path), tiling, size or size_of(path)) for path in files]
