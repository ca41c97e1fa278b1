"""Endless micro-batches in an order that depends on seed and position only, prepared by a background thread.

Position p of the sample stream is sample ``order(epoch)[p % n]`` of epoch ``p // n``. A micro-batch takes consecutive
positions, rank after rank, so the same global batch holds the same samples at any data-parallel size, and a run
resumes from its number of consumed samples alone.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable

from dc_megatron.config import DataConfig, VisionConfig
from dc_megatron.config import image_share as share_of
from dc_megatron.data.image_loading import ImageLoader, image_loader
from dc_megatron.data.index import SampleIndex
from dc_megatron.data.rows import assemble, sample_order


class SampleStream:
    """Random access to the endless stream of samples; keeps the permutation of the epoch it was last asked for."""

    def __init__(self, length: int, seed: int, order: str):
        self._length, self._seed, self._order = length, seed, order
        self._epoch, self._permutation = -1, None

    def __getitem__(self, position: int) -> int:
        """Index of the sample at ``position`` >= 0 of the stream."""
        epoch, offset = divmod(position, self._length)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = sample_order(self._length, self._seed, epoch, self._order)
        return int(self._permutation[offset])


class MicroBatches:
    """Iterator of Batch dicts (see rows.assemble; ``pixel_values`` is added here).

    index: the opened SampleIndex. vision: for the pixels. micro_batch_size: rows of one batch. data_parallel_rank,
    data_parallel_size: this rank's part of every step. image_share: (rank, size) in the group that shares the images
    of a micro-batch; this rank's k images (see config.image_share) go into pixel_values float32 [k, 3, H, W].
    decode_images=False: pixel_values is None. start_sample: samples that the whole run has consumed. prefetch: batches
    prepared ahead; 0 prepares them in next() itself. image_threads: CPU threads of DALI.

    ``data_wait_seconds`` sums the time next() waited. counts["substituted_images"] counts this rank's share only. An
    exception of the background thread is raised by next(). ``close()`` ends the thread.
    """

    def __init__(
        self,
        index: SampleIndex,
        config: DataConfig,
        vision: VisionConfig,
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        image_share: tuple[int, int] = (0, 1),
        decode_images: bool = True,
        start_sample: int = 0,
        prefetch: int = 2,
        image_threads: int = 1,
    ):
        stream = SampleStream(len(index), config.seed, config.order)
        make_loader = _loader_factory(config, vision, image_threads) if decode_images else None
        loaders: list[ImageLoader] = []
        step = micro_batch_size * data_parallel_size

        def produce(number: int) -> dict:
            first = start_sample + number * step + data_parallel_rank * micro_batch_size
            samples = [index[stream[first + row]] for row in range(micro_batch_size)]
            batch = assemble(samples, config.seq_length, config.tokens_per_image)
            batch["pixel_values"] = None
            if make_loader is not None:
                # Made where it is used: DALI's pipeline belongs to the thread that runs it.
                if not loaders:
                    loaders.append(make_loader())
                files = [os.path.join(config.image_folder, name) for sample in samples for name in sample.images]
                share = share_of(len(files), *image_share)
                batch["pixel_values"], failed = loaders[0].load(files[share.start : share.stop])
                batch["counts"]["substituted_images"] = len(failed)
            return batch

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
        result, error = self._queue.get()
        if error is not None:
            self.stop()
            raise error
        return result

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


def _loader_factory(config: DataConfig, vision: VisionConfig, threads: int):
    def make() -> ImageLoader:
        return image_loader(config.image_backend, vision, config.image_aspect_ratio, threads=threads)

    return make
