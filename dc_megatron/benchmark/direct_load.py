"""What one rank really reads when its shards are filled straight from a Hugging Face folder.

Each rank is a process of its own that goes through all parameters of its shard, from an empty page cache.
"""

from __future__ import annotations

import json
import os
import sys
import time

from dc_megatron.benchmark import machine
from dc_megatron.benchmark.checkpoint_shapes import shape_of
from dc_megatron.benchmark.child_process import measure
from dc_megatron.benchmark.work_folder import SOURCE, WorkFolder
from dc_megatron.config import LanguageConfig, check_parallel_layout, padded_vocab_size
from dc_megatron.errors import UserError

# Bytes read / bytes of the shard, at tensor-parallel size 2.
LIMIT = 1.4


def benchmark_direct_load(
    shape: str,
    folder: str,
    tensor_parallel: int = 2,
    layers: int | None = None,
    keep: bool = False,
    whole_cache: bool = True,
) -> dict:
    """Measure every rank of ``tensor_parallel``; returns plain values (see benchmarks/README.md).

    The folder is written first and removed at the end, unless ``keep``. UserError: no room, a size that does not
    divide the model.
    """
    facts = machine.describe(folder)
    config = shape_of(shape, layers).config
    with WorkFolder(folder, shape, layers, keep=keep) as work:
        source = work.inside(SOURCE)
        check_parallel_layout(LanguageConfig.from_folder(source), tensor_parallel, 1)
        ranks, cache = [], ""
        for rank in range(tensor_parallel):
            cache = machine.empty_page_cache([source], whole_cache)
            ranks.append(_measure_rank(source, rank, tensor_parallel))
    worst = max(rank["ratio"] for rank in ranks)
    limits = [{"quantity": "bytes read / bytes of the shard", "limit": LIMIT, "value": worst, "holds": worst <= LIMIT}]
    return {
        "benchmark": "direct-load",
        **facts,
        "checkpoint": {
            "shape": shape,
            "layers": config["num_hidden_layers"],
            "gb": work.size / 1e9,
        },
        "tensor_parallel": tensor_parallel,
        "page_cache_before_each_rank": cache,
        "ranks": ranks,
        "limits": limits if tensor_parallel == 2 else [],
    }


def _measure_rank(source: str, rank: int, size: int) -> dict:
    command = [sys.executable, "-m", "dc_megatron.benchmark.direct_load", source, str(rank), str(size)]
    path = os.pathsep.join(filter(None, (machine.ROOT, os.environ.get("PYTHONPATH"))))
    measurement = measure(command, os.environ | {"PYTHONPATH": path})
    figures = json.loads(measurement.output.splitlines()[-1])
    # A file that is mapped is read without a call, and from a warm cache nothing comes from the disk.
    read = max(figures["bytes_read_by_calls"], figures["bytes_read_from_disk"])
    return {
        "rank": rank,
        **figures,
        "ratio": read / figures["shard_bytes"],
        "gb_per_second": figures["shard_bytes"] / 1e9 / figures["seconds"],
        "process_seconds": measurement.seconds,
        "cpu_seconds": measurement.cpu_seconds,
        "peak_anonymous_gb": measurement.peak_anonymous / 1e9,
        "peak_resident_gb": measurement.peak_resident / 1e9,
    }


def fill_shards(folder: str, rank: int, size: int) -> dict:
    """Read every parameter of one rank once, one at a time, and count: what a process started for it prints."""
    from dc_megatron.weights.language_loading import LanguageWeights

    language = LanguageConfig.from_folder(folder)
    before, start = _bytes_read(), time.perf_counter()
    weights = LanguageWeights(folder, language, rank, size, padded_vocab_size(language.vocab_size, size))
    shard_bytes = 0
    for rule in weights.table:
        for layer in range(language.num_hidden_layers) if rule.layered else (None,):
            shard_bytes += weights.shard(rule.key.format(layer=layer)).nbytes
    seconds = time.perf_counter() - start
    calls, disk = (after - first for after, first in zip(_bytes_read(), before, strict=True))
    return {
        "shard_bytes": shard_bytes,
        "seconds": seconds,
        "bytes_read_by_calls": calls,
        "bytes_read_from_disk": disk,
    }


def _bytes_read() -> tuple[int, int]:
    """(bytes that calls such as read and pread returned, bytes that came from the disk) of this process so far."""
    with open("/proc/self/io", encoding="utf-8") as file:
        fields = dict(line.split(": ") for line in file)
    return int(fields["rchar"]), int(fields["read_bytes"])


def as_text(result: dict) -> str:
    """The result as a table and the limit, for people."""
    lines = ["rank   shard GB   read GB   from disk GB   ratio   seconds   anonymous GB   resident GB"]
    for rank in result["ranks"]:
        lines.append(
            f"{rank['rank']:4}{rank['shard_bytes'] / 1e9:11.3f}{rank['bytes_read_by_calls'] / 1e9:10.3f}"
            f"{rank['bytes_read_from_disk'] / 1e9:15.3f}{rank['ratio']:8.3f}{rank['seconds']:10.1f}"
            f"{rank['peak_anonymous_gb']:15.3f}{rank['peak_resident_gb']:14.3f}"
        )
    for entry in result["limits"]:
        lines += [
            "",
            f"{'holds' if entry['holds'] else 'FAILS'}: {entry['quantity']}: {entry['value']:.3f}"
            f" (at most {entry['limit']})",
        ]
    return "\n".join(lines)


def main() -> int:
    folder, rank, size = sys.argv[1:]
    try:
        print(json.dumps(fill_shards(folder, int(rank), int(size))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
