"""Samples to the rows of a micro-batch: pure integer work, shared by training, scoring and tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dc_megatron.config import ImageTiling
from dc_megatron.data.picture import Picture
from dc_megatron.data.tile_positions import feature_positions
from dc_megatron.data.tokenization import IGNORE, IMAGE_ID, TokenisedSample, image_widths


def expand(sample: TokenisedSample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, labels, image_mask) of one sample, each [sample.length], images expanded.

    ids int64 with 0 at image positions, labels int64 not shifted, image_mask bool.
    """
    is_image = sample.input_ids == IMAGE_ID
    widths = image_widths(sample.input_ids, sample.images)
    mask = np.repeat(is_image, widths)
    ids = np.repeat(sample.input_ids, widths).astype(np.int64)
    labels = np.repeat(sample.labels, widths).astype(np.int64)
    return np.where(mask, 0, ids), labels, mask


def assemble(rows: Sequence[Sequence[TokenisedSample]], seq_length: int, tiling: ImageTiling) -> dict:
    """A Batch without ``pixel_values``: the samples of each row one after another; b = len(rows), S = seq_length.

    input_ids, labels (already shifted: labels[t] is the id that position t must predict), position_ids (from 0 in every
    sample): int64 [b, S]; image_mask: bool [b, S]; num_images: int, the tiles that the tower encodes;
    image_feature_index: int64 [True positions of image_mask], the row of each among the features
    [num_images * tile_tokens], or num_images * tile_tokens for the image_newline; pictures: the Pictures in order;
    cu_seqlens: int32 [segments + 1] over the flattened rows, a row's padding being a segment of its own; max_seqlen:
    int; counts: dict of ints with samples, positions, tokens, supervised_tokens, images, tiles, substituted_images
    (0 here).
    """
    columns = _Columns(len(rows), seq_length)
    pictures, boundaries = [], [0]
    for row, samples in enumerate(rows):
        position = 0
        for sample in samples:
            columns.place(row, position, sample)
            position += sample.length
            boundaries.append(row * seq_length + position)
            pictures += sample.images
        if position < seq_length:
            columns.position_ids[row, position:] = np.arange(seq_length - position)
            boundaries.append((row + 1) * seq_length)
    feature_index, tiles = feature_rows(pictures, tiling)
    return {
        "input_ids": torch.from_numpy(columns.input_ids),
        "labels": torch.from_numpy(columns.labels),
        "position_ids": torch.from_numpy(columns.position_ids),
        "image_mask": torch.from_numpy(columns.image_mask),
        "image_feature_index": torch.from_numpy(feature_index),
        "num_images": tiles,
        "pictures": pictures,
        "cu_seqlens": torch.tensor(boundaries, dtype=torch.int32),
        "max_seqlen": int(np.diff(boundaries).max()),
        "counts": {
            "samples": sum(len(samples) for samples in rows),
            "positions": len(rows) * seq_length,
            "tokens": sum(sample.length for samples in rows for sample in samples),
            "supervised_tokens": int((columns.labels != IGNORE).sum()),
            "images": len(pictures),
            "tiles": tiles,
            "substituted_images": 0,
        },
    }


def feature_rows(pictures: Sequence[Picture], tiling: ImageTiling) -> tuple[np.ndarray, int]:
    """(image_feature_index, num_images) of a batch whose pictures these are, in the order of their positions."""
    index, tiles = [np.zeros(0, dtype=np.int64)], 0
    for picture in pictures:
        index.append(feature_positions(tiling, picture, tiles))
        tiles += picture.tiles
    positions = np.concatenate(index)
    return np.where(positions < 0, tiles * tiling.tile_tokens, positions), tiles


class _Columns:
    """The arrays [rows, seq_length] of a batch, filled sample by sample."""

    def __init__(self, rows: int, seq_length: int):
        shape = (rows, seq_length)
        self.input_ids = np.zeros(shape, dtype=np.int64)
        self.labels = np.full(shape, IGNORE, dtype=np.int64)
        self.position_ids = np.zeros(shape, dtype=np.int64)
        self.image_mask = np.zeros(shape, dtype=bool)

    def place(self, row: int, start: int, sample: TokenisedSample) -> None:
        end = start + sample.length
        room = self.input_ids.shape[1]
        assert end <= room, f"a sample of {sample.length} positions cannot stand in a row of {room} from {start} on"
        ids, targets, mask = expand(sample)
        self.input_ids[row, start:end] = ids
        # The last position of a sample predicts nothing: what follows is another sample.
        self.labels[row, start : end - 1] = targets[1:]
        self.position_ids[row, start:end] = np.arange(sample.length)
        self.image_mask[row, start:end] = mask


def row_length(rows: Sequence[Sequence[TokenisedSample]], multiple: int) -> int:
    """Positions of the fullest of ``rows``, rounded up to a multiple; rows that are all empty have one."""
    longest = max(1, *(sum(sample.length for sample in samples) for samples in rows))
    return -(-longest // multiple) * multiple


def pinned(batch: dict) -> dict:
    """The batch in page-locked memory, from which a GPU copies while the host goes on."""
    return {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
