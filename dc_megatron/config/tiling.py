"""How a picture is cut into tiles, and how many positions it then takes: integers only.

Without AnyRes a picture is one tile. With it (LLaVA-1.6), the picture is fitted into the best of a few resolutions that
are multiples of the tile, cut into tiles, and shown as a whole once more in front of them.
"""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass

from dc_megatron.config.choices import one_of
from dc_megatron.config.connector import ConnectorConfig, image_tokens
from dc_megatron.config.vision import VisionConfig
from dc_megatron.errors import UserError

MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
# LLaVA-1.6's image_grid_pinpoints in tiles (columns, rows), in its order: the first of equals is taken.
_LLAVA_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


@dataclass(frozen=True)
class PictureTiles:
    """One picture: ``columns`` x ``rows`` tiles beside the whole (0 x 0: the whole alone), positions, tiles.

    ``fitted``: pixels (width, height) of the picture inside the grid's ``columns`` x ``rows`` tiles; (0, 0) without.
    ``cropped``: rows and columns of patches (vertical, horizontal) that unpadding cuts off at EACH side.
    """

    columns: int
    rows: int
    tokens: int
    fitted: tuple[int, int] = (0, 0)
    cropped: tuple[int, int] = (0, 0)

    @property
    def tiles(self) -> int:
        """Pictures of the tower's size that it encodes: the whole first, then the grid row by row."""
        return 1 + self.columns * self.rows


@dataclass(frozen=True)
class ImageTiling:
    """``tile_size`` pixels and ``tile_tokens`` positions of a tile, ``side`` patches along its edge.

    pinpoints: AnyRes resolutions (width, height) in pixels; empty: one tile a picture. merge: how the tiles' features
    are joined, LLaVA's ``mm_patch_merge_type``.
    """

    tile_size: int
    tile_tokens: int
    side: int
    pinpoints: tuple[tuple[int, int], ...] = ()
    merge: str = "flat"

    @property
    def has_newline(self) -> bool:
        """Whether every row of patches, and a picture without tiles, ends with the trained ``image_newline``."""
        return self.merge == "spatial_unpad"

    @property
    def most_tokens(self) -> int:
        """Positions of the largest picture: one that fills its resolution."""
        return max([self.tile_tokens + self.has_newline, *(self.of(*size).tokens for size in self.pinpoints)])

    def of(self, width: int, height: int) -> PictureTiles:
        """The tiles of a picture of ``width`` x ``height`` pixels, both above 0."""
        if not self.pinpoints:
            return PictureTiles(0, 0, self.tile_tokens + self.has_newline)
        best = best_resolution(width, height, self.pinpoints)
        columns, rows = best[0] // self.tile_size, best[1] // self.tile_size
        fitted = fitted_size(width, height, best)
        if not self.has_newline:
            return PictureTiles(columns, rows, (1 + columns * rows) * self.tile_tokens, fitted)
        across, down = columns * self.side, rows * self.side
        cropped = unpadded(width, height, across, down)
        kept_down, kept_across = down - 2 * cropped[0], across - 2 * cropped[1]
        return PictureTiles(columns, rows, self.tile_tokens + kept_down * (kept_across + 1), fitted, cropped)


def image_tiling(
    vision: VisionConfig, connector: ConnectorConfig, pinpoints: tuple = (), merge: str = "flat"
) -> ImageTiling:
    """The tiling of a run. ``pinpoints``: see ``read_pinpoints``. UserError: STI has no grid to merge spatially."""
    one_of(merge, MERGE_TYPES, "--mm_patch_merge_type")
    if not pinpoints and merge != "flat":
        raise UserError(f"--mm_patch_merge_type {merge}: needs --image_aspect_ratio anyres; leave it out, or use flat")
    if merge != "flat" and connector.dense_connector_type == "sti":
        raise UserError(
            f"--mm_patch_merge_type {merge}: sti adds pooled tokens that have no place in a grid of patches; use"
            " --mm_patch_merge_type flat, or another --mm_dense_connector_type"
        )
    return ImageTiling(
        tile_size=vision.image_size,
        tile_tokens=image_tokens(vision, connector),
        side=vision.image_size // vision.patch_size,
        pinpoints=tuple(pinpoints),
        merge=merge,
    )


