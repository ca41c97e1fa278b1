"""The result of a benchmark of steps in words, and settings from the command line."""

from __future__ import annotations

import copy

import pytest

from dc_megatron.benchmark.step_text import as_text, read_settings
from dc_megatron.errors import UserError


def variant(**changes) -> dict:
    values = {
        "what": "w",
        "samples_per_second": 12.5,
        "tokens_per_second": 9000.0,
        "supervised_tokens_per_second": 3000.0,
        "flops_per_second": 2.5e12,
        "share_of_matmul": 0.5,
        "seconds_per_step": 1.25,
        "peak_memory_gb": 3.5,
        "fill": 0.99,
        "first_loss": 10.5,
        "share_of_time": {"tower": 0.05, "language_model_and_rest": 0.85, "head": 0.1},
    }
    return values | changes


RESULT = {
    "workload": {"name": "cpu-small", "rows": 3, "seq_length": 4096, "dtype": "float32"},
    "matmul_flops_per_second": 5e12,
    "gpu": None,
    "machine": {"processor": "A processor"},
    "variants": {
        "ours": variant(),
        "hf": {"what": "w", "error": "hf, build: MemoryError: no more\nTraceback\n  much more"},
        "ours-tp2": variant(samples_per_second=20.0),
    },
    "compared": {
        "ours-tp2": {
            "samples_per_second": 0.625,
            "of_each_step": [0.5, 0.75],
            "tokens_per_second": 0.6,
            "first_loss_difference": 1.5e-6,
            "samples_per_second_over_hf": 1.75,
        },
        "text-only": {"samples_per_second": 0.9, "of_each_step": [0.9], "first_loss_difference": None},
        "without_tower_over_text_only_per_token": 1.01,
        "stage1_over_stage2": {"predicted_by_flops": 0.7, "measured": 0.77, "excess": 0.1},
    },
}


def test_a_result_in_words():
    lines = as_text(RESULT).splitlines()
    assert lines[0].startswith("cpu-small on A processor: 3 rows of 4096 a step, float32; ")
    assert lines[0].endswith("a large matrix product reaches 5 TFLOP/s")
    ours = next(line for line in lines if line.startswith("ours "))
    assert ours.split() == ["ours", "12.500", "9000", "3000", "2.5", "50.0%", "1.250", "3.50", "99.0%", "10.50000"]
    # The columns stand under their names.
    assert lines[2].index("samples/s") + len("samples/s") == ours.index("12.500") + len("12.500")
    assert lines[2].index("fill") + len("fill") == ours.index("99.0%") + len("99.0%")
    text = "\n".join(lines)
    assert "ours                    language_model_and_rest 85.0 %, head 10.0 %, tower 5.0 %" in text
    assert "0.62 times the samples a second (steps: 0.50 0.75); first losses differ by 1.5e-06" in text
    assert "ours-tp2                itself 1.75 times hf's samples a second" in text
    assert "0.90 times the samples a second (steps: 0.90)\n" in text
    assert "without tower over text only per token: 1.010" in text
    assert "takes 0.770 of one of stage 2; operations predict 0.700 (+10.0 %)" in text


def test_a_variant_that_failed_is_one_line():
    text = as_text(RESULT)
    assert "hf                      failed: hf, build: MemoryError: no more\n" in text
    assert "much more" not in text


def test_nothing_but_failures():
    result = copy.deepcopy(RESULT) | {"compared": {}}
    result["variants"] = {"ours": {"what": "w", "error": "no step was measured"}}
    assert "ours                    failed: no step was measured" in as_text(result)


def test_a_run_that_was_interrupted_before_the_ceiling_was_measured():
    result = RESULT | {"matmul_flops_per_second": None, "compared": {}}
    result["variants"] = {"ours": {"what": "w", "error": "no step was measured"}}
    assert "a large matrix product was not measured" in as_text(result)


def test_a_gpu_is_named():
    result = RESULT | {"gpu": {"name": "A GPU", "driver": "1", "memory": "2"}}
    assert as_text(result).startswith("cpu-small on A GPU: ")


def test_settings_are_json_or_text():
    words = [
        "steps=5",
        "language.hidden_size=64",
        "coexist=false",
        "dtype=bfloat16",
        'trainable=["connector"]',
        "a=b=c",
    ]
    assert read_settings(words) == {
        "steps": 5,
        "language.hidden_size": 64,
        "coexist": False,
        "dtype": "bfloat16",
        "trainable": ["connector"],
        "a": "b=c",
    }
    assert read_settings([]) == {}


def test_a_setting_without_a_value():
    with pytest.raises(UserError, match="--set steps: write KEY=VALUE"):
        read_settings(["rows=1", "steps"])
