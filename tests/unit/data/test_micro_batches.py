"""The endless stream of micro-batches: rows, resume at any data-parallel size, shares of tiles, the thread."""

import dataclasses
import threading
import time

import numpy as np
import pytest
import torch

from dc_megatron.config import dealt_tiles
from dc_megatron.data.epoch_order import epoch_samples
from dc_megatron.data.index import build_index, open_index
from dc_megatron.data.loader import MicroBatches
from dc_megatron.data.row_plan import RowPlan
from tests.helpers.data_files import (
    caption_records,
    conversation,
    data_config,
    sentencepiece_tokenizer,
    tiling,
    vision_config,
    write_records,
)

COUNT = 10
# LLaVA's resolutions, in tiles of 28 pixels.
PINPOINTS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))


@pytest.fixture(scope="module")
def make_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    records = caption_records(folder / "images", COUNT)
    for record in records[::4]:
        del record["image"]
        record["conversations"] = conversation("no picture here", f"the {record['id']}")
    records[1]["image"] = ["0001.jpg", "0002.jpg", "0003.jpg"]
    records[1]["conversations"] = conversation("<image><image> and <image>?", "all of them")
    data_file = write_records(folder / "data.json", records)
    tokenizer = sentencepiece_tokenizer(folder / "tokenizer")

    def make(**changes):
        config = data_config(folder / "images", data_file, tokenizer, **changes)
        place = str(folder / f"index-{config.image_aspect_ratio}")
        build_index(config, place)
        return config, open_index(place)

    return make


@pytest.fixture(scope="module")
def data(make_data):
    return make_data()


@pytest.fixture(scope="module")
def packed(make_data):
    return make_data(packing="best-fit", seq_length=256)


def loader_of(data, rows_per_step=4, **options):
    config, index = data
    plan = RowPlan(index.lengths, index.tiles, index.sources, config, rows_per_step=rows_per_step, folder=None)
    values = {"micro_batch_size": 2, "data_parallel_rank": 0, "data_parallel_size": 1, "prefetch": 0, **options}
    if config.packing != "none":
        values["micro_batch_size"] = 1
    return MicroBatches(index, plan, config, vision_config(), **values)


def batches(data, count, **options):
    loader = loader_of(data, **options)
    taken = [next(loader) for _ in range(count)]
    loader.close()
    return taken


def rows(taken):
    """The ids of every row without its padding, which is as long as the micro-batch's longest row needs."""
    found = []
    for batch in taken:
        bounds = set(batch["cu_seqlens"].tolist())
        length = batch["input_ids"].shape[1]
        for number, row in enumerate(batch["input_ids"]):
            used = int((row != 0).nonzero().max()) + 1
            ends = sorted(
                bound - number * length for bound in bounds if number * length < bound <= (number + 1) * length
            )
            found.append((tuple(row[:used].tolist()), tuple(end for end in ends if end <= used)))
    return found


