"""Worker processes that stay alive between multi-rank tests, forked from one that has imported megatron.

A job names a function ``module:function``; the first ``world_size`` workers call it together, each inside a fresh
Gloo world. Results come back in rank order. A worker that fails or hangs ends the pool, which the next job restarts;
and so do some tens of jobs, because a few of Gloo's threads outlive each of them.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import socket
import time
import traceback
import warnings

from tests.helpers.fork_server import fork_context

MOST_JOBS = 40


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_job(rank: int, target: str, world_size: int, port: int, arguments: tuple, keywords: dict):
    import torch

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    module, name = target.split(":")
    try:
        return getattr(importlib.import_module(module), name)(*arguments, **keywords)
    finally:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        # A model that is part of a cycle keeps its groups, and each of them its threads.
        gc.collect()


def _serve(rank: int, connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["DC_DEVICE"] = "cpu"
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.WARNING)
    import torch

    torch.set_num_threads(1)
    from dc_megatron.runtime import patches

    patches.apply()
    connection.send("ready")
    while True:
        job = connection.recv()
        if job is None:
            return
        try:
            connection.send(("ok", _run_job(rank, *job)))
        except BaseException:
            connection.send(("failed", traceback.format_exc()))


class WorkerPool:
    """As many processes as the widest job so far has asked for."""

    def __init__(self):
        self.context = fork_context()
        self.processes = []
        self.connections = []
        self.jobs = 0

    def _start(self, workers: int) -> None:
        new = range(len(self.processes), workers)
        for rank in new:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self.processes.append(process)
            self.connections.append(ours)
        for rank in new:
            assert self.connections[rank].poll(300), "a test worker did not start within 300 s"
            self.connections[rank].recv()

    def run(self, target: str, world_size: int, *arguments, timeout: float = 240, **keywords) -> list:
        """Results of ``target`` by rank. Raises AssertionError with the traceback of the first rank that failed."""
        self.jobs += 1
        if self.jobs > MOST_JOBS:
            self.stop()
        self._start(world_size)
        job = (target, world_size, free_port(), arguments, keywords)
        for connection in self.connections[:world_size]:
            connection.send(job)
        results = [None] * world_size
        waiting = set(range(world_size))
        deadline = time.monotonic() + timeout
        while waiting:
            for rank in sorted(waiting):
                if not self.connections[rank].poll(0.01):
                    continue
                state, value = self.connections[rank].recv()
                if state == "failed":
                    self.stop()
                    raise AssertionError(f"rank {rank} of {world_size}, {target}:\n{value}")
                results[rank] = value
                waiting.discard(rank)
            if time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"{target}: ranks {sorted(waiting)} did not return within {timeout} s")
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.connections, self.jobs = [], [], 0
