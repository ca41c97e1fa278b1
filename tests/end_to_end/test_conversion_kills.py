"""Conversions that are killed: nothing half-made has the name of the result, and the same command ends the work."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dc_megatron.benchmark.checkpoint_shapes import write_checkpoint
from dc_megatron.weights.manifest import damaged_files, read_manifest
from tests.end_to_end.launch import PATIENCE, ROOT

CONVERT = [sys.executable, str(ROOT / "tools" / "convert.py")]
INSPECT = [sys.executable, str(ROOT / "tools" / "inspect_checkpoint.py")]


def written(folder: Path) -> int:
    """Bytes below ``folder``; files may come and go meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(parent, name))
            except FileNotFoundError:
                continue
    return total


def kill_after(command: list[str], partial: Path, num_bytes: int) -> None:
    """Start ``command`` and kill it with SIGKILL when ``partial`` holds more than ``num_bytes``."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + PATIENCE
    while process.poll() is None and written(partial) <= num_bytes:
        assert time.monotonic() < limit, "the conversion writes nothing"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was over before it could be killed"


@pytest.mark.long
def test_three_kills_of_an_import_and_of_an_export(tmp_path):
    source, tree, back = tmp_path / "hf", tmp_path / "tree", tmp_path / "back"
    # One layer of Llama-2-7B, and its embeddings: about a second of writing.
    write_checkpoint(str(source), "7b", layers=1)
    size = written(source)
    for target, manifest_folder, command in (
        (tree, tree / "release", [*CONVERT, "import", "--hf", str(source), "--save", str(tree)]),
        (back, back, [*CONVERT, "export", "--load", str(tree), "--format", "hf", "--save", str(back)]),
    ):
        partial = Path(f"{target}.partial")
        for share in (0.0, 0.4, 0.9):
            kill_after(command, partial, int(size * share))
            assert not target.exists()
            said = subprocess.run([*INSPECT, str(partial)], capture_output=True, text=True, timeout=PATIENCE)
            assert said.returncode == 1, said.stdout + said.stderr
        finished = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert finished.returncode == 0, finished.stderr[-3000:]
        assert not partial.exists()
        manifest, reason = read_manifest(str(manifest_folder))
        assert manifest is not None, reason
        assert damaged_files(str(manifest_folder), manifest) == []
    same = subprocess.run(
        [*CONVERT, "verify", str(source), str(back)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert same.returncode == 0, same.stdout + same.stderr
    shutil.rmtree(tmp_path)
