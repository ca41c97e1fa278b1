"""Samples to the rows of a micro-batch: pure integer work, shared by training, scoring and tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dc_megatron.data.tokenization import IGNORE, IMAGE_ID, TokenisedSample


def sample_order(n: int, seed: int, epoch: int, order: str) -> np.ndarray:
    """int64 [n]: which sample stands where in ``epoch``; a permutation of (seed, epoch), or 0..n-1 for sequential.

    RandomState, because numpy promises that its streams never change: a run must resume under a later numpy.
    """
    if order == "sequential":
        return np.arange(n)
    words = np.random.SeedSequence([seed, epoch]).generate_state(4)
    return np.random.RandomState(words).permutation(n)


def expand(sample: TokenisedSample, tokens_per_image: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, labels, image_mask) of one sample, each [sample.length], images expanded and the tail cut off.

    ids int64 with 0 at image positions, labels int64 not shifted, image_mask bool.
    """
    is_image = sample.input_ids == IMAGE_ID
    widths = np.where(is_image, tokens_per_image, 1)
    mask = np.repeat(is_image, widths)[: sample.length]
    ids = np.repeat(sample.input_ids, widths)[: sample.length].astype(np.int64)
    labels = np.repeat(sample.labels, widths)[: sample.length].astype(np.int64)
    return np.where(mask, 0, ids), labels, mask


def assemble(samples: Sequence[TokenisedSample], seq_length: int, tokens_per_image: int) -> dict:
    """A Batch (see below) without ``pixel_values``, one sample a row; b = len(samples), S = seq_length.

    input_ids, labels (already shifted: labels[t] is the id that position t must predict), position_ids: int64 [b, S];
    image_mask: bool [b, S]; image_feature_index: int64 [True positions of image_mask], the row of each among the
    features [num_images * tokens_per_image]; num_images: int; cu_seqlens: int32 [segments + 1] over the flattened
    rows, a row's padding being a segment of its own; max_seqlen: int; counts: dict of ints with samples, tokens,
    supervised_tokens, images, substituted_images (0 here).
    """
    rows = len(samples)
    input_ids = np.zeros((rows, seq_length), dtype=np.int64)
    labels = np.full((rows, seq_length), IGNORE, dtype=np.int64)
    position_ids = np.zeros((rows, seq_length), dtype=np.int64)
    image_mask = np.zeros((rows, seq_length), dtype=bool)
    feature_index, boundaries, images = [], [0], 0
    for row, sample in enumerate(samples):
        length = sample.length
        assert length <= seq_length, f"a sample of {length} positions cannot stand in a row of {seq_length}"
        ids, targets, mask = expand(sample, tokens_per_image)
        input_ids[row, :length] = ids
        labels[row, : length - 1] = targets[1:]
        position_ids[row, :length] = np.arange(length)
        position_ids[row, length:] = np.arange(seq_length - length)
        image_mask[row, :length] = mask
        # Only the last image of a sample can be cut, so its features are the first ones from its own start on.
        feature_index.append(images * tokens_per_image + np.arange(mask.sum()))
        images += len(sample.images)
        boundaries.append(row * seq_length + length)
        if length < seq_length:
            boundaries.append((row + 1) * seq_length)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(position_ids),
        "image_mask": torch.from_numpy(image_mask),
        "image_feature_index": torch.from_numpy(np.concatenate(feature_index).astype(np.int64)),
        "num_images": images,
        "cu_seqlens": torch.tensor(boundaries, dtype=torch.int32),
        "max_seqlen": int(np.diff(boundaries).max()),
        "counts": {
            "samples": rows,
            "tokens": sum(sample.length for sample in samples),
            "supervised_tokens": int((labels != IGNORE).sum()),
            "images": images,
            "substituted_images": 0,
        },
    }
