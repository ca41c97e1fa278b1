"""The benchmark of packed training: its material, its arithmetic, and a whole run with a stand-in for training."""

from __future__ import annotations

import json
import os

import pytest

from dc_megatron.benchmark import packed_material, packed_training
from dc_megatron.benchmark.child_process import Measurement
from dc_megatron.benchmark.packed_training import PACKED, PADDED, Workload, benchmark_packed_training
from dc_megatron.data.conversation import render
from dc_megatron.data.picture import Picture
from dc_megatron.data.tokenization import load_tokenizer, tokenise
from dc_megatron.errors import UserError

SCALE, SAMPLES = 16, 60


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("material"))
    packed_material.make_material(folder, SAMPLES, SCALE)
    return folder


def test_samples_have_exactly_the_lengths_that_were_drawn(material):
    tokenizer = load_tokenizer(os.path.join(material, packed_material.LANGUAGE_MODEL), packed_material.VERSION)
    lengths, tiles = packed_material.lengths_of(SAMPLES, SCALE, seed=0)
    with open(os.path.join(material, packed_material.DATA), encoding="utf-8") as file:
        records = json.load(file)
    assert len(records) == SAMPLES
    assert 0 < (tiles == 0).sum() < SAMPLES / 2, "both kinds occur"
    for record, length, tile in zip(records, lengths, tiles, strict=True):
        assert ("image" in record) == bool(tile)
        picture = [Picture("p", 1, 1, 576 // SCALE)] * int(tile)
        rendered = render(packed_material.VERSION, record["conversations"])
        sample = tokenise(tokenizer, rendered, picture, model_max_length=packed_material.longest(SCALE))
        assert (sample.length, sample.truncated) == (length, False)
        assert sample.supervised_tokens > 0
        assert not tile or os.path.isfile(os.path.join(material, packed_material.IMAGES, record["image"]))


def test_a_scale_must_leave_a_picture_a_whole_grid(tmp_path):
    with pytest.raises(UserError, match="--scale 3: a picture's 576 positions"):
        packed_material.make_material(str(tmp_path), SAMPLES, 3)


def test_both_kinds_have_the_same_flags_but_for_packing():
    packed, padded = (
        set(packed_training.training_command(Workload(), kind, "F", "OUT", seed=1)) for kind in (PACKED, PADDED)
    )
    assert packed - padded == {"--packing=best-fit", "--seq-length=5120"}
    assert padded - packed == {"--packing=none"}
    two = packed_training.training_command(Workload(tensor_parallel=2), PACKED, "F", "OUT", seed=1)
    assert "torch.distributed.run" in two
    assert "--sequence-parallel=True" in two


def line(samples: int, positions: int, tokens: int, seconds: float) -> dict:
    counts = {"samples": samples, "positions": positions, "tokens": tokens, "step_seconds": seconds}
    return counts | {"data_wait_seconds": 0.0, "loss": 8.0}


def run(samples: int, positions: int, tokens: int, seconds: float) -> dict:
    return packed_training.run_sums([line(1, 1, 1, 99.0), line(samples, positions, tokens, seconds)])


def test_the_first_step_does_not_count():
    sums = packed_training.run_sums([line(1, 1, 1, 99.0), line(8, 20, 10, 2.0), line(8, 30, 11, 3.0)])
    assert sums == {
        "steps": 2,
        "samples": 16,
        "positions": 50,
        "tokens": 21,
        "step_seconds": 5.0,
        "data_wait_seconds": 0.0,
    }


def test_the_ratio_is_that_of_the_middle_round_and_comes_from_two_parts():
    runs = {
        PACKED: [run(30, 1000, 990, 1.0), run(30, 1000, 990, 2.0), run(30, 1000, 990, 1.0)],
        PADDED: [run(32, 1600, 1000, 2.0), run(32, 1600, 1000, 8.0), run(32, 1600, 1000, 2.5)],
    }
    got = packed_training.compared(runs)
    assert got["of_each_round"] == pytest.approx([30 / 16, 15 / 4, 30 / 12.8])
    assert got["samples_per_second"] == pytest.approx(30 / 12.8)
    assert got["holds"]
    parts = got["fewer_positions_per_sample"] * got["more_positions_per_second"]
    assert parts == pytest.approx(got["samples_per_second"])
    slow = packed_training.compared({PACKED: [run(30, 1000, 990, 1.0)], PADDED: [run(32, 1600, 1000, 1.9)]})
    assert not slow["holds"]


def stand_in(command, env) -> Measurement:
    """Writes what a run of this packing would; a padded one is three times as slow."""
    flags = dict(word[2:].split("=", 1) for word in command if word.startswith("--") and "=" in word)
    assert (env["DC_DEVICE"], "RANK" in env) == ("cpu", False)
    assert os.path.isfile(flags["data_path"])
    padded = flags["packing"] == PADDED
    os.makedirs(flags["output_dir"])
    with open(os.path.join(flags["output_dir"], "metrics.jsonl"), "w", encoding="utf-8") as file:
        for _ in range(int(flags["max_steps"])):
            file.write(json.dumps(line(32, 3200 if padded else 2000, 1990, 3.0 if padded else 1.0)) + "\n")
    return Measurement(9.0, 9.0, 0, 2 * 10**9, 0, "")


def test_a_whole_run(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_training, "measure", stand_in)
    monkeypatch.setenv("RANK", "1")
    told = []
    work = Workload(steps=2, samples=SAMPLES, scale=SCALE)
    result = benchmark_packed_training(str(tmp_path), work, rounds=2, report=told.append)
    assert [words.split(":")[0] for words in told] == [
        "round 1 of 2, none", "round 1 of 2, best-fit", "round 2 of 2, best-fit", "round 2 of 2, none",
    ]  # fmt: skip
    assert result["packed_over_padded"]["samples_per_second"] == pytest.approx(3)
    assert result["packing"][PACKED]["samples_per_second"] == 32
    assert result["packing"][PACKED]["samples_a_step"] == 32
    assert result["packing"][PADDED]["fill"] == pytest.approx(1990 / 3200)
    assert str(tmp_path) not in json.dumps(result), "a path of this machine"
    assert os.listdir(tmp_path) == [], "what was made is removed"
    text = packed_training.as_text(result)
    assert "holds: samples a second, packed / padded: 3.00 (at least 1.8; rounds 3.00 3.00)" in text


def test_sizes_below_one_are_refused(tmp_path):
    with pytest.raises(UserError, match="above 0"):
        benchmark_packed_training(str(tmp_path), Workload(steps=0))
