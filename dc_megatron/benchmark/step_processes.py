"""The processes of one variant, and talking to them."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile

from dc_megatron.benchmark.machine import ROOT
from dc_megatron.benchmark.step_variants import Variant
from dc_megatron.benchmark.step_workload import Workload
from dc_megatron.errors import UserError

# What the calling shell may have set for a launch of its own.
_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class VariantProcesses:
    """Started at once; ``ask`` sends a command to all ranks and returns rank 0's answer."""

    def __init__(self, workload: Workload, variant: Variant, overrides: dict):
        self.variant = variant
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the processes)
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCH}
        path = os.pathsep.join(filter(None, (ROOT, environment.get("PYTHONPATH"))))
        size = variant.tensor_parallel
        threads = str(max(1, workload.threads // size))
        environment |= {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        }
        words = [workload.name, variant.name, json.dumps(overrides)]
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "dc_megatron.benchmark.step_child", *words],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
            for rank in range(size)
        ]

    def ask(self, command: str) -> dict:
        """UserError where a rank fails or has died, with the end of what it printed."""
        try:
            for process in self._processes:
                process.stdin.write(command + "\n")
                process.stdin.flush()
        except BrokenPipeError:
            raise self._failure(command, "the process has ended") from None
        answers: dict[int, dict] = {}
        with selectors.DefaultSelector() as waiting:
            for rank, process in enumerate(self._processes):
                waiting.register(process.stdout, selectors.EVENT_READ, rank)
            # Whoever speaks first: a rank that has failed leaves the others waiting for it.
            while len(answers) < len(self._processes):
                for key, _ in waiting.select():
                    line = key.fileobj.readline()
                    answers[key.data] = json.loads(line) if line else {"error": "the process has ended"}
                    if "error" in answers[key.data]:
                        raise self._failure(command, answers[key.data]["error"])
                    waiting.unregister(key.fileobj)
        return answers[0]

    def _failure(self, command: str, error: str) -> UserError:
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")[-3000:]
        return UserError(f"{self.variant.name}, {command}: {error}\n{said}")

    def stop(self) -> None:
        """End the processes; their memory is free when this returns."""
        for process in self._processes:
            # One that has ended takes no more of what ``ask`` could not send.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        self._errors.close()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
