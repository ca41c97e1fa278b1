"""How fast the data index is built and read, and that memory does not grow with the number of records.

Every build is a process of its own, as local rank 0 of a run is; what was made is removed at the end.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time

from dc_megatron.benchmark import machine
from dc_megatron.benchmark.child_process import measure, status_fields
from dc_megatron.benchmark.llava_files import VOCABULARY, Writer, write_pictures, write_records, write_tokenizer
from dc_megatron.benchmark.llava_lengths import IMAGE_TOKENS
from dc_megatron.config import DataConfig, DataSource, ImageTiling
from dc_megatron.errors import UserError

# Samples a second with two workers, for data sets of at least so many; the builder's own memory between two data sets,
# the larger ten times the smaller; reading one sample.
LIMIT_RATE, LIMIT_RATE_SAMPLES, LIMIT_GROWTH_GB, LIMIT_READ = 1500.0, 100_000, 0.05, 100e-6
_READS = 20_000


def benchmark_index(
    samples: int = 100_000, folder: str | None = None, workers: tuple[int, ...] = (1, 2), memory_samples: int = 20_000
) -> dict:
    """Build an index of ``samples`` like stage 2 with each number of ``workers``; memory at two sizes of text alone.

    Returns plain values (see benchmarks/README.md). UserError: too few samples.
    """
    if samples < 100 or memory_samples < 100:
        raise UserError(f"--samples {min(samples, memory_samples)}: at least 100 are needed")
    if folder:
        os.makedirs(folder, exist_ok=True)
    place = tempfile.mkdtemp(prefix="dc-benchmark-index-", dir=folder)
    try:
        return {
            "benchmark": "index",
            **machine.describe(place),
            "tokenizer": f"sentencepiece BPE of {VOCABULARY} pieces, trained on made-up words",
            **_measure(place, samples, workers, memory_samples),
        }
    finally:
        shutil.rmtree(place)


def _measure(place: str, samples: int, workers: tuple[int, ...], memory_samples: int) -> dict:
    writer = Writer()
    tokenizer, images = os.path.join(place, "tokenizer"), os.path.join(place, "images")
    write_tokenizer(tokenizer, writer)
    data = os.path.join(place, "data.json")
    written = write_records(data, samples, 2, writer)
    write_pictures(images, written["pictures"])
    builds = [_built(place, data, count) for count in workers]
    os.remove(data)
    sizes = []
    for count in (memory_samples, 10 * memory_samples):
        lines = os.path.join(place, "text.jsonl")
        megabytes = write_records(lines, count, 1, writer, pictures=False)["mb"]
        sizes.append({**_built(place, lines, max(workers)), "file_mb": megabytes})
        os.remove(lines)
    return {
        "data": {"samples": samples, "file_mb": written["mb"], "pictures": len(written["pictures"])},
        "builds": builds,
        "text_alone": sizes,
        "limits": judged(builds, sizes),
    }


def _built(place: str, data: str, workers: int) -> dict:
    path = os.pathsep.join(filter(None, (machine.ROOT, os.environ.get("PYTHONPATH"))))
    words = [sys.executable, "-m", "dc_megatron.benchmark.data_index", place, data, str(workers)]
    done = measure(words, os.environ | {"PYTHONPATH": path})
    return {
        **json.loads(done.output.splitlines()[-1]),
        "process_seconds": done.seconds,
        "cpu_seconds": done.cpu_seconds,
        "peak_anonymous_of_all_processes_gb": done.peak_anonymous / 1e9,
    }


def build(place: str, data: str, workers: int) -> dict:
    """Build an index and read it at random: what a process started for it prints."""
    from dc_megatron.data.index import build_index, open_index
    from dc_megatron.data.tokenization import load_tokenizer

    config = DataConfig(
        sources=(DataSource(data, os.path.join(place, "images")),),
        tokenizer_path=os.path.join(place, "tokenizer"),
        version="v1",
        image_aspect_ratio="pad",
        model_max_length=2048,
        seq_length=2048,
        tiling=ImageTiling(tile_size=336, tile_tokens=IMAGE_TOKENS, side=24),
    )
    start = time.perf_counter()
    # The first call imports transformers.
    load_tokenizer(config.tokenizer_path, config.version)
    loading = time.perf_counter() - start
    before = status_fields(os.getpid())["VmHWM"]
    folder = os.path.join(place, "index")
    start = time.perf_counter()
    summary = build_index(config, folder, workers=workers)
    seconds = time.perf_counter() - start
    peak = status_fields(os.getpid())["VmHWM"]
    index = open_index(folder)
    chosen = [random.Random(0).randrange(len(index)) for _ in range(_READS)]
    start = time.perf_counter()
    for number in chosen:
        index[number]
    reading = (time.perf_counter() - start) / _READS
    arrow_mb = sum(entry.stat().st_size for entry in os.scandir(folder)) / 1e6
    shutil.rmtree(folder)
    return {
        "workers": workers,
        "records": summary.records,
        "kept": summary.kept,
        "positions_a_sample": summary.tokens / summary.kept,
        "seconds": seconds,
        "samples_per_second": summary.records / (seconds + loading),
        "seconds_of_importing_and_loading_the_tokenizer": loading,
        "builder_peak_gb": peak / 1e9,
        "builder_peak_above_start_gb": (peak - before) / 1e9,
        "index_mb": arrow_mb,
        "seconds_to_read_a_sample": reading,
    }


def judged(builds: list[dict], sizes: list[dict]) -> list[dict]:
    """One entry for each limit whose quantity was measured."""
    limits = []
    for one in builds:
        if one["workers"] == 2 and one["records"] >= LIMIT_RATE_SAMPLES:
            rate = one["samples_per_second"]
            limits.append(("samples a second of two workers, at least", rate, LIMIT_RATE, rate >= LIMIT_RATE))
    small, large = (one["builder_peak_above_start_gb"] for one in sizes)
    growth = large - small
    what = "GB of the builder for ten times the records, at most"
    limits.append((what, growth, LIMIT_GROWTH_GB, growth <= LIMIT_GROWTH_GB))
    reading = max(one["seconds_to_read_a_sample"] for one in builds)
    limits.append(("seconds to read a sample, at most", reading, LIMIT_READ, reading <= LIMIT_READ))
    return [dict(zip(("quantity", "value", "limit", "holds"), entry, strict=True)) for entry in limits]


def as_text(result: dict) -> str:
    """The result as a table and the limits, for people."""
    lines = [
        f"{result['data']['samples']} records ({result['data']['file_mb']:.0f} MB of JSON,"
        f" {result['data']['pictures']} pictures), {result['builds'][0]['positions_a_sample']:.0f} positions each",
        "workers   records   seconds   samples/s   CPU s   builder GB (above its start)   read us",
    ]
    for one in (*result["builds"], *result["text_alone"]):
        lines.append(
            f"{one['workers']:7}{one['records']:10}{one['seconds']:10.1f}{one['samples_per_second']:12.0f}"
            f"{one['cpu_seconds']:8.1f}{one['builder_peak_gb']:10.3f} ({one['builder_peak_above_start_gb']:.3f})"
            f"{1e6 * one['seconds_to_read_a_sample']:23.1f}"
        )
    for entry in result["limits"]:
        state = "holds" if entry["holds"] else "FAILS"
        lines.append(f"{state}: {entry['quantity']} {entry['limit']:g}: {entry['value']:.4g}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(build(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
