"""Whole training runs without the seconds of importing: each rank is forked from a process that has imported all of it.

``python -m torch.distributed.run`` starts a process from nothing, which takes longer than a tiny run. The ranks here
are processes of their own too, with the environment that torchrun would give them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.fork_server import fork_context
from tests.helpers.worker_pool import free_port


@dataclass(frozen=True)
class ForkedRun:
    """``status`` of each rank; ``output`` and ``errors`` of all of them, one rank after the other."""

    status: tuple[int, ...]
    output: str
    errors: str

    def assert_succeeded(self) -> ForkedRun:
        assert not any(self.status), f"status {self.status}\n{self.output[-2000:]}\n{self.errors[-4000:]}"
        return self


class ForkedRuns:
    """Starts the importing process with the first run; it ends with the test process."""

    def __init__(self):
        self._context = fork_context()

    def run(self, argv: list[str], processes: int, folder: Path, timeout: float = 240) -> ForkedRun:
        """``dc_megatron.pretrain`` with ``argv`` on ``processes`` ranks; their words go to files in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        port, ranks = free_port(), []
        for rank in range(processes):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "DC_DEVICE": "cpu"}
            environment = {name: str(value) for name, value in variables.items()}
            place = str(folder / f"rank{rank}")
            ranks.append(self._context.Process(target=_rank, args=(argv, environment, place), daemon=True))
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout)
            if process.exitcode is None:
                for other in ranks:
                    other.kill()
        parts = [[(folder / f"rank{rank}.{end}").read_text() for rank in range(processes)] for end in ("out", "err")]
        status = tuple(-9 if process.exitcode is None else process.exitcode for process in ranks)
        return ForkedRun(status, *("".join(texts) for texts in parts))


def _rank(argv: list[str], environment: dict[str, str], place: str) -> None:
    os.environ.update(environment)
    with open(f"{place}.out", "w") as out, open(f"{place}.err", "w") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
    sys.argv = ["pretrain"]
    main = importlib.import_module("dc_megatron.pretrain").main
    status = 1
    with contextlib.suppress(SystemExit):
        status = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
