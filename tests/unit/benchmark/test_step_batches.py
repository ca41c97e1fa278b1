"""What ours and the baselines train on: the same samples, packed and padded."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from dc_megatron.benchmark.step_batches import Counts, StepBatches, counts_of, picture_pool
from dc_megatron.benchmark.step_workload import read_workload
from dc_megatron.errors import UserError

# Pictures of 4 positions; texts up to 2048 ids as in stage 2, some of them without a picture.
SMALL = read_workload(
    "cpu-small", {"vision.image_size": 28, "rows": 3, "seq_length": 2048, "padded_batch": 8, "language.vocab_size": 500}
)
IMAGE = 4
STEPS = range(3)


@pytest.fixture(scope="module")
def batches() -> StepBatches:
    return StepBatches(SMALL)


def samples_of(micro_batches: list[dict]) -> Counter:
    """The samples as (ids, labels, picture positions, pixels of the pictures), whatever their order."""
    found = []
    for batch in micro_batches:
        flat = {name: batch[name].flatten() for name in ("input_ids", "labels", "image_mask")}
        pixels = iter(batch["pixel_values"])
        bounds = batch["cu_seqlens"].tolist()
        for start, end in itertools.pairwise(bounds):
            ids, labels, mask = (flat[name][start:end] for name in ("input_ids", "labels", "image_mask"))
            if not ids.any():
                continue  # padding
            pictures = tuple(float(next(pixels).sum()) for _ in range(int(mask.sum()) // IMAGE))
            found.append((tuple(ids.tolist()), tuple(labels.tolist()), tuple(mask.tolist()), pictures))
        assert next(pixels, None) is None, "more pictures than positions for them"
    return Counter(found)


@pytest.mark.parametrize("step", STEPS)
def test_packed_and_padded_hold_the_very_same_samples(batches, step):
    packed, padded = batches.packed(step), batches.padded(step)
    assert samples_of(packed) == samples_of(padded)
    a, b = counts_of(packed), counts_of(padded)
    assert replace(a, positions=0) == replace(b, positions=0)
    assert a.samples == sum(samples_of(packed).values()) > a.images > 0, "some have no picture"
    assert a.positions == 3 * 2048
    assert b.positions > a.positions, "padding is what the packed rows save"


def test_steps_have_samples_of_their_own(batches):
    seen = [samples_of(batches.packed(step)) for step in STEPS]
    assert not seen[0] & seen[1]
    assert not seen[1] & seen[2]


def test_shapes(batches):
    packed, padded = batches.packed(1), batches.padded(1)
    assert [batch["input_ids"].shape for batch in packed] == [(1, 2048)] * 3
    assert all(batch["input_ids"].shape[0] == 8 for batch in padded[:-1])
    assert 1 <= padded[-1]["input_ids"].shape[0] <= 8
    for batch in padded:
        # No longer than its longest sample.
        last = batch["input_ids"].ne(0).any(dim=0).nonzero().max()
        assert batch["input_ids"].shape[1] - 1 == last
    assert all(batch["input_ids"].shape[1] % 64 == 0 for batch in batches.padded(1, multiple=64))


def test_padded_samples_do_not_come_in_the_order_of_the_plan(batches):
    """The plan puts what fits together into a row; a run without packing would not."""
    planned, shuffled = batches.lengths(0), []
    for batch in batches.padded(0):
        shuffled += (batch["input_ids"].ne(0) | batch["image_mask"]).sum(dim=1).tolist()
    assert sorted(shuffled) == sorted(planned)
    assert shuffled != planned


@pytest.mark.parametrize("step", STEPS)
def test_lengths_are_those_of_the_samples(batches, step):
    """Pictures of 4 positions, not of the 576 that the lengths were drawn for."""
    lengths, packed = batches.lengths(step), batches.packed(step)
    assert sum(lengths) == counts_of(packed).tokens
    assert sorted(lengths) == sorted(len(ids) for ids, *_ in samples_of(packed).elements())


def test_rows_are_full(batches):
    counts = [counts_of(batches.packed(step)) for step in STEPS]
    assert sum(c.tokens for c in counts) / sum(c.positions for c in counts) > 0.95


def test_half_of_a_text_is_supervised(batches):
    counts = counts_of(batches.packed(0))
    text = counts.tokens - IMAGE * counts.images
    assert counts.supervised_tokens == pytest.approx(SMALL.supervised_share * text, rel=0.02)
    few = StepBatches(replace(SMALL, supervised_share=0.1))
    assert counts_of(few.packed(0)).supervised_tokens == pytest.approx(0.1 * text, rel=0.1)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_of_the_pixels_make_the_whole(batches, size):
    whole = batches.packed(0)
    shares = [batches.packed(0, (rank, size)) for rank in range(size)]
    for number, batch in enumerate(whole):
        pixels = torch.cat([share[number]["pixel_values"] for share in shares])
        assert torch.equal(pixels, batch["pixel_values"])
        assert pixels.shape == (batch["num_images"], 3, 28, 28)
        for share in shares:
            assert torch.equal(share[number]["input_ids"], batch["input_ids"])
            assert share[number]["num_images"] == batch["num_images"]


def test_pictures_differ():
    pool = picture_pool(28)
    assert pool.dtype == torch.float32
    assert len({float(picture.sum()) for picture in pool}) == len(pool)


def test_text_alone_has_the_same_lengths_and_targets_and_no_pictures(batches):
    text = StepBatches(SMALL, text_only=True)
    for step in STEPS:
        ours, words = batches.packed(step), text.packed(step)
        a, b = counts_of(ours), counts_of(words)
        assert b == replace(a, images=0)
        assert text.lengths(step) == batches.lengths(step)
        for mine, other in zip(ours, words, strict=True):
            assert other["num_images"] == 0
            assert other["pixel_values"].shape == (0, 3, 28, 28)
            assert not other["image_mask"].any()
            assert torch.equal(other["labels"], mine["labels"])
            assert torch.equal(other["cu_seqlens"], mine["cu_seqlens"])
            outside = ~mine["image_mask"]
            assert torch.equal(other["input_ids"][outside], mine["input_ids"][outside])
            assert (other["input_ids"][mine["image_mask"]] >= 3).all(), "words stand where pictures stood"


def test_every_process_makes_the_same(batches):
    again = StepBatches(SMALL)
    # Asked in another order, too.
    later = again.packed(2)
    for mine, other in zip([*batches.packed(0), *batches.packed(2)], [*again.packed(0), *later], strict=True):
        for name, value in mine.items():
            same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
            assert same, name
    for mine, other in zip(batches.padded(1), again.padded(1), strict=True):
        assert torch.equal(mine["input_ids"], other["input_ids"])
    changed = StepBatches(replace(SMALL, seed=2))
    assert changed.lengths(0) != batches.lengths(0)


def test_counts_are_summed():
    one = {"samples": 1, "tokens": 2, "supervised_tokens": 3, "images": 4, "positions": 5, "tiles": 6}
    assert counts_of([{"counts": one}, {"counts": one}]) == Counts(2, 4, 6, 8, 10)


def test_rows_that_are_too_short_for_a_sample_are_refused():
    with pytest.raises(UserError, match="seq_length 1024 is shorter than a sample"):
        StepBatches(replace(SMALL, seq_length=1024))


def test_pictures_of_more_positions_than_the_lengths_have_are_refused():
    with pytest.raises(UserError, match="pictures of 720 positions; up to 576"):
        StepBatches(read_workload("cpu-small", {"connector": "sti"}))
