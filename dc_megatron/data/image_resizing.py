"""Decoded pictures to tiles, several times faster than image_reference.py and within rounding of it.

torch resizes bytes on the CPU as PIL does: one direction after the other, over the same weights, with bytes between
them, but with vector instructions. On a GPU it resizes in fp32, without rounding between the directions.
"""

from __future__ import annotations

import threading

import numpy as np
import PIL
import torch
from torch.nn.functional import interpolate

from dc_megatron.config import ImageTiling, VisionConfig
from dc_megatron.data.array_pool import ArrayPool
from dc_megatron.data.image_reference import geometry

PILLOW = int(PIL.__version__.partition(".")[0])
_own = threading.local()
# uint8 [H, W, 3]: numpy on the CPU, where torch would start a team of threads for every thread that decodes.
Pixels = np.ndarray | torch.Tensor


def fill_tiles(
    decoded: Pixels, vision: VisionConfig, aspect_ratio: str, tiling: ImageTiling, wanted: range, place: torch.Tensor
) -> None:
    """Put the tiles ``wanted`` of a decoded picture into ``place``, float32 [len(wanted), 3, H, W] on the CPU.

    decoded: an array, or a tensor on a GPU. See ``image_reference.pixels_of`` for what is computed.
    """
    if aspect_ratio == "anyres":
        tiles = _anyres_tiles(decoded, tiling, wanted)
    else:
        height, width = decoded.shape[:2]
        size, shape = vision.image_size, geometry(width, height, vision, aspect_ratio)
        top, left = shape.canvas_start
        if (top, left) != (0, 0) or shape.canvas_size != (height, width):
            decoded = _on_canvas(decoded, shape.canvas_size, (-top, -left), vision.pad_color)
        resized, (top, left) = _resize(decoded, shape.resized), shape.crop_start
        tiles = [resized[top : top + size, left : left + size]]
    for tile, where in zip(tiles, place, strict=True):
        _normalise(tile, vision, where)


def _anyres_tiles(decoded: Pixels, tiling: ImageTiling, wanted: range) -> list[Pixels]:
    """uint8 [size, size, 3] each; the grid is not computed where only the whole is wanted, and the other way round."""
    height, width = decoded.shape[:2]
    size, shape = tiling.tile_size, tiling.of(width, height)
    tiles = [_resize(decoded, (size, size))] if 0 in wanted else []
    grid = [number - 1 for number in wanted if number > 0]
    if grid:
        canvas = (shape.rows * size, shape.columns * size)
        fitted = shape.fitted[::-1]
        start = ((canvas[0] - fitted[0]) // 2, (canvas[1] - fitted[1]) // 2)
        whole = _on_canvas(_resize(decoded, fitted), canvas, start, (0, 0, 0))
        for row, column in (divmod(number, shape.columns) for number in grid):
            tiles.append(whole[row * size : (row + 1) * size, column * size : (column + 1) * size])
    return tiles


def _on_canvas(pixels: Pixels, size: tuple[int, int], start: tuple[int, int], colour: tuple[int, int, int]) -> Pixels:
    """``pixels`` at ``start`` of a canvas of ``colour``; size, start: (vertical, horizontal)."""
    (height, width), (top, left) = pixels.shape[:2], start
    # Whole rows at a time: copying three bytes at a time takes as long as the resizing.
    row = np.tile(np.array(colour, dtype=np.uint8), size[1])
    if isinstance(pixels, np.ndarray):
        canvas = _canvases().take(size[0], 3 * size[1])
    else:
        row = torch.from_numpy(row).to(pixels.device)
        canvas = pixels.new_empty(size[0], 3 * size[1])
    canvas[:top] = row
    canvas[top + height :] = row
    canvas[top : top + height, : 3 * left] = row[: 3 * left]
    canvas[top : top + height, 3 * (left + width) :] = row[3 * (left + width) :]
    canvas[top : top + height, 3 * left : 3 * (left + width)] = pixels.reshape(height, 3 * width)
    return canvas.reshape(*size, 3)


def _canvases() -> ArrayPool:
    """This thread's."""
    if not hasattr(_own, "canvases"):
        _own.canvases = ArrayPool(np.uint8)
    return _own.canvases


def _resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Bicubic with antialiasing, as PIL's; size: (vertical, horizontal)."""
    if not isinstance(pixels, np.ndarray):
        image = interpolate(_batch(pixels).float(), size=size, mode="bicubic", antialias=True)
        return image.round_().clamp_(0, 255).to(torch.uint8)[0].permute(1, 2, 0)
    image = _batch(torch.from_numpy(pixels))
    if _vertical_first(pixels.shape[:2], size):
        image = interpolate(image, size=(size[0], pixels.shape[1]), mode="bicubic", antialias=True)
    return interpolate(image, size=size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def _batch(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.permute(2, 0, 1)[None]


def _vertical_first(size: tuple[int, int], wanted: tuple[int, int]) -> bool:
    """Whether PIL resizes rows before columns, which rounds in another order: since Pillow 13, of pictures that lose
    much more of their height than of their width. torch resizes columns first, always.
    """
    lost_height, lost_width = (before - after for before, after in zip(size, wanted, strict=True))
    return PILLOW >= 13 and lost_height > max(0, 2 * lost_width)


def _normalise(pixels: Pixels, vision: VisionConfig, place: torch.Tensor) -> None:
    """As the reference's, up to rounding of the last bit, into ``place`` float32 [3, H, W]."""
    deviation = np.array(vision.image_std, dtype=np.float32)[:, None, None]
    offset = -np.array(vision.image_mean, dtype=np.float32)[:, None, None] / deviation
    scale = np.float32(1 / 255) / deviation
    if isinstance(pixels, np.ndarray):
        out = place.numpy()
        np.multiply(pixels.transpose(2, 0, 1), scale, out=out, dtype=np.float32)
        np.add(out, offset, out=out)
        return
    scale, offset = (torch.from_numpy(one).to(pixels.device) for one in (scale, offset))
    place.copy_(torch.addcmul(offset, pixels.permute(2, 0, 1).float(), scale))
