"""The benchmark of direct loading: what it counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dc_megatron.benchmark import direct_load
from dc_megatron.benchmark.checkpoint_shapes import SHAPES, num_bytes, write_checkpoint

ROOT = Path(__file__).resolve().parents[3]


def test_shards_of_all_ranks_are_the_whole_model(tmp_path):
    write_checkpoint(str(tmp_path), "tiny")
    figures = [direct_load.fill_shards(str(tmp_path), rank, 2) for rank in range(2)]
    config = SHAPES["tiny"].config
    # Norms are on every rank; the vocabulary is padded from 320 rows to 512.
    norms = (2 * config["num_hidden_layers"] + 1) * config["hidden_size"] * 2
    padding = 2 * (512 - 320) * config["hidden_size"] * 2
    assert sum(rank["shard_bytes"] for rank in figures) == num_bytes(SHAPES["tiny"]) + norms + padding


@pytest.mark.long
def test_the_command(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "direct-load", "--shape", "tiny"]
    command += ["--page-cache", "files", "--folder", str(tmp_path / "disk"), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert [rank["rank"] for rank in result["ranks"]] == [0, 1]
    assert result["limits"][0]["limit"] == 1.4
    for rank in result["ranks"]:
        assert rank["ratio"] > 0
        assert rank["peak_resident_gb"] > 0
    assert "bytes read / bytes of the shard" in done.stdout
    assert list((tmp_path / "disk").iterdir()) == []
