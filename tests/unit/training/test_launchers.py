"""The recipes as files: valid bash and valid Python, the same flags through bash and through torchrun."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted(path.name for path in (ROOT / "examples").glob("*.sh") if "#PYTHON" in path.read_text())
OURS = ("GPUS_PER_NODE", "NNODES", "LOCAL_RANK", "RANK", "WORLD_SIZE", "MODEL", "DATA", "OUTPUT", "DC_DEVICE")
OURS += ("CUDA_VISIBLE_DEVICES", "PRESET", "DATASET", "TENSOR_PARALLEL", "PIPELINE_PARALLEL")


def run(command: list[str], cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in OURS}
    clean |= {"DC_PRINT_ARGV": "1", "GPUS_PER_NODE": "2", **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=clean, timeout=120)


def by_bash(recipe: str, *flags: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return run(["bash", str(ROOT / "examples" / recipe), *flags], cwd, **environment)


def flags_of(done: subprocess.CompletedProcess) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("# for Megatron's parser")[0].splitlines()
    return dict(line[2:].split(" ", 1) for line in lines if line.startswith("--"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_valid_python_and_valid_bash(recipe):
    path = ROOT / "examples" / recipe
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a backslash in the bash part would be a bad escape for Python
        ast.parse(path.read_text(encoding="utf-8"))
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0


@pytest.mark.parametrize("recipe", ["pretrain_dc.sh", "finetune_yi_34b.sh"])
def test_bash_and_torchrun_give_the_same_flags(recipe, tmp_path):
    extra = ["--max_steps", "3", "--output_dir", "a folder"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    divided = {"PIPELINE_PARALLEL": "1"}
    under_torchrun = run([*torchrun, str(ROOT / "examples" / recipe), *extra], tmp_path, **divided)
    assert under_torchrun.returncode == 0, under_torchrun.stderr
    assert under_torchrun.stdout == by_bash(recipe, *extra, **divided).stdout
    assert flags_of(under_torchrun)["output_dir"] == "'a folder'"


def test_pretrain_is_the_originals_first_stage():
    got = flags_of(by_bash("pretrain_dc.sh", GPUS_PER_NODE="8"))
    recipe = {"version": "plain", "image_aspect_ratio": "square", "learning_rate": "0.001", "trainable": "connector"}
    recipe |= {"per_device_train_batch_size": "32", "gradient_accumulation_steps": "1", "num_train_epochs": "1.0"}
    recipe |= {"warmup_ratio": "0.03", "lr_scheduler_type": "cosine", "weight_decay": "0.0", "bf16": "True"}
    recipe |= {"model_max_length": "2048", "mm_dense_connector_type": "dci", "mm_vision_select_layer": "-2"}
    assert recipe.items() <= got.items()
    assert "pretrain_mm_mlp_adapter" not in got


def test_finetune_is_the_originals_second_stage_and_starts_from_the_first():
    got = flags_of(by_bash("finetune_dc.sh", GPUS_PER_NODE="8"))
    recipe = {"version": "v1", "image_aspect_ratio": "pad", "learning_rate": "2e-05", "trainable": "connector,llm"}
    recipe |= {"per_device_train_batch_size": "16", "gradient_accumulation_steps": "1"}
    assert recipe.items() <= got.items()
    assert got["pretrain_mm_mlp_adapter"].startswith(flags_of(by_bash("pretrain_dc.sh"))["output_dir"] + "/")


@pytest.mark.parametrize(
    ("gpus", "nodes", "per_device", "accumulation"), [(1, 1, 32, 8), (2, 1, 32, 4), (8, 2, 16, 1), (4, 2, 32, 1)]
)
def test_the_global_batch_stays_256_on_any_number_of_processes(gpus, nodes, per_device, accumulation):
    got = flags_of(by_bash("pretrain_dc.sh", GPUS_PER_NODE=str(gpus), NNODES=str(nodes)))
    assert got["per_device_train_batch_size"] == str(per_device)
    assert got["gradient_accumulation_steps"] == str(accumulation)
    assert per_device * accumulation * gpus * nodes == 256


def test_paths_and_sizes_come_from_the_environment_and_later_flags_count():
    environment = {"MODEL": "m", "VISION_TOWER": "v", "DATA": "d.json", "IMAGE_FOLDER": "i", "OUTPUT": "o"}
    environment |= {"GLOBAL_BATCH_SIZE": "4", "TENSOR_PARALLEL": "1", "LEARNING_RATE": "0.5", "BF16": "False"}
    got = flags_of(by_bash("pretrain_dc.sh", "--learning-rate", "0.25", "--save", "other", **environment))
    expected = {"model_name_or_path": "m", "vision_tower": "v", "data_path": "d.json", "image_folder": "i"}
    expected |= {"output_dir": "other", "learning_rate": "0.25", "bf16": "False", "tensor_model_parallel_size": "1"}
    assert expected.items() <= got.items()


@pytest.mark.parametrize(
    ("environment", "flags", "words"),
    [
        ({}, ["--lerning_rate", "1"], "did you mean '--learning_rate'"),
        ({}, ["--version", "vicuna"], "--version vicuna"),
        ({"GLOBAL_BATCH_SIZE": "5"}, [], "GLOBAL_BATCH_SIZE=5: not divisible by 2"),
        ({"PER_DEVICE_TRAIN_BATCH_SIZE": "3"}, [], "not a multiple of PER_DEVICE_TRAIN_BATCH_SIZE=3"),
        ({"GPUS_PER_NODE": "none"}, [], "GPUS_PER_NODE"),
    ],
)
@pytest.mark.parametrize("printing", ["1", ""])
def test_what_is_wrong_is_said_once_before_anything_starts(environment, flags, words, printing):
    done = by_bash("pretrain_dc.sh", *flags, **({"DC_PRINT_ARGV": printing} | environment))
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_folder_is_said_once_before_anything_starts(tmp_path):
    done = by_bash("pretrain_dc.sh", DC_PRINT_ARGV="", MODEL=str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_bad_flag_under_torchrun_stops_it():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    done = run([*torchrun, str(ROOT / "examples" / "pretrain_dc.sh"), "--lerning_rate", "1"])
    assert done.returncode != 0
    assert done.stderr.count("did you mean '--learning_rate'") == 1


def test_help_of_a_recipe_starts_nothing():
    done = by_bash("pretrain_dc.sh", "--help", DC_PRINT_ARGV="")
    assert done.returncode == 0
    assert done.stdout.startswith("usage:")


def test_two_processes_share_a_model_where_there_is_no_gpu():
    got = flags_of(by_bash("pretrain_dc.sh", GPUS_PER_NODE="", DC_DEVICE="cpu"))
    assert got["tensor_model_parallel_size"] == "2"
    assert int(got["per_device_train_batch_size"]) * int(got["gradient_accumulation_steps"]) == 128


@pytest.fixture
def four_gpus(tmp_path) -> str:
    """PATH of a machine whose nvidia-smi lists four GPUs, one of them divided."""
    command = tmp_path / "nvidia-smi"
    gpus = "".join(f"GPU {i}: NVIDIA H200 (UUID: GPU-{i})\\n" for i in range(4))
    command.write_text(f"#!/bin/sh\nprintf '{gpus}  MIG 1g.18gb Device 0: (UUID: MIG-0)\\n'\n")
    command.chmod(0o755)
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, 4),
        ("2", 1),
        ("0, 3", 2),
        ("GPU-0,GPU-3,MIG-0", 3),
        ("0,-1,1", 1),
        ("7,0", 0),
        ("08", 0),
        ("-1", 0),
        ("", 0),
        ("NoDevFiles", 0),
    ],
)
def test_gpus_are_counted_as_cuda_shows_them(four_gpus, visible, gpus):
    environment = {"PATH": four_gpus} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    done = run(["bash", "-euo", "pipefail", "-c", "source examples/gpus.sh; count_gpus"], **environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{gpus}\n", "")


@pytest.mark.parametrize(("visible", "processes"), [(None, 4), ("1", 1), ("", 2)])
def test_a_recipe_starts_a_process_for_every_visible_gpu(four_gpus, visible, processes):
    environment = {"PATH": four_gpus} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    got = flags_of(by_bash("pretrain_dc.sh", GPUS_PER_NODE="", **environment))
    assert int(got["per_device_train_batch_size"]) * int(got["gradient_accumulation_steps"]) == 256 // processes


def test_the_quickstart_runs_on_the_cpu_where_too_few_gpus_are_visible(four_gpus, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in OURS}
    environment |= {"PATH": four_gpus, "CUDA_VISIBLE_DEVICES": "3", "QUICKSTART_RUN": str(tmp_path / "run")}
    started = subprocess.Popen(
        ["bash", "examples/quickstart.sh"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed = ""
        while "[1/" not in printed and (piece := started.stdout.read(1)):
            printed += piece
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    assert "2 processes need as many GPUs and here is 1: running on the CPU" in printed
