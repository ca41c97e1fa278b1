"""Size and oddities of a picture from the first kilobytes of its file; pixels are not decoded."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image

from dc_megatron.data.faults import RecordFault
from dc_megatron.data.image_reference import DECODE_ERRORS, open_image
from dc_megatron.data.image_store import ImageStore, UnsafeName
from dc_megatron.data.retrying import StoreFailure
from dc_megatron.errors import UserError

HUGE_PIXELS = 50_000_000
TINY_EDGE = 8
_ORIENTATION = 0x0112
# What can be wrong with an EXIF block, whose content nobody checks.
_EXIF_ERRORS = (*DECODE_ERRORS, struct.error, AttributeError, OverflowError)


@dataclass(frozen=True)
class Header:
    """width, height: pixels as stored, EXIF orientation not applied. format, mode: PIL's names. notes: see NOTES."""

    width: int
    height: int
    format: str
    mode: str
    notes: tuple[str, ...] = ()


# What is worth a look in a data set, though it can be trained on.
NOTES = {
    "cmyk": "CMYK colours",
    "exif_rotated": "EXIF says turned or mirrored; it is trained on as stored",
    "one_pixel": "one pixel in all",
    "tiny": f"an edge below {TINY_EDGE} pixels",
    "huge": f"more than {HUGE_PIXELS // 1_000_000} million pixels",
    "gif": "GIF",
    "animated": "several pictures in one file; the first one is taken",
    "16_bit": "more than 8 bits a colour",
    "palette_or_alpha": "a palette, or transparency (GIF apart)",
}


def read_header(store: ImageStore, name: str) -> Header:
    """The header of picture ``name``; RecordFault where it is missing, unsafe, unreadable or too narrow to use.

    UserError: the store fails. PIL may warn about large pictures and odd EXIF blocks.
    """
    try:
        file = store.open(name)
        return _parsed(file, store.where(name))
    except StoreFailure as error:
        raise UserError(f"--image_folder {store.location}: {error}; start again when the store answers") from None
    except UnsafeName as error:
        raise RecordFault(RecordFault.UNSAFE_PATH, str(error)) from None
    except FileNotFoundError:
        raise RecordFault(RecordFault.MISSING_IMAGE, f"no file {store.where(name)}") from None
    except OSError as error:
        raise RecordFault(RecordFault.CORRUPT_IMAGE, f"{store.where(name)}: cannot be read: {error}") from None


def _parsed(file: BinaryIO, where: str) -> Header:
    """The header in ``file``, which is closed; ``where`` it lies is said in RecordFaults."""
    with file:
        try:
            with open_image(file) as image:
                return Header(*image.size, image.format or "", image.mode, tuple(_notes(image)))
        except StoreFailure:
            raise
        except DECODE_ERRORS as error:
            raise RecordFault(RecordFault.CORRUPT_IMAGE, f"{where}: {_words(error)}") from None


def _notes(image: Image.Image):
    width, height = image.size
    if image.mode == "CMYK":
        yield "cmyk"
    if _orientation(image) not in (0, 1):
        yield "exif_rotated"
    if width == height == 1:
        yield "one_pixel"
    elif min(width, height) < TINY_EDGE:
        yield "tiny"
    if width * height > HUGE_PIXELS:
        yield "huge"
    if image.format == "GIF":
        yield "gif"
    if image.format in ("GIF", "PNG", "WEBP") and getattr(image, "is_animated", False):
        yield "animated"
    if image.mode.startswith(("I", "F")) or _raw_mode(image).endswith((";16B", ";16L", ";16N")):
        yield "16_bit"
    has_alpha = image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info
    if has_alpha and image.format != "GIF":
        yield "palette_or_alpha"


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info:
        return 1
    with contextlib.suppress(*_EXIF_ERRORS):
        value = image.getexif().get(_ORIENTATION, 1)
        return value if isinstance(value, int) else 1
    return 1


def _raw_mode(image: Image.Image) -> str:
    """How the file's pixels lie; PIL turns 16-bit colours into 8-bit ones on reading."""
    arguments = image.tile[0][3] if image.tile else ""
    arguments = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return arguments if isinstance(arguments, str) else ""


def _words(error: Exception) -> str:
    """PIL puts the file object into its message, which says nothing."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "no picture that can be read"
    return str(error) or type(error).__name__
