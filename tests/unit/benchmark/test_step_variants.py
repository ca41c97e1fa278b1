"""The sides of a benchmark of steps, by name."""

from __future__ import annotations

import pytest

from dc_megatron.benchmark.step_variants import VARIANTS, variants_of
from dc_megatron.errors import UserError


def test_ours_comes_first_and_nothing_twice():
    assert [v.name for v in variants_of(["hf", "ours", "text-only", "hf"])] == ["ours", "hf", "text-only"]
    assert [v.name for v in variants_of([])] == ["ours"]


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(UserError, match=r"--baseline megatron-plane: unknown.*megatron-plain.*one of: ours, "):
        variants_of(["hf", "megatron-plane"])


def test_what_the_names_promise():
    assert all(name == variant.name and variant.what for name, variant in VARIANTS.items())
    assert {n for n, v in VARIANTS.items() if not v.packed} == {"megatron-plain", "hf", "hf-no-recompute"}
    assert {n for n, v in VARIANTS.items() if v.program == "hf"} == {"hf", "hf-no-recompute"}
    assert {n for n, v in VARIANTS.items() if v.fp8_recipe} == {n for n in VARIANTS if "fp8" in n}
    assert {n for n, v in VARIANTS.items() if v.text_only} == {n for n in VARIANTS if n.startswith("text-only")}
    assert {n for n, v in VARIANTS.items() if v.recompute} == {"megatron-plain", "hf"}
    assert VARIANTS["ours-tp2"].tensor_parallel == 2
    assert VARIANTS["ours-stage1"].trainable == ("connector",)
    assert VARIANTS["ours"].trainable is None, "the workload says what learns"
