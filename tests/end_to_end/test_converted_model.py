"""A model converted by tools/convert.py import is what its Hugging Face folder is, in training and in the tools."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.importer import import_checkpoint
from tests.end_to_end.launch import ROOT, TRAIN, metrics, run, torchrun, train_forked
from tests.helpers.workspace import training_flags

STEPS = 3


@pytest.fixture(scope="module")
def imported(workspace, tmp_path_factory) -> Path:
    """The language model alone, with a tracker that is no help."""
    folder = tmp_path_factory.mktemp("imported") / "llama"
    import_checkpoint(workspace["llama"], str(folder))
    (folder / checkpoint_folder.TRACKER).write_text("")
    return folder


@pytest.fixture(scope="module")
def stage_1(workspace, imported, tmp_path_factory) -> Path:
    """Stage 1 over it on two ranks: without --finetune, without a projector."""
    output = tmp_path_factory.mktemp("stage1") / "run"
    more = {"tensor-model-parallel-size": 2, "trainable": "connector", "max_steps": STEPS, "load": imported}
    done = train_forked([*torchrun(2), *TRAIN, *training_flags(workspace, output, **more)], output / "logs")
    assert f"weights are taken from the converted model in {imported}" in done.output
    return output


def test_training_begins_as_from_the_hugging_face_folder(workspace, stage_1, tmp_path):
    flags = training_flags(workspace, tmp_path / "run", trainable="connector", max_steps=STEPS)
    train_forked([sys.executable, *TRAIN, *flags], tmp_path / "logs")
    direct, converted = metrics(tmp_path / "run"), metrics(stage_1)
    assert [line["iteration"] for line in converted] == list(range(1, STEPS + 1))
    for ours, theirs in zip(converted, direct, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert checkpoint_folder.newest_complete(str(stage_1)) == (STEPS, [])


def score(workspace, folder: Path, *words: str) -> dict:
    data = ["--data_path", workspace["data"], "--image_folder", workspace["images"], "--json"]
    tool = [sys.executable, "tools/score.py", *data, *words]
    return json.loads(run(tool, folder, cwd=ROOT).assert_succeeded().output.splitlines()[-1])


@pytest.mark.long
def test_tools_take_it_with_a_tower_and_a_projector(workspace, imported, stage_1, tmp_path):
    parts = ["--vision_tower", workspace["clip"], "--mm_dense_connector_type", "dci", "--version", "v1"]
    parts += ["--pretrain_mm_mlp_adapter", str(stage_1 / "mm_projector.safetensors")]
    converted = score(workspace, tmp_path / "a", "--load", str(imported), *parts)
    direct = score(workspace, tmp_path / "b", "--model_name_or_path", workspace["llama"], *parts)
    assert converted["loss"] == pytest.approx(direct["loss"], abs=2e-5)
    assert converted["supervised_tokens"] == direct["supervised_tokens"]
