"""Pictures a second from JPEG files to normalised pixels: this program's loaders against transformers' processors.

All take turns in one process, ``threads`` threads each, over the same files in the page cache. What they make is
compared by ``benchmark pixels``.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image

from dc_megatron.benchmark import machine
from dc_megatron.benchmark.picture_files import MIXED_SIZES, mixed_photographs
from dc_megatron.benchmark.pixels import tower
from dc_megatron.config import ConnectorConfig, VisionConfig, tiling_of_flags
from dc_megatron.data.image_loading import image_loader, tile_requests
from dc_megatron.data.image_store import open_store
from dc_megatron.data.picture import Picture, make_picture
from dc_megatron.errors import UserError
from dc_megatron.runtime.installed import version_of

OURS, BASELINE, SHOWN = "dali", "transformers, PIL", "transformers, torchvision"
# What must hold: this many times the baseline's pictures a second.
LIMIT = 2.5
ASPECT_RATIOS = ("pad", "square")
# Pictures of one batch.
BATCH = 32
NOT_INSTALLED = "not installed"

# From the pictures of one batch to float32 [n, 3, H, W].
Loading = Callable[[list[Picture]], torch.Tensor]


def benchmark_decode(
    count: int = 256,
    rounds: int = 5,
    threads: int = 2,
    report: Callable[[str], None] = lambda line: None,
) -> dict:
    """The whole benchmark as plain values (see benchmarks/README.md). UserError: DALI is not installed."""
    if count < 1 or rounds < 1 or threads < 1:
        raise UserError("--pictures, --rounds and --threads: at least 1 is needed")
    torch.set_num_threads(1)
    vision = tower("clip")
    with tempfile.TemporaryDirectory() as folder:
        files = mixed_photographs(count, seed=1)
        for number, file in enumerate(files):
            with open(os.path.join(folder, str(number)), "wb") as out:
                out.write(file.data)
        results = {ratio: _one_ratio(files, folder, vision, ratio, rounds, threads, report) for ratio in ASPECT_RATIOS}
        facts = machine.describe(folder)
    versions = {name: version_of(name) for name in ("pillow", "transformers", "nvidia-dali-cuda130", "torchvision")}
    facts["versions"] |= {name: version or NOT_INSTALLED for name, version in versions.items()}
    return {
        "benchmark": "decode",
        **facts,
        "pictures": {
            "count": count,
            "mean_kilobytes": sum(len(file.data) for file in files) / count / 1e3,
            "mean_megapixels": sum(file.width * file.height for file in files) / count / 1e6,
            "percent_of_sizes": [list(size) for size in MIXED_SIZES],
        },
        "tower": f"{vision.family}, {vision.image_size} pixels",
        "threads": threads,
        "rounds": rounds,
        "batch": BATCH,
        "aspect_ratios": results,
        "limits": _against_limit(results),
    }


def _one_ratio(
    files: list, folder: str, vision: VisionConfig, ratio: str, rounds: int, threads: int, report: Callable
) -> dict:
    tiling = tiling_of_flags(vision, ConnectorConfig("none"), ratio)
    pictures = [make_picture(tiling, str(number), file.width, file.height) for number, file in enumerate(files)]
    batches = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
    contenders: dict[str, Loading | None] = {
        OURS: _ours("dali", vision, ratio, folder, threads),
        BASELINE: _transformers("pil", vision, ratio, folder, threads),
        "pil": _ours("pil", vision, ratio, folder, threads),
        SHOWN: _transformers("torchvision", vision, ratio, folder, threads),
    }
    # name -> (pictures a second, milliseconds of processor time a picture) of each round.
    found: dict[str, list[tuple[float, float]]] = {name: [] for name, load in contenders.items() if load is not None}
    names = list(found)
    for number in range(-1, rounds):
        # Each is first, in the middle and last in turn; the round before the first one warms up.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start, start_cpu = time.perf_counter(), time.process_time()
            for batch in batches[: 1 if number < 0 else None]:
                contenders[name](batch)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
            if number >= 0:
                found[name].append((len(pictures) / seconds, 1000 * cpu_seconds / len(pictures)))
                report(f"{ratio}, round {number + 1} of {rounds}, {name}: {found[name][-1][0]:.1f} pictures a second")
    result = dict.fromkeys(contenders, NOT_INSTALLED)
    base = [rate for rate, _ in found[BASELINE]]
    for name, measured in found.items():
        rates, milliseconds = zip(*measured, strict=True)
        ratios = [mine / theirs for mine, theirs in zip(rates, base, strict=True)]
        result[name] = {
            "pictures_per_second": list(rates),
            "median": statistics.median(rates),
            "ratios": ratios,
            "median_ratio": statistics.median(ratios),
            "cpu_milliseconds_per_picture": statistics.median(milliseconds),
        }
    return result


def _ours(backend: str, vision: VisionConfig, ratio: str, folder: str, threads: int) -> Loading:
    tiling = tiling_of_flags(vision, ConnectorConfig("none"), ratio)
    loader, store = image_loader(backend, vision, ratio, tiling, threads=threads), open_store(folder)

    def load(pictures: list[Picture]) -> torch.Tensor:
        pixels, failed = loader.load(tile_requests(pictures, [store], range(len(pictures))))
        assert not failed, f"not decoded: {failed}"
        return pixels

    return load


def _transformers(backend: str, vision: VisionConfig, ratio: str, folder: str, threads: int) -> Loading | None:
    """transformers' processor as LLaVA calls it, picture by picture, in as many threads; None: not installed."""
    processor = _processor(backend, vision)
    if processor is None:
        return None
    pool = ThreadPoolExecutor(threads)

    def one(picture: Picture) -> torch.Tensor:
        with Image.open(os.path.join(folder, picture.name)) as file:
            image = file.convert("RGB")
        if ratio == "pad":
            image = _expand_to_square(image, vision.pad_color)
        return processor(image, return_tensors="pt")["pixel_values"]

    return lambda pictures: torch.cat(list(pool.map(one, pictures)))


