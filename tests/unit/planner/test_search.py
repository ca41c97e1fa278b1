"""The planner's choices: what it refuses and why, what it prefers, and the command that it gives."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dc_megatron.config import language_shape, vision_shape
from dc_megatron.errors import UserError
from dc_megatron.planner.assumed_data import CAPTIONS, INSTRUCTIONS, assumed_micro_batch
from dc_megatron.planner.job import PRECISIONS, Choice
from dc_megatron.planner.recompute import SPARE
from dc_megatron.planner.request import Request, job_of, launch_of_request
from dc_megatron.planner.search import Plan, evaluate, search, tensor_obstacle
from dc_megatron.training.run import check
from tests.helpers.dry_runs import OURS, recipe_flags

ROOT = Path(__file__).resolve().parents[3]
BIG = Request(model="llama3-70b", vision="siglip-so400m", gpus=64)


def request(**more) -> Request:
    return Request(**{"model": "vicuna-7b", "vision": "clip-vit-large-patch14-336", "gpus": 8} | more)


@pytest.fixture(scope="module")
def big():
    return search(job_of(BIG))


def test_70b_on_64_gpus_takes_seconds_and_fits(big):
    start = time.process_time()
    plans = [one.plan for one in search(job_of(BIG)) if one.plan]
    assert time.process_time() - start < 10
    for plan in plans:
        assert plan.choice.tensor * plan.choice.pipeline * plan.data == 64
        assert max(memory.total for memory in plan.memories) <= (1 - SPARE) * 80e9
        assert sum(map(sum, plan.run.stages)) == 80
    speeds = [plan.tokens_per_second for plan in plans]
    assert speeds == sorted(speeds, reverse=True)


def test_every_size_that_is_rejected_has_a_reason(big):
    rejected = {(one.tensor, one.pipeline): one.reason for one in big if one.plan is None}
    assert "does not divide 8 key-value heads" in rejected[16, 1]
    assert rejected[2, 1].startswith("needs ")
    assert "GB are usable" in rejected[2, 1]
    assert "rows of 4096, and 64 data-parallel ranks take multiples of 64" in rejected[1, 1]


def test_tensor_sizes():
    yi = language_shape("hermes-2-yi-34b")
    assert tensor_obstacle(yi, 8, 8) == ""
    assert tensor_obstacle(yi, 8, 4) == "crosses machines of 4 GPUs"
    assert tensor_obstacle(yi, 16, 16) == "does not divide 56 attention heads and 8 key-value heads"


def test_virtual_stages_need_whole_rounds_of_micro_batches():
    job = job_of(BIG)
    found = evaluate(job, Choice(8, 4, 2, 1, 8192, "bf16", True))
    assert isinstance(found, tuple)
    assert "multiples of the 4 stages" in found[0]


def test_less_memory_means_more_recomputation_or_more_ranks():
    def fastest(memory: float) -> Plan:
        return search(job_of(request(gpu_memory=memory)))[0].plan

    roomy, tight = fastest(141), fastest(30)
    assert roomy.recompute.recompute.granularity == "none"
    assert tight.choice.tensor * tight.choice.pipeline > roomy.choice.tensor * roomy.choice.pipeline
    assert roomy.tokens_per_second >= tight.tokens_per_second
    assert search(job_of(request(gpus=1, samples_per_step=128, gpu_memory=40)))[0].plan is None


def test_the_measured_run_is_where_it_was_measured():
    # benchmarks/results/7b_stage2_h200.json: 2.365 s for four rows of 8192, of which 97.4 % were filled.
    measured = request(gpus=1, gpu="h200", seq_length=8192, samples_per_step=42, precision=("bf16-lean",))
    (verdict,) = search(job_of(measured))
    assert verdict.plan.rows == 4
    assert verdict.plan.time.seconds == pytest.approx(2.365, rel=0.05)


def test_a_v100_gets_fp16_and_nothing_else():
    assert job_of(request(gpu="v100")).precisions == ("fp16",)
    with pytest.raises(UserError, match="--precision bf16: a v100 has no bf16; use fp16"):
        job_of(request(gpu="v100", precision=("bf16",)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": "lama3-70b"}, r"--model lama3-70b: no such folder, and no preset.*did you mean 'llama3-70b'"),
        ({"gpus": 12}, "--gpus 12: no multiple of the 8 GPUs"),
        ({"gpus": 24}, "--samples-per-step 128: .* multiple of --gpus 24, such as 144"),
        ({"seq_length": 1024}, "--seq-length 1024: below --model-max-length 2048"),
        ({"model_max_length": 500}, "a picture takes up to 576"),
        ({"gpus": 0}, "--gpus 0: must be above 0"),
    ],
)
def test_requests_that_cannot_be(more, message):
    with pytest.raises(UserError, match=message):
        job_of(request(**more))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stage": "pretrain", "connector": "sti"},
        {"gpus": 16, "model": "vicuna-13b", "packing": "none"},
        {"gpu": "v100", "gpus": 32},
        {"precision": ("fp8-lean",), "gpus": 32, "model": "hermes-2-yi-34b"},
    ],
)
def test_the_command_says_the_plan(more):
    asked = request(**more)
    job = job_of(asked)
    plan = search(job)[0].plan
    launch = launch_of_request(asked, job, plan)
    words, processes = recipe_flags(ROOT / launch.recipe, *launch.flags, **dict(launch.environment))
    settings = check([*words, "--dry-run"], processes).settings
    assert processes == job.gpus
    assert settings.tensor_model_parallel_size == plan.choice.tensor
    assert settings.pipeline_model_parallel_size == plan.choice.pipeline
    assert settings.sequence_parallel == (plan.choice.tensor > 1) or plan.choice.tensor == 1
    assert settings.trainable == job.model.trainable
    assert settings.fp16 == (plan.choice.precision == "fp16")
    assert (settings.fp8_format is not None) == PRECISIONS[plan.choice.precision].numbers.fp8
    assert settings.seq_length == plan.choice.row_length or not job.packed


def test_assumed_rows():
    full = assumed_micro_batch(INSTRUCTIONS, 576, 1, 1, 8192, packed=True)
    # benchmarks/results/7b_stage2_h200.json had 10 pictures in a row of 8192 at most, stage 1 had 13.
    assert 9 <= full.images <= 10 <= full.most_images <= 12
    assert 13 <= assumed_micro_batch(CAPTIONS, 576, 1, 1, 8192, packed=True).images < 14
    alone = assumed_micro_batch(INSTRUCTIONS, 576, 1, 4, 2048, packed=False)
    assert (alone.most_positions, alone.most_images) == (8192, 4)
    assert vision_shape("siglip-so400m").num_patches == 729


def plan(*words: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in OURS} | environment
    command = [sys.executable, "tools/plan.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=clean, timeout=120)


def test_the_tool():
    words = shlex.split("--model llama3-8b --vision siglip-so400m --gpus 8 --gpu-memory 80")
    done = plan(*words)
    assert done.returncode == 0, done.stderr
    for part in ("start it with:", "TENSOR_PARALLEL=", "worst moment", "next best:", "unmeasured", "VERSION=llama_3"):
        assert part in done.stdout
    found = json.loads(plan(*words, "--json").stdout)
    assert found["command"].startswith("GPUS_PER_NODE=8")
    assert found["plans"][0]["memory"][0]["total"] < 80e9
    assert plan("--model", "llama3-8b").returncode == 2
    nothing = plan(*shlex.split("--model llama3-70b --vision siglip-so400m --gpus 1 --samples-per-step 64"))
    assert (nothing.returncode, "Nothing fits" in nothing.stdout) == (1, True)


def test_the_tool_plans_a_recipe():
    done = plan("--check", "examples/finetune_dc.sh", "--json", GPUS_PER_NODE="8", TENSOR_PARALLEL="4")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["plans"]
    assert (found["tensor"], found["data"], found["recompute"]["granularity"]) == (4, 2, "full")
    small = plan("--check", "examples/finetune_dc.sh", "--gpu-memory", "16", GPUS_PER_NODE="8")
    assert (small.returncode, "does not fit" in small.stdout) == (1, True)
    bad = plan("--check", "examples/finetune_dc.sh", GPUS_PER_NODE="8", TENSOR_PARALLEL="3")
    assert bad.returncode == 2
    assert "divided over 3 x 1 (tensor x pipeline) processes, which do not divide 8" in bad.stderr
