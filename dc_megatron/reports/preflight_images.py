"""Small pictures for the page: as they lie in their file, and as the tower gets them. Each is a data URI of a JPEG."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from dc_megatron.config import VisionConfig
from dc_megatron.data.image_loading import LOAD_ERRORS
from dc_megatron.data.image_reference import as_rgb, open_image, preprocess
from dc_megatron.data.image_store import ImageStore
from dc_megatron.data.picture import Picture

EDGE = 144
_LEAST_EDGE = 24
# Decoding more for a thumbnail would take a second and hundreds of megabytes; JPEG can be decoded at an eighth.
_MOST_PIXELS = 40_000_000
_CANNOT = (*LOAD_ERRORS, MemoryError)


def thumbnail(store: ImageStore, name: str) -> str:
    """The picture as it lies in its file, at most EDGE pixels wide and high; "" where that cannot be had."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_image(io.BytesIO(store.read(name))) as image:
                image.draft("RGB", (2 * EDGE, 2 * EDGE))
                if image.width * image.height > _MOST_PIXELS:
                    return ""
                return _small(image.convert("RGB"))
    # A damaged file makes PIL's readers trip in any way; the page does without this picture.
    except Exception:
        return ""


def as_the_tower_sees(picture: Picture, stores: Sequence[ImageStore], vision: VisionConfig, aspect_ratio: str) -> str:
    """The picture cropped, padded or squashed to the tower's square; "" where that cannot be had.

    anyres: the tile that shows the whole picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _pixels(picture, stores[picture.source])
            if aspect_ratio == "anyres":
                edge = vision.image_size
                return _small(image.resize((edge, edge), Image.Resampling.BICUBIC))
            pixels = preprocess(image, vision, aspect_ratio)
    except _CANNOT:
        return ""
    mean, deviation = (np.array(values)[:, None, None] for values in (vision.image_mean, vision.image_std))
    restored = np.clip((pixels * deviation + mean) * 255 + 0.5, 0, 255).astype(np.uint8)
    return _small(Image.fromarray(restored.transpose(1, 2, 0)))


def odd_pictures(
    notes: Iterable[dict], stores: Sequence[ImageStore], listed: int, shown: int
) -> tuple[dict[str, list[dict]], dict[str, list[tuple[dict, str]]]]:
    """(entries, thumbnails) by kind, from the index's notes: the first ``listed`` different pictures of a kind, and
    (entry, data URI) of ``shown`` of those, spread evenly. An entry: {"source", "record", "name"}.
    """
    entries: dict[str, list[dict]] = {}
    seen: set[tuple] = set()
    for note in notes:
        of_kind = entries.setdefault(note["kind"], [])
        key = (note["kind"], note["source"], note["name"])
        if len(of_kind) < listed and key not in seen:
            seen.add(key)
            of_kind.append({name: note[name] for name in ("source", "record", "name")})
    thumbnails = {}
    for kind, of_kind in entries.items():
        step = max(1, len(of_kind) // shown)
        thumbnails[kind] = [
            (entry, thumbnail(stores[entry["source"]], entry["name"])) for entry in of_kind[: step * shown : step]
        ]
    return entries, thumbnails


def _pixels(picture: Picture, store: ImageStore) -> Image.Image:
    if picture.frame < 0:
        return as_rgb(io.BytesIO(store.read(picture.name)))
    from dc_megatron.data.video import read_frame

    return as_rgb(Image.fromarray(read_frame(store, picture.name, picture.frame)))


def _small(image: Image.Image) -> str:
    if max(image.size) < _LEAST_EDGE:
        # A speck would not be seen.
        scale = _LEAST_EDGE // max(image.size)
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    image.thumbnail((EDGE, EDGE), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")
