"""A picture with words below it, for people to look at."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw

from dc_megatron.data.image_reference import DECODE_ERRORS

_PICTURE_SIDE = 336  # pixels of the longer side
_LETTERS_A_LINE = 52
_MOST_LINES = 4


def picture_with_words(file: str | BinaryIO, words: str) -> np.ndarray:
    """uint8 [H, W, 3]: the picture, scaled to the page, with the words on a strip below it.

    A file that cannot be decoded gives a blank picture that says so.
    """
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except DECODE_ERRORS:
        picture = Image.new("RGB", (_PICTURE_SIDE, _PICTURE_SIDE), (200, 200, 200))
        ImageDraw.Draw(picture).text((4, _PICTURE_SIDE // 2), "this picture cannot be decoded", fill=(0, 0, 0))
    scale = _PICTURE_SIDE / max(picture.size)
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size])
    pieces = [words[start : start + _LETTERS_A_LINE] for start in range(0, len(words), _LETTERS_A_LINE)]
    lines = pieces[:_MOST_LINES] or ["(nothing)"]
    page = Image.new("RGB", (_PICTURE_SIDE, picture.height + 14 * len(lines) + 8), (255, 255, 255))
    page.paste(picture, (0, 0))
    # The built-in font knows Latin letters only.
    text = "\n".join(lines).encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(page).multiline_text((4, picture.height + 3), text, fill=(0, 0, 0), spacing=2)
    return np.asarray(page)
