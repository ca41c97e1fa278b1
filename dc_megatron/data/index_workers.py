"""Processes that make samples of chunks, one for every core, with results in the order of the chunks.

Workers are started as programs of their own, not forked and not by multiprocessing: this process may have threads (of
torch, of tokenizers), and whatever started it is not run again. They import neither torch nor transformers. A worker
lives as long as its pipe: it ends when this process does, however that ends.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from dc_megatron.config import DataConfig
from dc_megatron.data.image_store import open_stores
from dc_megatron.data.index_samples import ChunkResult, SampleMaker
from dc_megatron.data.index_worker import read_message, write_message
from dc_megatron.data.json_stream import Chunk
from dc_megatron.data.tokenization import TextTokenizer
from dc_megatron.errors import UserError

# Smaller data sets are done before a second process would have started.
_SMALL_BYTES = 4 << 20
_MOST_WORKERS = 64
# A worker imports from where this process does.
_PROGRAM = "import sys; sys.path[:] = {paths!r}; from dc_megatron.data.index_worker import main; main()"


def worker_count(workers: int | None, size: int) -> int:
    """Processes for data files of ``size`` bytes; ``workers`` where it is given."""
    if workers is not None:
        return max(1, workers)
    return 1 if size < _SMALL_BYTES else min(len(os.sched_getaffinity(0)), _MOST_WORKERS)


def sample_makers(config: DataConfig, tokenizer: TextTokenizer, cache: str | None, count: int) -> _Here | _Pool:
    """A context manager whose ``map`` turns (source, chunk) pairs into ChunkResults, in order.

    cache: the stores' (see ``open_store``). UserError: a store cannot be opened.
    """
    return _Here(config, tokenizer, cache) if count == 1 else _Pool(config, tokenizer, cache, count)


class _Here:
    """Everything in this process."""

    def __init__(self, config: DataConfig, tokenizer: TextTokenizer, cache: str | None):
        self._maker = SampleMaker(config, tokenizer, cache)

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_) -> None:
        pass

    def map(self, chunks: Iterable[tuple[int, Chunk]]) -> Iterator[ChunkResult]:
        return (self._maker.chunk(chunk, source) for source, chunk in chunks)


class _Pool:
    """``count`` workers; a thread for each talks to it, so that all wait at the same time."""

    def __init__(self, config: DataConfig, tokenizer: TextTokenizer, cache: str | None, count: int):
        # What is wrong with a store is said once, and shards are listed once, for all workers.
        open_stores(config.sources, cache=cache)
        self._setup = pickle.dumps((config, _portable(tokenizer), cache))
        self._count = count

    def __enter__(self) -> _Pool:
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="index")
        try:
            for _ in range(self._count):
                self._workers.append(_Worker())
            for worker in self._workers:
                worker.send(self._setup)
                self._idle.put(worker)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def map(self, chunks: Iterable[tuple[int, Chunk]]) -> Iterator[ChunkResult]:
        waiting: deque[Future] = deque()
        for source, chunk in chunks:
            waiting.append(self._threads.submit(self._ask, source, chunk))
            # Bounds what lies in memory; a slow chunk in front still leaves the others enough to do.
            if len(waiting) > 3 * self._count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _ask(self, source: int, chunk: Chunk) -> ChunkResult:
        worker = self._idle.get()
        try:
            return worker.ask(source, chunk)
        finally:
            self._idle.put(worker)

    def _stop(self) -> None:
        # Killed, so that nobody waits for the rest of a chunk; threads that talk to them see the end of a pipe.
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()


class _Worker:
    """One process, which answers a chunk with a ChunkResult."""

    def __init__(self):
        one_thread = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM.format(paths=[path or os.getcwd() for path in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **one_thread},
            # A group of its own: Ctrl-C is for this process, which then ends the workers.
            process_group=0,
        )

    def send(self, message: bytes) -> None:
        try:
            write_message(self._process.stdin, message)
        except OSError:
            raise self._death("it was started") from None

    def ask(self, source: int, chunk: Chunk) -> ChunkResult:
        what = f"it worked on records {chunk.first} to {chunk.first + chunk.records - 1} of {chunk.path}"
        try:
            write_message(self._process.stdin, pickle.dumps((source, chunk)))
            kind, answer = pickle.loads(read_message(self._process.stdout))
        except (OSError, EOFError, ValueError):
            raise self._death(what) from None
        if kind == "refused":
            raise UserError(answer)
        if kind == "failed":
            raise RuntimeError(f"a worker of the data index failed while {what}:\n{answer}")
        return answer

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # unsent bytes for a process that is gone
                pipe.close()

    def _death(self, when: str) -> UserError:
        status = self._process.wait()
        cause = f"signal {-status}" if status < 0 else f"status {status}"
        return UserError(
            f"a worker process of the data index died ({cause}) while {when}; if the machine ran out of memory"
            " (signal 9), give it more, or fewer processor cores"
        )


def _portable(tokenizer: TextTokenizer) -> TextTokenizer:
    """The tokenizer without its transformers object, which encoding does not need and workers do not import."""
    light = copy.copy(tokenizer)
    light.hugging_face = None
    return light