def _processor(backend: str, vision: VisionConfig):
    size = vision.image_size
    settings = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    settings |= {"image_mean": list(vision.image_mean), "image_std": list(vision.image_std)}
    if backend == "pil":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        return CLIPImageProcessorPil(**settings)
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor

    return CLIPImageProcessor(**settings)


def _expand_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """LLaVA's ``expand2square``."""
    edge = max(image.size)
    canvas = Image.new("RGB", (edge, edge), colour)
    canvas.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return canvas


def _against_limit(results: dict) -> list[dict]:
    entries = []
    for ratio, found in results.items():
        value = found[OURS]["median_ratio"]
        what = f"{ratio}: pictures a second / those of {BASELINE}"
        entries.append({"quantity": what, "limit": LIMIT, "value": value, "holds": value >= LIMIT})
    return entries


def as_text(result: dict) -> str:
    """The result as a table and the limits, for people."""
    pictures = result["pictures"]
    lines = [
        f"{pictures['count']} JPEGs, {pictures['mean_kilobytes']:.0f} kB and {pictures['mean_megapixels']:.2f} million"
        f" pixels on average; {result['tower']}; {result['threads']} threads, {result['machine']['cores']} cores",
        "",
        "                             pictures a second   ratio   CPU ms   all rounds",
    ]
    for ratio, found in result["aspect_ratios"].items():
        for name, rates in found.items():
            label = f"{ratio}, {name}"
            if rates == NOT_INSTALLED:
                lines.append(f"{label:34}{NOT_INSTALLED}")
                continue
            every = " ".join(f"{rate:.0f}" for rate in rates["pictures_per_second"])
            cpu = rates["cpu_milliseconds_per_picture"]
            lines.append(f"{label:34}{rates['median']:12.1f}{rates['median_ratio']:8.2f}{cpu:9.2f}   {every}")
    lines.append("")
    for entry in result["limits"]:
        lines.append(
            f"{'holds' if entry['holds'] else 'FAILS'}: {entry['quantity']}: {entry['value']:.2f}"
            f" (at least {entry['limit']})"
        )
    return "\n".join(lines)
