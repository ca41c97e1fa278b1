"""``--dry-run``: recipes at their full size, and the planner's numbers against the engine's over layouts and models."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from dc_megatron.errors import UserError
from dc_megatron.planner.request import Request, job_of, launch_of_request
from dc_megatron.planner.search import search
from dc_megatron.training.run import check
from tests.helpers.dry_runs import OURS, ROOT, recipe_flags, run_all
from tests.helpers.measured import run_measured

# Files in examples/ that are no recipes.
HELPERS = {"launch.sh", "gpus.sh", "defaults.sh", "quickstart.sh"}
RECIPES = sorted(path for path in (ROOT / "examples").glob("*.sh") if path.name not in HELPERS)

# Every recipe on 64 GPUs, and those for all models with each model on the fewest GPUs that its division takes.
NODES = {"NNODES": "8"}
MODELS = ("phi-2", "vicuna-7b", "vicuna-13b", "llama3-8b", "llama3-70b", "hermes-2-yi-34b")
FEWEST = {"finetune_dc.sh": {"llama3-70b": "4", "hermes-2-yi-34b": "2"}, "pretrain_dc.sh": {}, "finetune_lora.sh": {}}
FULL_SIZE = {path.name: (path, NODES) for path in RECIPES}
SMALLER = {
    f"{recipe} {model}": (ROOT / "examples" / recipe, {"PRESET": model, "NNODES": nodes.get(model, "1")})
    for recipe, nodes in FEWEST.items()
    for model in MODELS
}
# The recipes have the others.
FULL_SIZE |= {name: SMALLER[name] for name in (f"finetune_dc.sh {one}" for one in ("phi-2", "vicuna-13b", "llama3-8b"))}

_COMMON = "--data_path absent.json --image_folder absent --bf16 True --per_device_train_batch_size 4 "


def _flags(model: str, vision: str, more: str) -> list[str]:
    return shlex.split(f"--model_name_or_path absent/{model} --vision_tower {vision} {_COMMON} {more}")


CLIP, SIGLIP = "clip-vit-large-patch14-336", "siglip-so400m"
LAYOUTS = {
    "70b": (
        _flags(
            "Meta-Llama-3-70B-Instruct",
            SIGLIP,
            "--version llama_3 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 8 --sequence-parallel",
        ),
        64,
    ),
    "70b, split by the planner": (
        _flags(
            "llama3-70b",
            SIGLIP,
            "--version llama_3 --tensor-model-parallel-size 4 --pipeline-model-parallel-size 8 --pipeline-split auto",
        ),
        64,
    ),
    "34b, virtual stages": (
        _flags(
            "hermes-2-yi-34b",
            CLIP,
            "--version mpt --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
            " --gradient_checkpointing True --num-virtual-stages-per-pipeline-rank 3",
        ),
        # Three data-parallel ranks: pieces are no powers of two, and buckets are padded.
        12,
    ),
    "13b, connector alone": (
        _flags("vicuna-13b", CLIP, "--version plain --trainable connector --mm_dense_connector_type sti"),
        4,
    ),
    "7b, anyres, nothing shared": (
        _flags(
            "vicuna-7b-v1.5",
            CLIP,
            "--version v1 --image_aspect_ratio anyres --model_max_length 4096 --use-distributed-optimizer False",
        ),
        3,
    ),
    "qwen, anyres, unpacked": (
        _flags(
            "qwen2.5-7b",
            SIGLIP,
            "--version chatml_direct --image_aspect_ratio anyres --model_max_length 8192 --packing none"
            " --pipeline-model-parallel-size 2 --tensor-model-parallel-size 4 --mm_dense_connector_type sci",
        ),
        24,
    ),
    "phi": (
        _flags("phi-2", SIGLIP, "--version phi --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
        12,
    ),
    "a tower that learns": (
        _flags(
            "vicuna-7b",
            CLIP,
            "--version v1 --trainable connector,llm,vision_tower --tensor-model-parallel-size 2"
            " --pipeline-model-parallel-size 2 --pipeline-split auto --gradient_checkpointing True",
        ),
        12,
    ),
    "a tower and a connector that learn": (
        _flags("llama3.1-8b", SIGLIP, "--version llama_3 --trainable connector,vision_tower --recompute auto"),
        3,
    ),
    "70b, rows over ranks": (
        _flags(
            "llama3-70b",
            SIGLIP,
            "--version llama_3 --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --sequence-parallel"
            " --context-parallel-size 4 --model_max_length 8192 --seq-length 32768 --pipeline-split auto"
            " --recompute auto",
        ),
        64,
    ),
    "tied": (None, 6),
    "fp8": (
        _flags("llama3.1-8b", CLIP, "--version llama_3 --fp8-format hybrid --tensor-model-parallel-size 2"),
        8,
    ),
    "wrong length": (_flags("vicuna-7b", CLIP, "--version v1 --model_max_length 8192"), 8),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """One process does them all; importing the engine takes longer than any of them."""
    folder = tmp_path_factory.mktemp("dry")
    tied = folder / "tied-model"
    tied.mkdir()
    (tied / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 200, "intermediate_size": 320, "num_hidden_layers": 5,'
        ' "num_attention_heads": 5, "num_key_value_heads": 1, "vocab_size": 1003, "tie_word_embeddings": true,'
        ' "max_position_embeddings": 4096}'
    )
    more = "--version v1 --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 2"
    flags = shlex.split(f"--model_name_or_path {tied} --vision_tower {CLIP} {_COMMON} {more}")
    cases = {name: (given or flags, processes) for name, (given, processes) in LAYOUTS.items()}
    cases |= {name: recipe_flags(path, **variables) for name, (path, variables) in FULL_SIZE.items()}
    cases["planned"] = _planned()
    return run_all(cases, folder)


@pytest.mark.parametrize("recipe", FULL_SIZE)
def test_every_recipe_at_its_full_size(results, recipe):
    done = results[recipe]
    assert "error" not in done, done["error"]
    # Below 2 on idle cores; other work on them costs processor time as well.
    assert done["seconds"] < 6
    assert done["tensors"][0] > 200
    assert "have their places" in done["text"]


@pytest.mark.parametrize("recipe", FULL_SIZE)
def test_every_recipe_fits_its_gpus_by_the_planners_estimate(results, recipe):
    """80 GB each, a V100 32. What is exact of it (weights, gradients, optimizer) the dry run has compared already."""
    assert results[recipe]["gigabytes"] < (30 if "v100" in recipe else 76)


def _planned() -> tuple[list[str], int]:
    """The command that the planner gives for 70B on 64 GPUs."""
    request = Request(model="llama3-70b", vision=SIGLIP, gpus=64)
    job = job_of(request)
    launch = launch_of_request(request, job, search(job)[0].plan)
    return recipe_flags(ROOT / launch.recipe, *launch.flags, **dict(launch.environment))


def test_the_planned_command_is_what_was_planned(results):
    done = results["planned"]
    assert "error" not in done, done["error"]
    plan = search(job_of(Request(model="llama3-70b", vision=SIGLIP, gpus=64)))[0].plan
    assert [tuple(chunks) for chunks in done["run"]["stages"]] == list(plan.run.stages)
    assert (done["run"]["tensor"], done["run"]["data"]) == (plan.choice.tensor, plan.data)
    assert done["run"]["numbers"] == asdict(plan.run.numbers)
    assert done["run"]["micro_batches"] == plan.micro_batches


# What is built is compared with the planner in the dry run itself: an AssertionError would be the result here.
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "wrong length"])
def test_the_planner_counts_what_the_engine_builds(results, name):
    done = results[name]
    assert "error" not in done, done["error"]
    assert done["ranks"][0]["parameters"] > 0
    assert {one["stage"] for one in done["ranks"]} >= {0, len(done["run"]["stages"]) - 1}


def test_the_first_and_the_last_rank_of_each_kind_of_stage_are_built(results):
    assert [one["rank"] for one in results["70b"]["ranks"]] == [0, 7, 8, 15, 56, 63]
    virtual = results["34b, virtual stages"]
    assert [tuple(one["layers"]) for one in virtual["ranks"]] == [(10, 10, 10)] * 4
    # The last data-parallel rank owns another piece than the first.
    assert virtual["ranks"][0]["rank"] == 0
    assert virtual["ranks"][1]["data_rank"] == 2


def test_what_learns(results):
    width = 5120
    connector = 1024 * width + width + width**2 + width
    (first, _) = results["13b, connector alone"]["ranks"]
    assert first["trainable"] == first["buffers"] == first["updates"] == connector
    anyres = results["7b, anyres, nothing shared"]["ranks"]
    # Nothing is shared: every rank updates everything, image_newline too.
    assert {one["updates"] for one in anyres} == {anyres[0]["trainable"]}


def test_a_tied_head_has_a_bucket_and_pieces_are_padded(results):
    first, *_ = results["tied"]["ranks"]
    assert first["buffers"] > first["trainable"]
    assert first["buffers"] % 3 == 0


def test_what_only_a_gpu_has_is_left_out_and_said(results):
    notes = [note for note in results["fp8"]["notes"] if "--fp8-format" in note]
    assert notes
    assert "without a GPU" in notes[0]


def test_a_length_beyond_the_models_is_refused(results):
    assert results["wrong length"]["error"].startswith("UserError: --model_max_length 8192: preset vicuna-7b")


def test_a_name_that_is_neither_folder_nor_preset_is_refused():
    flags = _flags("vicuna-70b", CLIP, "--version v1 --dry-run")
    with pytest.raises(UserError, match=r"absent/vicuna-70b: no such folder, and no preset.*vicuna-7b"):
        check(flags, 8)


def test_sizes_that_do_not_fit_are_said_without_torch():
    flags = _flags("vicuna-7b", CLIP, "--version v1 --tensor-model-parallel-size 3 --dry-run")
    with pytest.raises(UserError, match=r"--tensor-model-parallel-size 3: does not divide 32 attention heads.*preset"):
        check(flags, 6)


@pytest.mark.parametrize(
    ("flags", "starts"),
    [("--dry-run", 1), ("--dry_run True", 1), ("--dry-run=true", 1), ("--dry-run --dry-run False", 0), ("", 0)],
)
def test_the_launcher_knows_a_dry_run(flags, starts):
    script = 'root=. ; eval "$(sed -n "/^asks_for_dry_run/,/^}/p" examples/launch.sh)"; asks_for_dry_run "$@"'
    done = subprocess.run(["bash", "-c", script, "x", *shlex.split(flags)], cwd=ROOT)
    assert (done.returncode == 0) == bool(starts)


@pytest.mark.long
def test_every_stage_of_every_model(tmp_path):
    names = [name for name in SMALLER if name not in FULL_SIZE]
    done = run_all({name: recipe_flags(SMALLER[name][0], **SMALLER[name][1]) for name in names}, tmp_path)
    for name in names:
        assert "error" not in done[name], f"{name}: {done[name]['error']}"
        assert done[name]["gigabytes"] < 76, name


@pytest.mark.long
@pytest.mark.parametrize("recipe", [path.name for path in RECIPES])
def test_a_recipe_alone_takes_25_seconds_and_two_gigabytes(recipe, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in OURS} | {"GPUS_PER_NODE": "8", **NODES}
    start = time.monotonic()
    done = run_measured(["bash", str(Path("examples") / recipe), "--dry-run"], tmp_path, ROOT, environment)
    assert done.status == 0, done.output
    # On a machine with other work the clock runs on; processor time does not.
    assert min(done.seconds, time.monotonic() - start) < 25
    assert done.resident < 2e9
