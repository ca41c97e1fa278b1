"""Rows of a micro-batch against hand-made ones."""

import numpy as np
import pytest

from dc_megatron.data.rows import assemble, row_length
from dc_megatron.data.tokenization import IGNORE, IMAGE_ID, TokenisedSample
from tests.helpers.data_files import picture, tiling


def sample(ids, labels, images=0, tokens=3):
    length = len(ids) + ids.count(IMAGE_ID) * (tokens - 1)
    pictures = tuple(picture(tokens=tokens) for _ in range(images))
    return TokenisedSample(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32), pictures, length)


def test_a_row_with_an_image_and_one_without():
    first = sample([1, IMAGE_ID, 5, 6], [IGNORE, IGNORE, IGNORE, 6], 1)
    second = sample([1, 7, 8], [IGNORE, 7, 8])
    batch = assemble([[first], [second]], 8, tiling(3))
    assert batch["input_ids"].tolist() == [[1, 0, 0, 0, 5, 6, 0, 0], [1, 7, 8, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, 6, -100, -100, -100], [7, 8] + [-100] * 6]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch["image_mask"].int().tolist() == [[0, 1, 1, 1, 0, 0, 0, 0], [0] * 8]
    assert batch["image_feature_index"].tolist() == [0, 1, 2]
    assert batch["cu_seqlens"].tolist() == [0, 6, 8, 11, 16]
    assert (batch["max_seqlen"], batch["num_images"]) == (6, 1)
    assert batch["counts"] == {
        "samples": 2, "positions": 16, "tokens": 9, "supervised_tokens": 3, "images": 1, "tiles": 1,
        "substituted_images": 0,
    }  # fmt: skip


def test_samples_share_a_row():
    first = sample([1, IMAGE_ID, 5], [IGNORE, IGNORE, 5], 1)
    second = sample([1, IMAGE_ID, 6, IMAGE_ID], [IGNORE, IGNORE, 6, IGNORE], 2)
    batch = assemble([[first, second]], 14, tiling(3))
    assert batch["input_ids"].tolist() == [[1, 0, 0, 0, 5, 1, 0, 0, 0, 6, 0, 0, 0, 0]]
    # The last position of the first sample does not predict the second one's first.
    assert batch["labels"].tolist() == [[-100, -100, -100, 5, -100, -100, -100, -100, 6] + [-100] * 5]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7, 0]]
    assert batch["image_feature_index"].tolist() == list(range(9))
    assert batch["cu_seqlens"].tolist() == [0, 5, 13, 14]
    assert batch["pictures"] == [*first.images, *second.images]
    assert batch["counts"]["tokens"] == 13


def test_full_rows():
    full = sample([1, IMAGE_ID, 4, IMAGE_ID], [IGNORE] * 4, 2)
    after = sample([IMAGE_ID, 9, 9], [IGNORE, 9, 9], 1)
    batch = assemble([[full], [after]], 8, tiling(3))
    assert batch["image_feature_index"].tolist() == list(range(9))
    # A row that is full has no padding segment.
    assert batch["cu_seqlens"].tolist() == [0, 8, 13, 16]


def test_rows_as_long_as_the_longest():
    short, long = sample([1, 2], [IGNORE, 2]), sample([1, IMAGE_ID, 4], [IGNORE, IGNORE, 4], 1)
    assert row_length([[short], [long]], 1) == 5
    assert row_length([[short, long], [long]], 4) == 8


def test_too_long_a_sample_is_our_own_fault():
    with pytest.raises(AssertionError, match="cannot stand in a row"):
        assemble([[sample([1, 2, 3], [IGNORE] * 3)]], 2, tiling())
