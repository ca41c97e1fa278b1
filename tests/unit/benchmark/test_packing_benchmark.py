"""The benchmark of packing: its baselines by hand, and a small run through the command."""

import importlib.util
import json

import numpy as np
import pytest

from dc_megatron.benchmark.machine import ROOT
from dc_megatron.benchmark.packing import (
    as_text,
    benchmark_packing,
    first_fit_decreasing,
    padded_fill,
)
from dc_megatron.errors import UserError


def plain_first_fit(lengths, limit):
    room = []
    for length in sorted(lengths, reverse=True):
        for row, free in enumerate(room):
            if free >= length:
                room[row] -= length
                break
        else:
            room.append(limit - length)
    return len(room)


@pytest.mark.parametrize("seed", range(5))
def test_first_fit_decreasing_equals_the_plain_one(seed):
    lengths = np.random.RandomState(seed).randint(1, 101, 200 if seed else 1)
    assert first_fit_decreasing(lengths, 100) == plain_first_fit(lengths.tolist(), 100)


def test_rows_of_one_sample_each():
    assert first_fit_decreasing(np.full(9, 51), 100) == 9


def test_padded_fill_by_hand():
    # (1 + 3) of 2 x 3 and (2 + 2) of 2 x 2; the fifth has no batch.
    assert padded_fill(np.array([1, 3, 2, 2, 9]), 2) == 0.8


def test_a_run_through_the_command(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("benchmark_tool", f"{ROOT}/tools/benchmark.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    output = tmp_path / "packing.json"
    words = ["packing", "--samples", "1500", "--seq-lengths", "4096", "--output", str(output)]
    assert tool.main(words) == 0
    result = json.loads(output.read_text())
    assert result["command"] == f"python tools/benchmark.py {' '.join(words)}"
    (plan,) = result["plans"]
    assert (plan["samples"], plan["seq_length"]) == (1500, 4096)
    assert plan["fill"] > plan["baselines"]["first_fit_decreasing_whole_epoch"]["fill"]
    assert 0 < plan["peak_above_interpreter_gb"] < plan["peak_resident_gb"] < 1
    assert [entry["holds"] for entry in result["limits"]] == [True, True, True]
    assert capsys.readouterr().out == as_text(result) + "\n"


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="--samples 5"):
        benchmark_packing(samples=5)
    with pytest.raises(UserError, match="--seq-lengths 1024: samples have up to 2048"):
        benchmark_packing(samples=5000, seq_lengths=(1024,))
