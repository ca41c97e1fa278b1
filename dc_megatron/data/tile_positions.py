"""Which feature stands at which position of a picture: LLaVA's merge of AnyRes tiles as index arithmetic.

The tower and the connector give every tile ``tile_tokens`` features, tile after tile. LLaVA cuts, turns and joins these
tensors picture by picture; here each position of the sequence names its feature instead, so that tiles may be encoded
on any rank and nothing but one gather is left to do on the device.
"""

from __future__ import annotations

import numpy as np

from dc_megatron.config import ImageTiling, PictureTiles
from dc_megatron.data.picture import Picture

NEWLINE = -1


def feature_positions(tiling: ImageTiling, picture: Picture, first_tile: int) -> np.ndarray:
    """int64 [picture.tokens]: rows among the flattened [tiles * tile_tokens] features of a micro-batch.

    ``first_tile`` tiles stand before this picture's in the micro-batch. NEWLINE (-1) is the trained ``image_newline``.
    """
    shape = tiling.of(picture.width, picture.height)
    tile = tiling.tile_tokens
    first = first_tile * tile
    if shape.columns and tiling.merge != "flat":
        positions = np.concatenate([first + np.arange(tile), _merged_grid(tiling, shape, first + tile)])
    else:
        positions = first + np.arange(shape.tiles * tile)
        if not shape.columns and tiling.has_newline:
            positions = np.append(positions, NEWLINE)
    assert len(positions) == picture.tokens, (
        f"{picture.name}: {picture.tokens} positions were counted for {picture.width}x{picture.height} pixels,"
        f" {len(positions)} are needed: it was counted with another tiling"
    )
    return positions


def _merged_grid(tiling: ImageTiling, shape: PictureTiles, first: int) -> np.ndarray:
    """The grid's features, the first of them in row ``first``, row of patches by row of patches.

    spatial keeps all of them; spatial_unpad leaves out the margins that hold no picture and ends each row with NEWLINE.
    """
    side = tiling.side
    tiles = np.arange(shape.rows * shape.columns * side * side).reshape(shape.rows, shape.columns, side, side)
    grid = first + tiles.transpose(0, 2, 1, 3).reshape(shape.rows * side, shape.columns * side)
    if not tiling.has_newline:
        return grid.ravel()
    above, left = shape.cropped
    grid = grid[above : len(grid) - above, left : grid.shape[1] - left]
    return np.pad(grid, ((0, 0), (0, 1)), constant_values=NEWLINE).ravel()
