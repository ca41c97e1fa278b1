"""Batch sizes, steps, warm-up, row length and the shape flags."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from dc_megatron.config import LanguageConfig
from dc_megatron.errors import UserError
from dc_megatron.training.arguments import backend_argv, engine_argv, finish, megatron_shape_argv, plan_steps
from dc_megatron.training.argv import translate
from tests.helpers.language_shapes import LLAMA


def plan(line: str, rows: int | None = 1000, world: int = 1, mean_length: float | None = None):
    packing = "" if "--packing" in line else "--packing none "
    return plan_steps(translate(shlex.split(packing + line)).settings, rows, world, mean_length)


def shape(line: str = "", language: LanguageConfig = LLAMA, seq_length: int = 64) -> list[str]:
    translation = translate(shlex.split(line))
    return megatron_shape_argv(language, translation.settings, seq_length, translation.megatron_argv)


def options(words: list[str]) -> dict[str, str | None]:
    return {
        word: (words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else None)
        for i, word in enumerate(words)
        if word.startswith("--")
    }


@pytest.mark.parametrize("layout", ["", "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 4"])
def test_the_global_batch_is_in_samples_per_device_whatever_the_layout(layout):
    got = plan(f"--per_device_train_batch_size 4 --gradient_accumulation_steps 3 {layout}", world=8)
    assert (got.global_batch_size, got.micro_batch_size) == (96, 4)
    assert got.accumulation_steps * got.data_parallel_size * got.micro_batch_size == 96


def test_megatrons_batch_names():
    got = plan("--global-batch-size 64 --micro-batch-size 4 --tensor-model-parallel-size 2", world=8)
    assert (got.global_batch_size, got.micro_batch_size, got.accumulation_steps) == (64, 4, 4)
    # A smaller micro batch changes how the same samples are divided, not how many there are.
    assert plan("--per_device_train_batch_size 16 --micro-batch-size 4").global_batch_size == 16
    assert plan("--per_device_train_batch_size 8 --global-batch-size 16", world=2).global_batch_size == 16


@pytest.mark.parametrize(
    ("line", "world", "words"),
    [
        ("--global-batch-size 64 --per_device_train_batch_size 4", 2, ["64", "contradicts", "4 x", "x 2", "= 8"]),
        ("--global-batch-size 10 --micro-batch-size 4", 1, ["10", "micro batch 4 x 1", "1, 2, 5, 10"]),
        ("--global-batch-size 3 --micro-batch-size 1", 2, ["3", "1 x 2", "raise the global batch"]),
        ("--per_device_train_batch_size 6 --micro-batch-size 4", 1, ["= 6", "4 x 1", "1, 2, 3, 6"]),
        ("--tensor-model-parallel-size 2", 3, ["3 processes", "2 x", "multiple of 2"]),
        ("--pipeline-model-parallel-size 4", 2, ["2 processes", "x --pipeline-model-parallel-size 4 = 4"]),
        (
            "--seq-length 255 --model_max_length 255 --tensor-model-parallel-size 2 --sequence-parallel",
            2,
            ["255", "256"],
        ),
        ("--packing best-fit --context-parallel-size 2", 3, ["x --context-parallel-size 2 = 2", "multiple of 2"]),
        (
            "--packing best-fit --context-parallel-size 2 --seq-length 4098",
            2,
            ["--seq-length 4098: --context-parallel-size 2 needs a multiple of 4; use 4100"],
        ),
        (
            "--packing best-fit --context-parallel-size 2 --tensor-model-parallel-size 4 --sequence-parallel"
            " --bf16 True --fp8-format hybrid --seq-length 4160",
            8,
            ["--context-parallel-size 2 beside --sequence-parallel needs a multiple of 128; use 4224"],
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_numbers(line, world, words):
    with pytest.raises(UserError) as refused:
        plan(line, world=world)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("line", "rows", "steps"),
    [
        ("--per_device_train_batch_size 10", 1000, 100),
        ("--per_device_train_batch_size 10", 1001, 101),
        ("--per_device_train_batch_size 10 --max_steps 7 --num_train_epochs 3", 1000, 7),
        ("--per_device_train_batch_size 10 --max_steps -1 --num_train_epochs 3", 3000, 300),
        ("--train-iters 9", None, 9),
    ],
)
def test_steps(line, rows, steps):
    assert plan(line, rows).train_iters == steps


def test_packed_batches_hold_as_many_samples_on_average():
    line = "--packing best-fit --per_device_train_batch_size 16"
    got = plan(line, world=8, mean_length=780)
    # 128 samples of 780 positions fill 24.4 rows of 4096.
    assert (got.seq_length, got.global_batch_size, got.micro_batch_size, got.accumulation_steps) == (4096, 24, 1, 3)
    assert any("128 samples of 780" in note for note in got.notes)
    # A multiple of the data-parallel ranks, and never less than one row each.
    assert plan(line, world=8, mean_length=10).global_batch_size == 8
    layout = "--tensor-model-parallel-size 2"
    assert plan(f"{line} {layout}", world=8, mean_length=780).global_batch_size == 24
    assert plan(f"{line} --seq-length 8192 {layout}", world=8, mean_length=780).global_batch_size == 12


def test_packed_rows_given_in_rows():
    got = plan("--packing best-fit --global-batch-size 24 --per_device_train_batch_size 4", world=4, mean_length=100)
    assert (got.global_batch_size, got.accumulation_steps) == (24, 6)
    assert any("counts, not the 16 samples" in note for note in got.notes)
    with pytest.raises(UserError, match=r"--global-batch-size 6 \(rows\): not divisible by 4 .* use 8"):
        plan("--packing best-fit --global-batch-size 6", world=4)


def test_ranks_that_share_rows_read_the_same_ones():
    got = plan("--packing best-fit --context-parallel-size 2 --global-batch-size 8", world=8)
    assert (got.data_parallel_size, got.accumulation_steps) == (4, 2)
    layout = "--tensor-model-parallel-size 2 --sequence-parallel"
    got = plan(f"--packing best-fit --context-parallel-size 3 {layout} --model_max_length 5000", world=6)
    assert got.seq_length == 5004, "two pieces for each of three, and two parts of each rank's positions"
    assert any("5004: 5000, rounded up" in note for note in got.notes)


def test_length_of_packed_rows():
    assert plan("--packing best-fit").seq_length == 4096
    assert plan("--packing best-fit --model_max_length 5000").seq_length == 5000
    assert plan("--packing best-fit --seq-length 512 --model_max_length 256").seq_length == 512


def test_no_samples_is_refused():
    with pytest.raises(UserError, match=r"--data_path d.json: there are no samples"):
        plan("--data_path d.json", rows=0)


@pytest.mark.parametrize(
    ("line", "warmup"),
    [
        ("--max_steps 1000 --warmup_ratio 0.03", 30),
        ("--max_steps 1001 --warmup_ratio 0.03", 31),
        ("--max_steps 1000 --lr-warmup-fraction 0.03", 30),
        ("--max_steps 1000 --warmup_ratio 0.03 --warmup_steps 5", 5),
        ("--max_steps 1000 --warmup_ratio 0.03 --lr_scheduler_type constant", 0),
        ("--max_steps 1000 --warmup_ratio 0.03 --lr_scheduler_type constant_with_warmup", 30),
        ("--max_steps 1000", 0),
    ],
)
def test_warmup(line, warmup):
    assert plan(line).warmup_iters == warmup


def test_a_run_that_is_all_warmup_keeps_the_schedulers_rule():
    got = plan("--max_steps 1 --warmup_ratio 0.03")
    assert got.warmup_iters < got.decay_iters


def test_row_length():
    assert plan("--model_max_length 100").seq_length == 100
    assert plan("--model_max_length 100 --seq-length 128").seq_length == 128
    got = plan("--model_max_length 101 --tensor-model-parallel-size 2 --sequence-parallel", world=2)
    assert got.seq_length == 102
    assert any("102" in note for note in got.notes)
    assert plan("--model_max_length 101 --tensor-model-parallel-size 2", world=2).seq_length == 101


def test_finish_hands_over_the_plan():
    line = "--max_steps 10 --lr_scheduler_type constant_with_warmup --output_dir o --save_strategy no --load l"
    settings = translate(shlex.split(line)).settings
    got = options(finish(settings, plan_steps(settings, None, 1)))
    assert got["--train-iters"] == got["--lr-decay-iters"] == got["--save-interval"] == "10"
    assert (got["--lr-decay-style"], got["--save"]) == ("constant", "o")
    assert "--exit-on-missing-checkpoint" in got
    settings = translate(["--max_steps", "1"]).settings
    assert "--save" not in options(finish(settings, plan_steps(settings, None, 1)))


def test_what_was_typed_comes_last():
    translation = translate(["--max_steps", "1", "--lr-decay-iters", "77"])
    steps = plan_steps(translation.settings, None, 1)
    words = engine_argv(translation, LLAMA, steps, backend_argv(False, False, False))
    assert words[len(words) - 1 - words[::-1].index("--lr-decay-iters") + 1] == "77"


def test_shape_comes_from_the_config():
    got = options(shape())
    assert (got["--num-layers"], got["--kv-channels"], got["--num-query-groups"]) == ("4", "16", "2")
    assert (got["--rotary-base"], got["--rope-scaling-factor"]) == ("500000", "8.0")
    assert "--untie-embeddings-and-output-weights" in got
    assert "--add-qkv-bias" not in got
    assert "--add-qkv-bias" in options(shape("", replace(LLAMA, qkv_bias=True)))
    plain = replace(LLAMA, num_key_value_heads=8, tie_word_embeddings=True, rope_scaling_factor=None)
    assert not {"--num-query-groups", "--untie-embeddings-and-output-weights", "--use-rope-scaling"} & set(
        options(shape("", plain))
    )


PHI = replace(
    LLAMA, model_type="phi", parallel_layers=True, rotary_percent=0.4, rope_scaling_factor=None, num_key_value_heads=8
)


def test_the_shape_of_phi():
    got = options(shape("", PHI))
    assert (got["--normalization"], got["--rotary-percent"]) == ("LayerNorm", "0.4")
    assert not {"--swiglu", "--disable-bias-linear", "--add-qkv-bias", "--qk-layernorm"} & set(got)
    assert {"--swiglu", "--disable-bias-linear"} <= set(options(shape()))
    assert options(shape())["--rotary-percent"] == "1.0"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--swiglu", ["--swiglu", "config.json of tiny"]),
        ("--disable-bias-linear", ["--disable-bias-linear", "config.json of tiny"]),
        ("--normalization RMSNorm", ["--normalization RMSNorm", "LayerNorm"]),
        ("--recompute-modules mlp layernorm", ["--recompute-modules layernorm", "reads its norm twice"]),
    ],
)
def test_what_contradicts_phi(line, words):
    with pytest.raises(UserError) as refused:
        shape(line, PHI)
    for word in words:
        assert word in str(refused.value)
    shape("--recompute-modules mlp core_attn", PHI)


def test_norms_of_heads_are_asked_for():
    qwen3 = replace(LLAMA, qk_norm=True)
    assert "--qk-layernorm" in options(shape("", qwen3))
    shape("--qk-layernorm", qwen3)


def test_positions_reach_the_end_of_a_row():
    assert options(shape(seq_length=4096))["--max-position-embeddings"] == "4096"
    assert options(shape(seq_length=64))["--max-position-embeddings"] == "128"


@pytest.mark.parametrize("line", ["--num-layers 4", "--norm-epsilon 0.000001", "--swiglu", "--num-query-groups 2"])
def test_shape_flags_that_agree_are_accepted(line):
    shape(line)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--num-layers 5", ["--num-layers 5", "config.json of tiny", "4"]),
        ("--hidden_size 65", ["--hidden-size 65", "64"]),
        ("--normalization LayerNorm", ["--normalization LayerNorm", "RMSNorm"]),
        ("--qk-layernorm", ["--qk-layernorm", "config.json of tiny"]),
        ("--add-qkv-bias", ["--add-qkv-bias", "config.json of tiny"]),
        ("--tensor-model-parallel-size 4", ["4", "2 key-value heads", "1, 2"]),
        ("--pipeline-model-parallel-size 3", ["3", "4 layers", "1, 2, 4"]),
    ],
)
def test_shapes_that_contradict_the_config_are_refused(line, words):
    with pytest.raises(UserError) as refused:
        shape(line)
    for word in words:
        assert word in str(refused.value)


def test_an_uneven_split_is_the_users_business():
    shape("--pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 2")


def test_a_rotary_base_that_the_engine_cannot_take_is_refused():
    with pytest.raises(UserError, match=r"rope_theta 10000\.5"):
        shape("", replace(LLAMA, rope_theta=10000.5))


def test_backend():
    cpu = options(backend_argv(cuda=False, transformer_engine=False, apex=False))
    assert (cpu["--distributed-backend"], cpu["--transformer-impl"]) == ("gloo", "local")
    assert {"--no-gradient-accumulation-fusion", "--no-bias-swiglu-fusion", "--no-rope-fusion"} <= set(cpu)
    assert options(backend_argv(cuda=False, transformer_engine=True, apex=True)) == cpu
    full = options(backend_argv(cuda=True, transformer_engine=True, apex=True))
    assert full == {"--distributed-backend": "nccl", "--transformer-impl": "transformer_engine"}
