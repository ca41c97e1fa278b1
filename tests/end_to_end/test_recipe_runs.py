"""Every recipe of examples/ for two steps with tiny models, in ranks that are forked and not launched.

test_recipes.py starts some of them as users do. Models are tiny Llamas here, whatever the recipe's is.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from dc_megatron.weights import checkpoint_folder
from tests.end_to_end.launch import ROOT, metrics
from tests.helpers.forked_runs import ForkedRun
from tests.unit.training.test_launchers import RECIPES

# Recipe -> processes over tensor and pipeline, and the parts that its log says are trained.
RUNS = {
    "pretrain_v100.sh": ("2 1", "connector"),
    "finetune_dc.sh": ("2 1", "connector, llm"),
    "finetune_llama3_70b.sh": ("1 2", "connector, llm"),
    "finetune_yi_34b.sh": ("2 1", "connector, llm"),
    "finetune_lora.sh": ("2 1", "connector, lora"),
}
FIRST = "pretrain_dc.sh"
REFUSED_HERE = "finetune_fp8.sh"


@pytest.fixture(scope="module")
def words_of(tmp_path_factory):
    """``words_of(recipe, **environment)``: what the recipe hands to the training program."""
    printer = tmp_path_factory.mktemp("printer") / "python"
    printer.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    printer.chmod(0o755)

    def words(recipe: str, **environment: str) -> list[str]:
        # As in a process that torchrun has started.
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        variables = {**os.environ, **ranks, "DC_TORCHRUN_PYTHON": str(printer), "DC_DEVICE": "cpu", **environment}
        command = ["bash", str(ROOT / "examples" / recipe)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        start, module, *given = done.stdout.splitlines()
        assert (start, module) == ("-m", "dc_megatron.pretrain")
        return given

    return words


@pytest.fixture(scope="module")
def train(forked, words_of, workspace, tmp_path_factory):
    """``train(recipe, division, **environment)``: the folder and the run of two steps on two ranks."""

    def run(recipe: str, division: str, **more: str) -> tuple[Path, ForkedRun]:
        folder = tmp_path_factory.mktemp("recipe")
        tensor, pipeline = division.split()
        environment = {"MODEL": workspace["llama"], "VISION_TOWER": workspace["clip"], "DATA": workspace["data"]}
        environment |= {"IMAGE_FOLDER": workspace["images"], "OUTPUT": str(folder / "run"), "GLOBAL_BATCH_SIZE": "4"}
        environment |= {"MODEL_MAX_LENGTH": "128", "SEQ_LENGTH": "256", "WORKERS": "1", **more}
        environment |= {"TENSOR_PARALLEL": tensor, "PIPELINE_PARALLEL": pipeline}
        short = ["--max_steps", "2", "--save_strategy", "no", "--log-images", "0", "--report_to", "none"]
        return folder / "run", forked.run([*words_of(recipe, **environment), *short], 2, folder / "logs")

    return run


@pytest.fixture(scope="module")
def first_stage(train) -> Path:
    folder, run = train(FIRST, "2 1")
    run.assert_succeeded()
    return folder


def test_every_recipe_is_run():
    assert {FIRST, REFUSED_HERE, *RUNS} == set(RECIPES)


@pytest.mark.parametrize("recipe", RUNS)
def test_a_recipe_trains_for_two_steps_and_saves(train, first_stage, recipe):
    division, trained = RUNS[recipe]
    second = {} if recipe.startswith("pretrain") else {"VERSION": "v1", "PROJECTOR": str(first_stage)}
    folder, run = train(recipe, division, **second)
    run.assert_succeeded()
    assert f"trained: {trained}\n" in run.output
    assert [line["iteration"] for line in metrics(folder)] == [1, 2]
    assert all(line["loss"] > 0 for line in metrics(folder))
    assert checkpoint_folder.newest_complete(folder) == (2, [])


def test_fp8_is_refused_without_transformer_engine(train, first_stage):
    _, run = train(REFUSED_HERE, "2 1", PROJECTOR=str(first_stage))
    assert 2 in run.status
    assert "error: --fp8-format hybrid" in run.errors
