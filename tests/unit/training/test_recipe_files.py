"""Recipes by model, data and number of GPUs, and the Slurm file: what flags come of the environment."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.unit.training.test_launchers import RECIPES, ROOT, by_bash, flags_of

# Model -> template of stage 2, and how it is divided where everything learns on 64 GPUs.
PRESETS = {
    "phi-2": ("phi", "1", "1"),
    "vicuna-7b": ("v1", "2", "1"),
    "vicuna-13b": ("v1", "4", "1"),
    "llama3-8b": ("llama_3", "2", "1"),
    "llama3-70b": ("llama_3", "8", "4"),
    "hermes-2-yi-34b": ("chatml_direct", "8", "2"),
}
NODES = {"GPUS_PER_NODE": "8", "NNODES": "8"}


def test_there_are_few_files():
    files = [path for path in (ROOT / "examples").iterdir() if path.is_file()]
    assert len(files) <= 15
    assert {"finetune_llama3_70b.sh", "finetune_yi_34b.sh"} <= set(RECIPES)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_folder_template_and_division(preset):
    template, tensor, pipeline = PRESETS[preset]
    second = flags_of(by_bash("finetune_dc.sh", PRESET=preset, **NODES))
    assert second["version"] == template
    assert (second["tensor_model_parallel_size"], second["pipeline_model_parallel_size"]) == (tensor, pipeline)
    first = flags_of(by_bash("pretrain_dc.sh", PRESET=preset, **NODES))
    assert first["model_name_or_path"] == second["model_name_or_path"]
    assert first["version"] == "plain"
    assert first["pipeline_model_parallel_size"] == "1", "a frozen model fits without stages"
    assert second["pretrain_mm_mlp_adapter"].startswith(first["output_dir"] + "/")
    assert first["output_dir"] == f"runs/{preset}-dci-pretrain"


@pytest.mark.parametrize(
    ("recipe", "preset"), [("finetune_llama3_70b.sh", "llama3-70b"), ("finetune_yi_34b.sh", "hermes-2-yi-34b")]
)
def test_large_models_are_trained_in_full(recipe, preset):
    got = flags_of(by_bash(recipe, **NODES))
    assert got["trainable"] == "connector,llm"
    assert got["learning_rate"] == "2e-05"
    assert got["output_dir"] == f"runs/{preset}-dci-finetune"
    assert int(got["per_device_train_batch_size"]) * int(got["gradient_accumulation_steps"]) * 64 == 128


def test_fp8_and_fp16():
    fp8 = flags_of(by_bash("finetune_fp8.sh", "--fp8-recipe", "tensorwise"))
    assert (fp8["fp8_format"], fp8["fp8_recipe"], fp8["bf16"]) == ("hybrid", "tensorwise", "True")
    v100 = flags_of(by_bash("pretrain_v100.sh"))
    assert (v100["fp16"], v100["bf16"], v100["trainable"]) == ("True", "False", "connector")


def test_other_data_and_runs_of_its_own():
    first = flags_of(by_bash("pretrain_dc.sh", DATASET="mini-gemini"))
    second = flags_of(by_bash("finetune_dc.sh", DATASET="mini-gemini"))
    assert first["data_path"] == "data/MiniGemini-Pretrain/minigemini_pretrain.json"
    assert second["data_path"] == "data/MiniGemini-Finetune/minigemini_instruction.json"
    assert second["pretrain_mm_mlp_adapter"].startswith("runs/vicuna-7b-dci-mgm-pretrain/")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"PRESET": "llama3-7b"}, "PRESET=llama3-7b: unknown; one of phi-2"),
        ({"DATASET": "llava"}, "DATASET=llava: unknown; one of llava-1.5, mini-gemini"),
        ({"PRESET": "llama3-70b", "GPUS_PER_NODE": "8"}, "do not divide 8; start a multiple of 32"),
        ({"TENSOR_PARALLEL": "two"}, "TENSOR_PARALLEL=two PIPELINE_PARALLEL=1: must be numbers above 0"),
        ({"TENSOR_PARALLEL": "4"}, "do not divide 2; start a multiple of 4"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(environment, words):
    done = by_bash("finetune_dc.sh", **environment)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("gpus", "tensor"), [("1", "1"), ("2", "2"), ("4", "4"), ("8", "4")])
def test_a_smaller_machine_has_as_much_tensor_parallelism_as_it_has_gpus(gpus, tensor):
    got = flags_of(by_bash("finetune_dc.sh", PRESET="vicuna-13b", GPUS_PER_NODE=gpus))
    assert got["tensor_model_parallel_size"] == tensor


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """Environment of a Slurm job of two nodes: srun starts both here, the other commands say what they were told."""
    commands = {
        "srun": 'shift; for node in 0 1; do SLURM_NODEID=$node "$@" & done; wait',
        "scontrol": '[ "$1" = show ] && echo 127.0.0.1 || echo "scontrol $*"',
        "scancel": f'echo "scancel $*"; touch {tmp_path}/cancelled',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_GPUS_ON_NODE": "8",
    }
    clean = {k: v for k, v in os.environ.items() if k not in ("GPUS_PER_NODE", "NNODES", "MASTER_PORT", "PRESET")}
    return clean | job | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


def test_slurm_starts_the_recipe_once_a_node(cluster):
    command = ["bash", "examples/slurm.sbatch", "examples/finetune_yi_34b.sh", "--max_steps", "3"]
    done = subprocess.run(command, cwd=ROOT, env=cluster | {"DC_PRINT_ARGV": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n--max_steps 3\n") == 2
    assert done.stdout.count("--per_device_train_batch_size 8\n") == 2, "128 samples over 16 GPUs"
    missing = subprocess.run(
        ["bash", "examples/slurm.sbatch", "no.sh"], cwd=ROOT, env=cluster, capture_output=True, text=True
    )
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "no.sh: no such file" in missing.stderr


def test_slurm_queues_a_job_again_that_saved_in_time(cluster, tmp_path):
    recipe = tmp_path / "recipe.sh"
    recipe.write_text(f"echo started; while [ ! -e {tmp_path}/cancelled ]; do sleep 0.05; done; echo saved\n")
    command = ["bash", "examples/slurm.sbatch", str(recipe)]
    job = subprocess.Popen(command, cwd=ROOT, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = job.stdout.readline()
    job.send_signal(signal.SIGUSR1)
    printed += job.communicate(timeout=30)[0]
    assert job.returncode == 0, printed
    assert printed.count("saved\n") == 2
    assert "scancel --signal=USR1 77" in printed
    assert printed.rstrip().endswith("scontrol requeue 77")
