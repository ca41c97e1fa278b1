"""What --use-megatron-fsdp does not go with is said before the engine asserts it, and what goes with it is added."""

from __future__ import annotations

import pytest

from dc_megatron.errors import UserError
from dc_megatron.training.arguments import sharding_argv
from dc_megatron.training.argv import translate
from dc_megatron.training.fsdp_flags import fsdp_words, parsed_words

SWITCH = "--use-megatron-fsdp"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pipeline-model-parallel-size", "2"], "--pipeline-model-parallel-size 2: .*leave it out"),
        (["--lora_enable", "True"], "--lora_enable True: .*--use-distributed-optimizer alone"),
        (["--fp16", "True"], "--fp16 True: .*use --bf16 True"),
        (["--bf16", "True", "--fp8-format", "hybrid"], "--fp8-format hybrid: .*train in bf16"),
        (["--recompute", "auto"], "--recompute auto: .*say --recompute none, selective or full"),
        (["--dry-run"], "--dry-run True: .*leave --use-megatron-fsdp out"),
        (["--use-distributed-optimizer", "False"], "--use-distributed-optimizer False contradicts"),
        (["--data-parallel-sharding-strategy", "optim"], "optim: .*--use-distributed-optimizer alone"),
        (["--num-distributed-optimizer-instances", "2"], "instances 2: .*all data-parallel ranks"),
        (["--init-model-with-meta-device"], "--init-model-with-meta-device: .*leave it out"),
        (["--use-precision-aware-optimizer"], "--use-precision-aware-optimizer: .*leave it out"),
        (["--ckpt-format", "fsdp_dtensor"], "--ckpt-format fsdp_dtensor: checkpoints are torch_dist trees"),
    ],
)
def test_contradictions(flags, message):
    with pytest.raises(UserError, match=message):
        translate([*flags, SWITCH])


def test_the_other_one_names_it():
    with pytest.raises(UserError, match=f"--use-torch-fsdp2: use {SWITCH}"):
        translate(["--use-torch-fsdp2"])


def test_a_recipe_needs_nothing_but_the_switch():
    """finetune_dc.sh ends with --use-distributed-optimizer, what the user appends comes behind."""
    words = translate(["--use-distributed-optimizer", "--ckpt-format", "torch_dist", SWITCH]).megatron_argv
    assert SWITCH in words
    assert parsed_words(words) == ["--ckpt-format", "fsdp_dtensor"]
    assert fsdp_words(words, cuda=True)[:2] == ["--data-parallel-sharding-strategy", "optim_grads_params"]
    assert "--no-gradient-reduce-div-fusion" in fsdp_words(words, cuda=False)


def test_gradients_are_added_up_in_fp32_unless_they_travel_in_bf16():
    assert "fp32" in fsdp_words([SWITCH], cuda=True)
    assert "fp32" not in fsdp_words([SWITCH, "--grad-reduce-in-bf16"], cuda=True)


def test_nothing_is_added_without_it():
    words = translate(["--use-megatron-fsdp", "--use-megatron-fsdp", "False"]).megatron_argv
    assert fsdp_words(words, cuda=True) == parsed_words(words) == []


def test_stage_1_is_divided_as_well():
    words = sharding_argv(translate(["--trainable", "connector", SWITCH]), 2, cuda=True)
    assert words == ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