def best_resolution(width: int, height: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """LLaVA's ``select_best_resolution``: the most pixels of the picture kept, then the least area wasted."""
    best, most, least = pinpoints[0], -1, 0
    for across, down in pinpoints:
        scale = min(across / width, down / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = across * down - effective
        if effective > most or (effective == most and wasted < least):
            best, most, least = (across, down), effective, wasted
    return best


def fitted_size(width: int, height: int, resolution: tuple[int, int]) -> tuple[int, int]:
    """LLaVA's ``resize_and_pad_image``: (width, height) of the picture inside ``resolution``, rounded up.

    In floating point, as LLaVA and transformers: 500x375 becomes 672x505, although 504 would be exact.
    """
    across, down = resolution
    scale_across, scale_down = across / width, down / height
    if scale_across < scale_down:
        return across, min(math.ceil(height * scale_across), down)
    return min(math.ceil(width * scale_down), across), down


def unpadded(width: int, height: int, across: int, down: int) -> tuple[int, int]:
    """LLaVA's ``unpad_image``: (rows, columns) of patches to cut off at each side of a grid ``across`` x ``down``.

    In whole numbers, which is what transformers' rounding to 7 digits comes to; LLaVA's own floating point may fall
    short of a whole quotient and then cuts one more patch at each side (2 of 200,000 random sizes up to 4000).
    """
    if width * down > height * across:
        return (down - height * across // width) // 2, 0
    return 0, (across - width * down // height) // 2


def read_pinpoints(text: str, vision: VisionConfig, flag: str = "--image_grid_pinpoints") -> tuple:
    """``[(336, 672), (672, 336)]`` as tuples of (width, height), checked against the tower's size; UserError."""
    try:
        pinpoints = tuple((width, height) for width, height in ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise UserError(f'{flag} {text}: not a list of resolutions such as "[(336, 672), (672, 336)]"') from None
    size = vision.image_size
    wrong = [one for one in pinpoints if any(type(edge) is not int or edge <= 0 or edge % size for edge in one)]
    if wrong or not pinpoints:
        what = f"{wrong[0]} is no multiple" if wrong else "there is none; they are multiples"
        raise UserError(f"{flag} {text}: {what} of the tower's {size} pixels, such as {(size, 2 * size)}")
    return pinpoints


def default_pinpoints(vision: VisionConfig) -> tuple[tuple[int, int], ...]:
    """LLaVA-1.6's resolutions for a tower of 336 pixels, and the same multiples of any other tower's size."""
    return tuple((across * vision.image_size, down * vision.image_size) for across, down in _LLAVA_GRIDS)


def tiling_of_flags(
    vision: VisionConfig,
    connector: ConnectorConfig,
    image_aspect_ratio: str,
    image_grid_pinpoints: str = "",
    mm_patch_merge_type: str = "",
) -> ImageTiling:
    """The tiling that the flags of these names describe; "" stands for a flag's default.

    Under anyres the defaults are LLaVA-1.6's: its resolutions, and spatial_unpad, but flat with sti. UserError: flags
    that contradict each other, resolutions that are none of the tower's.
    """
    if image_aspect_ratio != "anyres":
        if image_grid_pinpoints:
            raise UserError(
                f"--image_grid_pinpoints {image_grid_pinpoints}: --image_aspect_ratio {image_aspect_ratio} cuts no"
                " tiles; leave it out, or use --image_aspect_ratio anyres"
            )
        return image_tiling(vision, connector, (), mm_patch_merge_type or "flat")
    pinpoints = read_pinpoints(image_grid_pinpoints, vision) if image_grid_pinpoints else default_pinpoints(vision)
    usual = "flat" if connector.dense_connector_type == "sti" else "spatial_unpad"
    return image_tiling(vision, connector, pinpoints, mm_patch_merge_type or usual)
