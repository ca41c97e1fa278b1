"""Pieces of a packed row: every position once, each with the keys of its own sample, and the way there and back."""

from __future__ import annotations

import itertools

import pytest
import torch

from dc_megatron.model.attention import KERNELS
from dc_megatron.model.gathered_row import in_rank_order, in_row_order
from dc_megatron.model.row_pieces import Bounds, piece_ranges, row_pieces, take_pieces

LENGTH = 24
ROWS = {
    "one sample": [0, 24],
    "samples that pieces cut": [0, 5, 13, 24],
    "samples that end with pieces": [0, 6, 12, 18, 24],
    "short and empty ones": [0, 1, 2, 2, 11, 12, 12, 23, 24],
}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_position_is_in_one_piece(size):
    ranges = [piece for rank in range(size) for piece in piece_ranges(LENGTH, rank, size)]
    held = [position for piece in ranges for position in range(*piece)]
    assert sorted(held) == list(range(LENGTH))
    assert {end - start for start, end in ranges} == {LENGTH // (2 * size)}
    # Of one long sample every rank sees as many keys.
    pairs = {sum(sum(range(*piece)) for piece in piece_ranges(LENGTH, rank, size)) for rank in range(size)}
    assert len(pairs) == 1


def test_a_row_that_cannot_be_cut():
    with pytest.raises(AssertionError, match="24 positions cannot be cut into 10"):
        piece_ranges(LENGTH, 0, 5)


@pytest.mark.parametrize("bounds", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("size", [2, 3])
def test_a_position_sees_its_sample_up_to_itself(bounds, size):
    samples = [(start, end) for start, end in itertools.pairwise(bounds) if end > start]
    for rank in range(size):
        divided = row_pieces(bounds, rank, size)
        places = iter(divided.places.tolist())
        for piece in divided.pieces:
            queries, keys = (x.tolist() for x in (piece.bounds.queries, piece.bounds.keys))
            assert (queries[-1], keys[-1]) == (piece.end - piece.start, piece.end - piece.first_key)
            for (first, last), (key, key_end) in zip(
                itertools.pairwise(queries), itertools.pairwise(keys), strict=True
            ):
                for query in range(first, last):
                    position = piece.start + query
                    (start,) = (start for start, end in samples if start <= position < end)
                    assert piece.first_key + key == start
                    assert piece.first_key + key_end - (last - query) == position, "the last key it sees is its own"
                    assert next(places) == position - start
        assert next(places, None) is None


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_one_after_another_to_a_row_and_back(size):
    row = torch.arange(2 * LENGTH).view(LENGTH, 2)
    held = [torch.cat([row[slice(*piece)] for piece in piece_ranges(LENGTH, rank, size)]) for rank in range(size)]
    assert torch.equal(in_row_order(torch.cat(held), size), row)
    assert torch.equal(in_rank_order(row, size), torch.cat(held))


@pytest.mark.parametrize("bounds", ROWS.values(), ids=ROWS)
def test_attention_of_the_pieces_is_that_of_the_row(bounds):
    """fp32 sums of a few terms in another order."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(LENGTH, heads, 8, generator=generator) for heads in (4, 2, 2))
    samples = Bounds.of_samples(torch.tensor(bounds, dtype=torch.int32), LENGTH)
    whole = KERNELS["sdpa"](query, key, value, samples, 0.3, 0.0)
    for rank in range(2):
        for piece in row_pieces(bounds, rank, 2).pieces:
            own, seen = slice(piece.start, piece.end), slice(piece.first_key, piece.end)
            attended = KERNELS["sdpa"](query[own], key[seen], value[seen], piece.bounds, 0.3, 0.0)
            torch.testing.assert_close(attended, whole[own], rtol=0, atol=1e-6)


def test_a_batch_of_a_rank():
    image = torch.zeros(1, LENGTH, dtype=torch.bool)
    image[:, [2, 3, 10, 11, 20]] = True
    ids = torch.arange(LENGTH)[None]
    batch = {
        "input_ids": ids,
        "labels": ids + 100,
        "position_ids": ids,
        "image_mask": image,
        "image_feature_index": torch.tensor([7, 6, 5, 4, 3]),
        "num_images": 1,
        "cu_seqlens": torch.tensor([0, 9, 24], dtype=torch.int32),
        "pixel_values": "the row's",
    }
    first, second = take_pieces(batch, 0, 2), take_pieces(batch, 1, 2)
    assert first["input_ids"].tolist() == [[*range(6), *range(18, 24)]]
    assert first["labels"].tolist() == [[*range(100, 106), *range(118, 124)]]
    assert second["position_ids"].tolist() == [list(range(6, 18))]
    assert first["image_feature_index"].tolist() == [7, 6, 3]
    assert second["image_feature_index"].tolist() == [5, 4]
    assert second["row_pieces"].places.tolist() == [6, 7, 8, *range(9)]
    assert first["pixel_values"] == "the row's"
    assert first["cu_seqlens"] is batch["cu_seqlens"]
    with pytest.raises(AssertionError, match="one packed row, not 2"):
        take_pieces({**batch, "input_ids": ids.repeat(2, 1)}, 0, 2)


def test_tensors_follow_to_a_device():
    moved = row_pieces(ROWS["samples that pieces cut"], 0, 2).to(torch.device("meta"))
    tensors = [moved.places, *(x for piece in moved.pieces for x in (piece.bounds.queries, piece.bounds.keys))]
    assert {x.device.type for x in tensors} == {"meta"}
