"""Flags of FP8: what is refused and what is said then, and what Megatron gets."""

from __future__ import annotations

import pytest

from dc_megatron.errors import UserError
from dc_megatron.training.argv import translate
from dc_megatron.training.fp8_flags import (
    fp8_words,
    length_multiple,
    refuse_impossible_fp8,
    refuse_unsupported_fp8,
)

VALUES = {
    "fp8_format": "hybrid",
    "fp8_recipe": "delayed",
    "fp8_check_interval": 100,
    "bf16": True,
    "seq_length": 4096,
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
}


def settings(*words: str):
    return translate([*words, "--max_steps", "3"]).settings


def test_a_run_in_fp8_is_not_refused():
    refuse_impossible_fp8(VALUES, {"fp8_format", "bf16"})
    # Unpacked rows have no length of their own: it is rounded up (see length_multiple).
    refuse_impossible_fp8(VALUES | {"seq_length": None}, {"fp8_format"})


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_a_recipe_without_a_format_does_nothing_and_says_so(recipe):
    values = VALUES | {"fp8_format": None, "fp8_recipe": recipe}
    with pytest.raises(UserError, match=rf"--fp8-recipe {recipe}: .*add --fp8-format hybrid, or leave it out"):
        refuse_impossible_fp8(values, {"fp8_recipe"})
    # Nobody asked: the default is no contradiction.
    refuse_impossible_fp8(values, set())


def test_an_interval_without_a_format_does_nothing_and_says_so():
    with pytest.raises(UserError, match=r"--fp8-check-interval 5: .*add --fp8-format hybrid"):
        refuse_impossible_fp8(VALUES | {"fp8_format": None, "fp8_check_interval": 5}, {"fp8_check_interval"})


def test_fp8_stands_beside_bf16():
    with pytest.raises(UserError, match=r"--fp8-format hybrid: .*add --bf16 True"):
        refuse_impossible_fp8(VALUES | {"bf16": False}, {"fp8_format"})


@pytest.mark.parametrize(
    ("length", "tensor", "sequence_parallel", "multiple", "advised"),
    [(4088, 1, False, 16, 4096), (4112, 2, True, 32, 4128), (8, 1, False, 16, 16), (4090, 4, False, 16, 4096)],
)
def test_rows_of_a_length_that_fp8_does_not_multiply(length, tensor, sequence_parallel, multiple, advised):
    values = VALUES | {
        "seq_length": length,
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": sequence_parallel,
    }
    message = rf"--seq-length {length}: --fp8-format hybrid needs a multiple of {multiple}; use {advised}$"
    with pytest.raises(UserError, match=message):
        refuse_impossible_fp8(values, {"fp8_format"})
    refuse_impossible_fp8(values | {"seq_length": advised}, {"fp8_format"})


def test_without_sequence_parallelism_every_rank_has_the_whole_row():
    refuse_impossible_fp8(VALUES | {"seq_length": 4112, "tensor_model_parallel_size": 2}, {"fp8_format"})


@pytest.mark.parametrize(
    ("fp8", "tensor", "expected"), [(None, 1, 1), (None, 4, 4), ("hybrid", 1, 16), ("e4m3", 2, 32)]
)
def test_what_the_length_of_unpacked_rows_is_rounded_up_to(fp8, tensor, expected):
    assert length_multiple(fp8, tensor) == expected


def test_megatron_gets_nothing_without_a_format():
    assert fp8_words(settings(), []) == []


def test_delayed_scaling_looks_back_as_far_as_transformer_engine_does():
    words = fp8_words(settings("--bf16", "True", "--fp8-format", "hybrid"), [])
    assert words == [
        *("--fp8-format", "hybrid", "--fp8-recipe", "delayed"),
        *("--fp8-amax-history-len", "1024", "--fp8-amax-compute-algo", "max"),
    ]


def test_what_the_user_typed_for_megatron_stands():
    chosen = settings("--bf16", "True", "--fp8-format", "e4m3")
    words = fp8_words(chosen, ["--fp8-amax-history-len"])
    assert words == ["--fp8-format", "e4m3", "--fp8-recipe", "delayed", "--fp8-amax-compute-algo", "max"]


def test_other_recipes_have_no_history():
    chosen = settings("--bf16", "True", "--fp8-format", "hybrid", "--fp8-recipe", "blockwise")
    assert fp8_words(chosen, []) == ["--fp8-format", "hybrid", "--fp8-recipe", "blockwise"]


def test_each_flag_reaches_megatron_once():
    line = ["--bf16", "True", "--fp8-format", "hybrid", "--fp8-amax-history-len", "16", "--max_steps", "3"]
    words = translate(line).megatron_argv
    for name in ("--fp8-format", "--fp8-recipe", "--fp8-amax-history-len", "--fp8-amax-compute-algo"):
        assert words.count(name) == 1, f"{name} in {words}"
    assert words[words.index("--fp8-amax-history-len") + 1] == "16"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--fp8-format", "hybrid"], "add --bf16 True"),
        (["--fp8-recipe", "tensorwise"], "--fp8-recipe tensorwise: .*add --fp8-format hybrid"),
        (["--fp8-format", "hybird", "--bf16", "True"], "hybrid"),
        (["--fp8-format", "hybrid", "--bf16", "True", "--fp8-check-interval", "-1"], "--fp8-check-interval -1"),
        (["--fp8-param-gather"], "fp8-param-gather.*not available yet"),
    ],
)
def test_the_command_line_is_refused(line, message):
    with pytest.raises(UserError, match=message):
        translate([*line, "--max_steps", "3"])


def fp8(recipe: str = "delayed"):
    return settings("--bf16", "True", "--fp8-format", "hybrid", "--fp8-recipe", recipe)


@pytest.mark.parametrize(
    ("recipe", "capability"),
    [("delayed", (8, 9)), ("tensorwise", (8, 9)), ("blockwise", (9, 0)), ("mxfp8", (10, 0)), ("mxfp8", None)],
)
def test_a_gpu_that_can(recipe, capability):
    refuse_unsupported_fp8(fp8(recipe), None, capability)


@pytest.mark.parametrize(
    ("recipe", "capability", "need", "advice"),
    [
        ("delayed", (8, 0), "8.9, this one has 8.0", "leave it out to train in bf16"),
        ("blockwise", (8, 9), "9.0, this one has 8.9", "use --fp8-recipe delayed"),
        ("mxfp8", (9, 0), "10.0, this one has 9.0", "use --fp8-recipe delayed"),
        ("mxfp8", (8, 0), "10.0, this one has 8.0", "leave it out to train in bf16"),
    ],
)
def test_a_gpu_that_cannot(recipe, capability, need, advice):
    with pytest.raises(UserError, match=rf"--fp8-recipe {recipe}: needs a GPU of compute capability {need}; {advice}$"):
        refuse_unsupported_fp8(fp8(recipe), None, capability)


def test_without_transformer_engine_there_is_no_fp8():
    with pytest.raises(UserError, match="needs Transformer Engine, which is not installed; leave it out"):
        refuse_unsupported_fp8(fp8(), "not installed", None)
    refuse_unsupported_fp8(settings(), "not installed", (7, 0))
