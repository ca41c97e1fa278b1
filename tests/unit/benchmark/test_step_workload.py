"""Workloads of training steps: the files that are there, what overrides replace, and what is refused."""

from __future__ import annotations

import json

import pytest

from dc_megatron.benchmark import step_workload
from dc_megatron.benchmark.step_batches import StepBatches
from dc_megatron.benchmark.step_variants import VARIANTS
from dc_megatron.benchmark.step_workload import read_workload, workload_names
from dc_megatron.errors import UserError


@pytest.mark.parametrize("name", workload_names())
def test_every_file_is_a_workload_that_can_run(name):
    workload = read_workload(name)
    assert workload.name == name
    assert workload.source
    assert set(workload.trainable) <= {"connector", "llm"}
    assert set(workload.baselines) <= set(VARIANTS)
    assert "hf" in workload.baselines
    batches = StepBatches(workload)
    assert len(batches.packed(0)) == workload.rows
    # What is read of the configurations by others.
    assert workload.language_config.hidden_size == workload.language["hidden_size"]
    assert workload.vision_config.num_patches == 576
    assert workload.connector_config.dense_connector_type == workload.connector


def test_the_two_workloads_of_7b_differ_by_their_stage():
    one, two = read_workload("7b-stage1"), read_workload("7b-stage2")
    assert (one.language, one.vision, one.seq_length) == (two.language, two.vision, two.seq_length)
    assert (one.trainable, two.trainable) == (("connector",), ("connector", "llm"))
    assert (one.stage, two.stage) == (1, 2)


def test_overrides_replace_values_and_values_inside():
    changed = read_workload("cpu-small", {"rows": 1, "language.hidden_size": 64, "trainable": ["connector"]})
    whole = read_workload("cpu-small")
    assert (changed.rows, changed.trainable) == (1, ("connector",))
    assert changed.language == whole.language | {"hidden_size": 64}
    assert changed.vision == whole.vision
    assert whole.language["hidden_size"] == 512


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"seqlength": 4096}, "unknown key 'seqlength'.*seq_length"),
        ({"rows": 0}, "rows is 0; it must be a whole number above 0"),
        ({"steps": 1.5}, "steps is 1.5; it must be a whole number above 0"),
        ({"threads": "two"}, "threads is 'two'; it must be a whole number above 0"),
        ({"padded_batch": -1}, "padded_batch is -1"),
        ({"dtype": "bfloat"}, "dtype 'bfloat'.*bfloat16"),
        ({"optimizer": "sgd"}, "optimizer 'sgd'; use fp32 or bf16"),
        ({"langauge.hidden_size": 64}, "unknown key 'langauge'.*language"),
    ],
)
def test_bad_values_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        read_workload("cpu-small", overrides)


def test_an_unknown_workload_is_told_the_nearest():
    with pytest.raises(UserError, match=r"workload cpu-smal: there is none.*cpu-small"):
        read_workload("cpu-smal")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("rows"), "missing.*'rows'"),
        (lambda values: values.update(row=3), "unknown key 'row'"),
    ],
    ids=["a key is missing", "a key too many"],
)
def test_a_file_with_other_keys(tmp_path, monkeypatch, change, message):
    with open(f"{step_workload.FOLDER}/cpu-small.json", encoding="utf-8") as file:
        values = json.load(file)
    change(values)
    (tmp_path / "own.json").write_text(json.dumps(values))
    monkeypatch.setattr(step_workload, "FOLDER", str(tmp_path))
    assert workload_names() == ["own"]
    with pytest.raises(UserError, match=rf"own\.json: .*{message}"):
        read_workload("own")


def test_a_file_that_is_no_json(tmp_path, monkeypatch):
    (tmp_path / "own.json").write_text("{")
    monkeypatch.setattr(step_workload, "FOLDER", str(tmp_path))
    with pytest.raises(UserError, match=r"own\.json: no JSON"):
        read_workload("own")
