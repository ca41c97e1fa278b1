"""How far the pixels that DALI decodes are from the reference's, over pictures of every kind and size."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import torch

from dc_megatron.benchmark import machine
from dc_megatron.benchmark.picture_files import PictureFile, StoreInMemory, varied_pictures
from dc_megatron.config import ConnectorConfig, VisionConfig, tiling_of_flags
from dc_megatron.data.image_loading import ImageLoader, ImageRequest, image_loader
from dc_megatron.data.image_reference import as_rgb, pixels_of
from dc_megatron.data.image_sniffing import plain_size
from dc_megatron.data.picture import make_picture
from dc_megatron.errors import UserError
from dc_megatron.runtime.installed import version_of

# Largest mean difference of one picture, in steps of a byte.
LIMIT = 0.5
ASPECT_RATIOS = ("pad", "square", "anyres")
# Pictures at a time.
_TOGETHER = 16


def tower(family: str, image_size: int | None = None) -> VisionConfig:
    """CLIP-L/336 or SigLIP-so400m/384 as far as pixels go, or with tiles of another size."""
    size = image_size or {"clip": 336, "siglip": 384}[family]
    return VisionConfig.from_config({"model_type": family, "image_size": size, "patch_size": 14}, family)


def differences(
    pictures: Iterable[PictureFile],
    visions: Iterable[VisionConfig],
    aspect_ratios: Iterable[str] = ASPECT_RATIOS,
    *,
    threads: int = 2,
    decode_device: str = "cpu",
) -> list[dict]:
    """For every picture, tower and ratio a dict of ``picture, family, aspect_ratio, plain, mean, max``.

    plain: DALI decodes it. mean, max: of |difference| over all its tiles, in steps of a byte of the picture
    before it was normalised. A picture that one of the two cannot load is an AssertionError.
    """
    loaders = []
    for vision, ratio in itertools.product(visions, aspect_ratios):
        tiling = tiling_of_flags(vision, ConnectorConfig("none"), ratio)
        loaders.append(image_loader("dali", vision, ratio, tiling, threads=threads, decode_device=decode_device))
    entries, group = [], []
    for picture in pictures:
        group.append(picture)
        if len(group) == _TOGETHER:
            entries += _group_differences(group, loaders)
            group = []
    return entries + _group_differences(group, loaders)


def _group_differences(pictures: list[PictureFile], loaders: list[ImageLoader]) -> list[dict]:
    store = StoreInMemory({str(number): picture.data for number, picture in enumerate(pictures)})
    decoded = [as_rgb(store.open(str(number))) for number in range(len(pictures))]
    entries = []
    for loader in loaders:
        scale = 255 * torch.tensor(loader.vision.image_std)[:, None, None]
        shown = [make_picture(loader.tiling, str(n), p.width, p.height) for n, p in enumerate(pictures)]
        requests = [ImageRequest(store, picture, range(picture.tiles)) for picture in shown]
        pixels, failed = loader.load(requests)
        assert not failed, f"cannot be loaded: {[pictures[number] for number in failed]}"
        parts = pixels.split([len(request.tiles) for request in requests])
        for picture, image, request, part in zip(pictures, decoded, requests, parts, strict=True):
            wanted = (loader.vision, loader.aspect_ratio, loader.tiling, request.picture, request.tiles)
            difference = ((part - torch.from_numpy(pixels_of(image, *wanted))) * scale).abs_()
            entries.append(
                {
                    "picture": picture,
                    "family": loader.vision.family,
                    "aspect_ratio": loader.aspect_ratio,
                    "plain": plain_size(picture.data) is not None,
                    "mean": difference.mean().item(),
                    "max": difference.max().item(),
                }
            )
    return entries


def benchmark_pixels(count: int = 500, seed: int = 1, device: str = "cpu") -> dict:
    """Differences over ``count`` pictures as plain values (see benchmarks/README.md). device: where DALI decodes."""
    if count < 2:
        raise UserError(f"--pictures {count}: at least 2 are needed")
    facts = machine.describe(machine.ROOT)
    facts["versions"] |= {name: version_of(name) for name in ("pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120")}
    entries = differences(varied_pictures(count, seed), [tower("clip"), tower("siglip")], decode_device=device)
    return {"benchmark": "pixels", **facts, "pictures": count, "seed": seed, "device": device, **summary(entries)}


def summary(entries: list[dict]) -> dict:
    """Distributions of the plain pictures' differences, a row for every tower and aspect ratio; the others' largest."""
    rows = []
    for family, ratio in dict.fromkeys((entry["family"], entry["aspect_ratio"]) for entry in entries):
        mine = [entry for entry in entries if (entry["family"], entry["aspect_ratio"]) == (family, ratio)]
        plain = [entry for entry in mine if entry["plain"]]
        means = np.array([entry["mean"] for entry in plain])
        rows.append(
            {
                "family": family,
                "aspect_ratio": ratio,
                "plain_pictures": len(plain),
                "mean": float(means.mean()),
                "p50": float(np.percentile(means, 50)),
                "p99": float(np.percentile(means, 99)),
                "max": float(means.max()),
                "max_of_a_pixel": max(entry["max"] for entry in plain),
                "other_pictures": len(mine) - len(plain),
                "max_of_a_pixel_of_others": max((entry["max"] for entry in mine if not entry["plain"]), default=0.0),
            }
        )
    worst = max(row["max"] for row in rows)
    others = max(row["max_of_a_pixel_of_others"] for row in rows)
    limits = [
        {"quantity": "mean difference of a picture, of 255", "limit": LIMIT, "value": worst, "holds": worst <= LIMIT},
        {"quantity": "difference where PIL decodes", "limit": 0.0, "value": others, "holds": others == 0},
    ]
    return {"differences": rows, "limits": limits}


def as_text(result: dict) -> str:
    """The distributions as a table, for people."""
    lines = [
        f"{result['pictures']} pictures, DALI ({result['device']}) against PIL; differences in steps of 1/255:",
        "",
        "tower    pictures   aspect   mean      p50      p99      max      pixel   others   their pixel",
    ]
    for row in result["differences"]:
        figures = "".join(f"{row[name]:9.4f}" for name in ("mean", "p50", "p99", "max"))
        lines.append(
            f"{row['family']:8}{row['plain_pictures']:9}   {row['aspect_ratio']:7}{figures}"
            f"{row['max_of_a_pixel']:9.2f}{row['other_pictures']:9}{row['max_of_a_pixel_of_others']:14.2f}"
        )
    lines.append("")
    for entry in result["limits"]:
        lines.append(
            f"{'holds' if entry['holds'] else 'FAILS'}: {entry['quantity']}: {entry['value']:.4f}"
            f" (at most {entry['limit']})"
        )
    return "\n".join(lines)
