"""Which kernels are named for which machine, and why."""

from __future__ import annotations

import pytest

from dc_megatron.runtime.kernels import Machine, as_line, chosen_kernels

ABSENT = "not installed"
H200 = Machine(True, (9, 0), None, ABSENT, ABSENT)


def test_with_transformer_engine_everything_is_its():
    bf16 = chosen_kernels(H200)
    assert all("Transformer Engine" in choice.choice for choice in bf16.values())
    assert bf16["products"].why == "--fp8-format hybrid is faster"
    divided = chosen_kernels(H200, context_parallel=True)
    assert "variable lengths" in divided["attention"].choice
    assert "--context-parallel-size" in divided["attention"].why
    assert {part: c for part, c in divided.items() if part != "attention"} == {
        part: c for part, c in bf16.items() if part != "attention"
    }
    fp8 = chosen_kernels(H200, fp8="delayed")
    assert fp8["products"].choice == "Transformer Engine, FP8, delayed"
    assert not any(choice.why for choice in fp8.values())


def test_an_a100_has_no_fp8():
    assert "8.9, this GPU has 8.0" in chosen_kernels(Machine(True, (8, 0), None, ABSENT, ABSENT))["products"].why


@pytest.mark.parametrize(
    ("capability", "flash", "dtype", "expected"),
    [
        ((8, 0), None, "bfloat16", "flash-attn, variable lengths"),
        ((8, 0), ABSENT, "bfloat16", "torch's flash attention, variable lengths"),
        ((7, 0), None, "float16", "torch SDPA, each sample of a row alone"),
        ((8, 0), None, "float32", "torch SDPA, each sample of a row alone"),
    ],
)
def test_attention_without_transformer_engine(capability, flash, dtype, expected):
    kernels = chosen_kernels(Machine(True, capability, ABSENT, ABSENT, flash), dtype)
    assert kernels["attention"].choice == expected
    assert kernels["attention"].why


def test_one_line_says_each_reason_once():
    line = as_line(chosen_kernels(Machine(False, None, ABSENT, ABSENT, ABSENT), "float32"))
    assert line.startswith("kernels: attention: torch SDPA")
    assert line.count("there is no GPU") == 1
