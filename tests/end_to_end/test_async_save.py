"""--async-save: the checkpoints are those of saves that training waits for, and a run resumes from them."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dc_megatron.reports.checkpoint_report import examine
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.staged_iteration import STAGING
from tests.end_to_end.launch import TRAIN, metrics, run, torchrun, train_forked
from tests.helpers.workspace import training_flags

TIMES = ("step_seconds", "data_wait_seconds")
STEPS, FIRST_PART = 6, 4
# Every step saves, so that one is always being written; no half of a pair of ranks writes what the other does.
FLAGS = {"save_steps": 1, "lr_scheduler_type": "constant", "log-images": 0, "tensor-model-parallel-size": 2}
PROJECTOR = "mm_projector.safetensors"


def train(workspace, output: Path, **more) -> str:
    flags = training_flags(workspace, output, **{**FLAGS, "max_steps": STEPS, **more})
    return train_forked([*torchrun(2), *TRAIN, *flags], output / "logs").output


def computed(folder: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics(folder)]


def tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    reader = FileSystemReader(checkpoint_folder.iteration_folder(folder, iteration))
    entries = reader.read_metadata().state_dict_metadata.items()
    kept = {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in kept.items()}
    load(state, storage_reader=reader, no_dist=True)
    return state


def test_saves_behind_training_are_those_it_waits_for_and_can_be_resumed(workspace, tmp_path):
    waited, behind = tmp_path / "waited", tmp_path / "behind"
    train(workspace, waited)
    said = train(workspace, behind, max_steps=FIRST_PART, **{"async-save": True})
    assert said.count("scheduled an async checkpoint save") == FIRST_PART
    assert said.count("is complete: ") == FIRST_PART
    assert checkpoint_folder.newest_complete(behind) == (FIRST_PART, [])
    said = train(workspace, behind, **{"async-save": True})
    assert f"resuming from iteration {FIRST_PART}" in said
    assert computed(behind) == computed(waited)
    for iteration in range(1, STEPS + 1):
        found, expected = tensors(behind, iteration), tensors(waited, iteration)
        assert "optimizer.state.exp_avg.connector.mlp.0.weight" in found
        assert [name for name in expected if not torch.equal(expected[name], found.pop(name))] == [], iteration
        assert not found
        positions = [checkpoint_folder.read_manifest(folder, iteration).content for folder in (behind, waited)]
        assert positions[0] == positions[1]
    found, expected = load_file(behind / PROJECTOR), load_file(waited / PROJECTOR)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert not list(behind.glob(f"{STAGING}*"))
    report = examine(str(behind), check=True)
    assert (report["verified"], report["problems"]) == (True, [])


@pytest.mark.long
@pytest.mark.parametrize("saves", [{}, {"async-save": True}], ids=["waited", "behind"])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_one_message(workspace, tmp_path, saves):
    """A limit on the size of files stands for a full disk; it is below a rank's part, and above everything else."""
    output = tmp_path / "run"
    command = shlex.join([*torchrun(2), *TRAIN, *training_flags(workspace, output, **{**FLAGS, **saves})])
    done = run(["bash", "-c", f"ulimit -f 1500; exec {command}"], tmp_path / "logs")
    done.assert_refused(f"--output_dir {output}: the checkpoint of iteration 1 cannot be written", "GB are free there")
    assert checkpoint_folder.newest_complete(output) == (None, [])
