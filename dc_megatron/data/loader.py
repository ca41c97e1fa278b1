"""Endless micro-batches in an order that depends on seed and position only, prepared by a background thread.

The row plan says which samples stand in row p of the stream. A micro-batch takes consecutive rows, rank after rank, so
the same global batch holds the same rows at any data-parallel size, and a run resumes from its number of consumed rows
alone.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from dc_megatron.config import DataConfig, VisionConfig, dealt_tiles
from dc_megatron.config import image_share as share_of
from dc_megatron.data.image_loading import image_loader, tile_requests
from dc_megatron.data.image_store import ImageStore, open_stores
from dc_megatron.data.index import SampleIndex
from dc_megatron.data.rows import assemble, pinned, row_length

logger = logging.getLogger(__name__)

# A step that waits this long for its data says so, and again after as long.
_SAY_AFTER_SECONDS = 30.0


class RowsByPosition(Protocol):
    """A row plan: numbers of the samples in the row at a position of an endless stream."""

    def __getitem__(self, position: int) -> Sequence[int] | np.ndarray: ...


class MicroBatches:
    """Iterator of Batch dicts (see rows.assemble; ``pixel_values`` is added here).

    index: the opened SampleIndex. plan: which samples stand in which row. vision: for the pixels. micro_batch_size:
    rows of one batch. data_parallel_rank, data_parallel_size: this rank's part of every step. image_share: (rank, size)
    in the group that shares the tiles of a micro-batch; this rank's k tiles (see config.image_share) go into
    pixel_values float32 [k, 3, H, W]. deal_images: tiles go to the group's ranks one after the other, over all
    micro-batches (see config.dealt_tiles). decode_images=False: pixel_values is None.

    start_row: rows that the whole run has consumed. length_multiple: unpacked rows are as long as the longest of their
    micro-batch, rounded up to this. prefetch: batches prepared ahead; 0 prepares them in next() itself. image_threads:
    threads that decode. stores: one for every data source (default: opened from ``config``). pin_memory: batches lie in
    page-locked memory.

    ``data_wait_seconds`` sums the time next() waited. counts["substituted_images"] counts this rank's share only. An
    exception of the background thread is raised by next(). ``close()`` ends the thread.
    """

    def __init__(
        self,
        index: SampleIndex,
        plan: RowsByPosition,
        config: DataConfig,
        vision: VisionConfig,
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        image_share: tuple[int, int] = (0, 1),
        deal_images: bool = False,
        decode_images: bool = True,
        start_row: int = 0,
        length_multiple: int = 1,
        prefetch: int = 4,
        image_threads: int = 1,
        stores: Sequence[ImageStore] | None = None,
        pin_memory: bool = False,
    ):
        packed = config.packing != "none"
        assert not packed or micro_batch_size == 1, "packed rows are attended to one at a time"
        pixels = None
        if decode_images:
            pixels = _Pixels(config, vision, image_share, deal_images, image_threads, stores)
        step = micro_batch_size * data_parallel_size

        def produce(number: int) -> dict:
            first = start_row + number * step + data_parallel_rank * micro_batch_size
            rows = [[index[sample] for sample in plan[first + row]] for row in range(micro_batch_size)]
            length = config.seq_length if packed else row_length(rows, length_multiple)
            batch = assemble(rows, length, config.tiling)
            batch["pixel_values"] = None
            if pixels is not None:
                batch["pixel_values"], failed = pixels.load(batch)
                batch["counts"]["substituted_images"] = failed
            return pinned(batch) if pin_memory else batch

        self.data_wait_seconds = 0.0
        self._produce = produce
        self._number = 0
        self._prefetcher = _Prefetcher(produce, prefetch) if prefetch else None
        if self._prefetcher is not None:
            weakref.finalize(self, self._prefetcher.stop)

    def __iter__(self) -> MicroBatches:
        return self

    def __next__(self) -> dict:
        started = time.perf_counter()
        batch = self._produce(self._number) if self._prefetcher is None else self._prefetcher.take()
        self._number += 1
        self.data_wait_seconds += time.perf_counter() - started
        return batch

    def close(self) -> None:
        """End the background thread; next() must not be called afterwards."""
        if self._prefetcher is not None:
            self._prefetcher.stop()


class _Pixels:
    """This rank's share of the tiles of a batch."""

    def __init__(
        self, config: DataConfig, vision: VisionConfig, share: tuple[int, int], deal: bool, threads: int, stores
    ):
        self._config, self._share, self._stores = config, share, stores
        # Batches come one after the other, from the first of this process on.
        self._deal, self._dealt = deal, 0
        # Made by the thread that makes the batches' iterator: only its current CUDA device is this rank's.
        self._loader = image_loader(
            config.image_backend,
            vision,
            config.image_aspect_ratio,
            config.tiling,
            threads=threads,
            decode_device=config.image_decode_device,
        )

    def load(self, batch: dict) -> tuple[torch.Tensor, int]:
        """(float32 [k, 3, H, W], pictures that could not be decoded)."""
        if self._stores is None:
            self._stores = open_stores(self._config.sources)
        count = batch["num_images"]
        share = dealt_tiles(count, self._dealt, *self._share) if self._deal else share_of(count, *self._share)
        self._dealt += count
        pixels, failed = self._loader.load(tile_requests(batch["pictures"], self._stores, share))
        return pixels, len(failed)


class _Prefetcher:
    """Runs ``produce(0), produce(1), ...`` in a daemon thread, at most ``depth`` results ahead."""

    def __init__(self, produce: Callable[[int], dict], depth: int):
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(produce,), name="data-prefetch", daemon=True)
        self._thread.start()
        # DALI must not be running when the interpreter takes its libraries down.
        atexit.register(self.stop)

    def take(self) -> dict:
        if self._stopped.is_set():
            raise RuntimeError("the data loader has been closed")
        result, error = self._wait()
        if error is not None:
            self.stop()
            raise error
        return result

    def _wait(self) -> tuple:
        waited = 0.0
        while True:
            try:
                return self._queue.get(timeout=_SAY_AFTER_SECONDS)
            except queue.Empty:
                waited += _SAY_AFTER_SECONDS
                logger.warning("the step has waited %.0f s for its data: slow pictures or a slow store", waited)

    def stop(self) -> None:
        atexit.unregister(self.stop)
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)

    def _work(self, produce: Callable[[int], dict]) -> None:
        number = 0
        while not self._stopped.is_set():
            try:
                item = (produce(number), None)
            except Exception as error:
                item = (None, error)
            if not self._put(item) or item[1] is not None:
                return
            number += 1

    def _put(self, item: tuple) -> bool:
        """Wait for room; False where the loader was closed meanwhile."""
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
