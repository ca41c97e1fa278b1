"""Batches in page-locked memory: all tensors of a batch, and only where they were asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dc_megatron.data.loader import MicroBatches
from dc_megatron.data.rows import assemble, pinned
from dc_megatron.data.tokenization import IGNORE, IMAGE_ID, TokenisedSample
from tests.helpers.data_files import data_config, picture, tiling, vision_config


@pytest.fixture(autouse=True)
def copies(monkeypatch) -> set[int]:
    """Where the copies lie; without a driver there is no such memory."""
    made: dict[int, torch.Tensor] = {}

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        made[id(copy)] = copy  # kept: another tensor may not get its id
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return made


def sample(number: int) -> TokenisedSample:
    ids = np.array([1, IMAGE_ID, 5, 10 + number], dtype=np.int32)
    labels = np.array([IGNORE, IGNORE, IGNORE, 10 + number], dtype=np.int32)
    return TokenisedSample(ids, labels, (picture(tokens=4),), 7)


def tensors(batch: dict) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def test_every_tensor_is_copied_and_nothing_else(copies):
    batch = assemble([[sample(0)], [sample(1)]], 8, tiling(4)) | {"pixel_values": torch.ones(2, 3, 28, 28)}
    found = pinned(batch)
    assert list(found) == list(batch)
    assert {"input_ids", "labels", "image_mask", "cu_seqlens", "pixel_values"} <= set(tensors(batch))
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            assert id(found[name]) in copies, name
            assert torch.equal(found[name], value)
        else:
            assert found[name] is value, name


def test_a_batch_without_pixels(copies):
    assert pinned({"pixel_values": None, "num_images": 0}) == {"pixel_values": None, "num_images": 0}


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("wanted", [True, False])
def test_the_loader_pins_where_it_is_told(copies, wanted, prefetch):
    samples = [sample(number) for number in range(4)]
    loader = MicroBatches(
        samples,
        [[0], [1], [2], [3], [0], [1], [2], [3]],
        data_config("", "data.json", "", packing="none"),
        vision_config(),
        micro_batch_size=2,
        data_parallel_rank=0,
        data_parallel_size=1,
        decode_images=False,
        prefetch=prefetch,
        pin_memory=wanted,
    )
    batch = next(loader)
    loader.close()
    assert {id(value) in copies for value in tensors(batch).values()} == {wanted}
    assert batch["input_ids"][:, 6].tolist() == [10, 11]
    assert batch["pixel_values"] is None


def test_the_loader_does_not_pin_unasked():
    assert MicroBatches.__init__.__kwdefaults__["pin_memory"] is False
