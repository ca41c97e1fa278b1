"""Rows of a micro-batch against hand-made ones, and the order of samples."""

import numpy as np
import pytest

from dc_megatron.data.rows import assemble, sample_order
from dc_megatron.data.tokenization import IGNORE, IMAGE_ID, TokenisedSample


def sample(ids, labels, images=(), length=None, tokens_per_image=3):
    whole = len(ids) + ids.count(IMAGE_ID) * (tokens_per_image - 1)
    return TokenisedSample(
        np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32), tuple(images), length or whole
    )


def test_a_row_with_an_image_and_one_without():
    first = sample([1, IMAGE_ID, 5, 6], [IGNORE, IGNORE, IGNORE, 6], ["a.jpg"])
    second = sample([1, 7, 8], [IGNORE, 7, 8])
    batch = assemble([first, second], 8, 3)
    assert batch["input_ids"].tolist() == [[1, 0, 0, 0, 5, 6, 0, 0], [1, 7, 8, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, 6, -100, -100, -100], [7, 8] + [-100] * 6]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch["image_mask"].int().tolist() == [[0, 1, 1, 1, 0, 0, 0, 0], [0] * 8]
    assert batch["image_feature_index"].tolist() == [0, 1, 2]
    assert batch["cu_seqlens"].tolist() == [0, 6, 8, 11, 16]
    assert (batch["max_seqlen"], batch["num_images"]) == (6, 1)
    assert batch["counts"] == {
        "samples": 2, "tokens": 9, "supervised_tokens": 3, "images": 1, "substituted_images": 0
    }  # fmt: skip


def test_cut_images_and_full_rows():
    cut = sample([1, IMAGE_ID, 4, IMAGE_ID], [IGNORE] * 4, ["a", "b"], length=7)
    after = sample([IMAGE_ID, 9, 9], [IGNORE, 9, 9], ["c"])
    batch = assemble([cut, after], 7, 3)
    assert batch["image_mask"].int().tolist() == [[0, 1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0]]
    # Image b gives its first two features only; image c is the third of the batch.
    assert batch["image_feature_index"].tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
    assert batch["num_images"] == 3
    # A row that is full has no padding segment.
    assert batch["cu_seqlens"].tolist() == [0, 7, 12, 14]


def test_too_long_a_sample_is_our_own_fault():
    with pytest.raises(AssertionError, match="cannot stand in a row"):
        assemble([sample([1, 2, 3], [IGNORE] * 3)], 2, 3)


def test_orders():
    assert sample_order(5, 1, 3, "sequential").tolist() == [0, 1, 2, 3, 4]
    orders = [tuple(sample_order(50, seed, epoch, "shuffled")) for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)
    # Pinned: a run resumes only if another process, and a later numpy, shuffle in the same way.
    assert sample_order(8, 1234, 0, "shuffled").tolist() == [6, 5, 4, 0, 2, 7, 3, 1]