def test_every_epoch_is_its_own_permutation(make_data):
    config, index = data = make_data()
    seen = rows(batches(data, COUNT, decode_images=False))
    orders = [epoch_samples(index.sources, [1.0], config.seed, epoch, "shuffled") for epoch in (0, 1)]
    in_file_order = (dataclasses.replace(config, order="sequential"), index)
    own = {row: number for number, row in enumerate(rows(batches(in_file_order, COUNT // 2, decode_images=False)))}
    assert [own[row] for row in seen] == np.concatenate(orders).tolist()
    assert len(own) == len(index)


def test_unpacked_rows_are_as_long_as_the_longest_of_their_micro_batch(data):
    for batch in batches(data, 5, decode_images=False, length_multiple=8):
        lengths = batch["cu_seqlens"].diff().tolist()
        length = batch["input_ids"].shape[1]
        assert length % 8 == 0
        assert length - max(lengths) < 8


def test_packed_rows_hold_every_sample_once_an_epoch(packed):
    config, index = packed
    plan = RowPlan(index.lengths, index.tiles, index.sources, config, rows_per_step=2, folder=None)
    count = plan.rows_of_epoch(0)
    taken = batches(packed, count, rows_per_step=2, decode_images=False)
    assert sum(batch["counts"]["samples"] for batch in taken) == len(index)
    assert sum(batch["counts"]["tokens"] for batch in taken) == index.lengths.sum()
    assert all(batch["input_ids"].shape == (1, 256) for batch in taken)


def assert_equal_batches(one, other):
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, theirs[name]), name
            else:
                assert value == theirs[name], name


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 8, 16])
def test_packed_batches_after_a_resume_are_the_uninterrupted_runs_at_any_data_parallel_size(packed, size, start):
    """Four rows a step, tensor by tensor, from the middle and across the ends of epochs."""
    straight = batches(packed, start + 8)[start:]
    parts = [
        batches(packed, 8 // size, data_parallel_rank=rank, data_parallel_size=size, start_row=start)
        for rank in range(size)
    ]
    assert_equal_batches([parts[rank][number] for number in range(8 // size) for rank in range(size)], straight)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 8, 16])
def test_global_batches_do_not_depend_on_the_data_parallel_size(data, size, start):
    """Eight samples a step, resumed in the middle and across an epoch's end, against one rank from the start."""
    straight = rows(batches(data, 16, decode_images=False))[start : start + 16]
    parts = [
        batches(data, 8 // size, data_parallel_rank=rank, data_parallel_size=size, start_row=start, decode_images=False)
        for rank in range(size)
    ]
    resumed = rows([parts[rank][number] for number in range(8 // size) for rank in range(size)])
    assert resumed == straight


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("aspect_ratio", ["pad", "anyres"])
def test_shares_of_tiles_make_up_the_whole(make_data, size, aspect_ratio):
    changes = {}
    if aspect_ratio == "anyres":
        changes = {"tiling": tiling(pinpoints=PINPOINTS, merge="spatial_unpad")}
    data = make_data(packing="best-fit", seq_length=256, image_aspect_ratio=aspect_ratio, **changes)
    whole = batches(data, 4)
    shares = [batches(data, 4, image_share=(rank, size)) for rank in range(size)]
    for number, batch in enumerate(whole):
        joined = torch.cat([share[number]["pixel_values"] for share in shares])
        assert torch.equal(joined, batch["pixel_values"])
        assert len(joined) == batch["num_images"] == batch["counts"]["tiles"]
        assert batch["pixel_values"].shape[1:] == (3, 28, 28)
        assert batch["image_mask"].sum() == len(batch["image_feature_index"])
        # One more row than there are features is the newline.
        assert (batch["image_feature_index"] <= 4 * batch["num_images"]).all()
    if aspect_ratio == "anyres":
        assert any(batch["num_images"] > batch["counts"]["images"] for batch in whole)
    assert batches(data, 1, decode_images=False)[0]["pixel_values"] is None
    dealt, before = [batches(data, 4, image_share=(rank, size), deal_images=True) for rank in range(size)], 0
    for number, batch in enumerate(whole):
        for rank in range(size):
            mine = list(dealt_tiles(batch["num_images"], before, rank, size))
            assert torch.equal(dealt[rank][number]["pixel_values"], batch["pixel_values"][mine])
        before += batch["num_images"]


def test_the_thread_gives_the_same_and_ends(packed):
    loader = loader_of(packed, prefetch=2)
    threaded = [next(loader) for _ in range(6)]
    assert loader.data_wait_seconds > 0
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "data-prefetch"]
    assert_equal_batches(threaded, batches(packed, 6))
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_a_forgotten_loader_ends_its_thread(data):
    loader = loader_of(data, prefetch=2)
    next(loader)
    del loader
    until = time.monotonic() + 5
    while [thread for thread in threading.enumerate() if thread.name == "data-prefetch"]:
        assert time.monotonic() < until
        time.sleep(0.05)


class Faulty:
    """An index whose disk is gone."""

    def __init__(self, index):
        self.summary, self.lengths, self.tiles, self.sources = index.summary, index.lengths, index.tiles, index.sources

    def __getitem__(self, number):
        raise ValueError("the disk is gone")


def test_an_exception_of_the_thread_surfaces(data):
    config, index = data
    loader = loader_of((config, Faulty(index)), prefetch=2)
    with pytest.raises(ValueError, match="the disk is gone"):
        next(loader)


class Slow:
    """A store that takes its time."""

    def __init__(self, store, seconds):
        self._store, self._seconds = store, seconds

    def read(self, name):
        time.sleep(self._seconds)
        return self._store.read(name)

    def where(self, name):
        return self._store.where(name)


def test_a_slow_store_shows_in_the_wait_and_is_named(data, monkeypatch, caplog):
    from dc_megatron.data import loader as module
    from dc_megatron.data.image_store import open_stores

    monkeypatch.setattr(module, "_SAY_AFTER_SECONDS", 0.1)
    config, _ = data
    slow = [Slow(store, 0.4) for store in open_stores(config.sources)]
    loader = loader_of(data, prefetch=1, stores=slow)
    for _ in range(2):
        next(loader)
    loader.close()
    assert loader.data_wait_seconds > 0.3
    assert "waited" in caplog.text


def test_images_that_went_bad_after_indexing_are_substituted_and_counted(data, tmp_path):
    config, index = data
    source = dataclasses.replace(config.sources[0], image_folder=str(tmp_path))
    elsewhere = dataclasses.replace(config, sources=(source,))
    total = batches((elsewhere, index), COUNT // 2)
    assert sum(batch["counts"]["substituted_images"] for batch in total) == index.summary.images
    assert all(batch["pixel_values"].abs().max() < 0.02 for batch in total if batch["num_images"])
