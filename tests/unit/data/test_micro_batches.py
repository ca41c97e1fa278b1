"""The endless stream of micro-batches: order, resume at any data-parallel size, shares of images, the thread."""

import threading
import time

import pytest
import torch

from dc_megatron.data.index import build_index, open_index
from dc_megatron.data.loader import MicroBatches
from dc_megatron.data.rows import sample_order
from tests.helpers.data_files import (
    caption_records,
    conversation,
    data_config,
    sentencepiece_tokenizer,
    vision_config,
    write_records,
)

COUNT = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    records = caption_records(folder / "images", COUNT)
    for record in records[::4]:
        del record["image"]
        record["conversations"] = conversation("no picture here", f"the {record['id']}")
    records[1]["image"] = ["0001.jpg", "0002.jpg", "0003.jpg"]
    records[1]["conversations"] = conversation("<image><image> and <image>?", "all of them")
    config = data_config(
        folder / "images", write_records(folder / "data.json", records), sentencepiece_tokenizer(folder / "tokenizer")
    )
    build_index(config, str(folder / "index"))
    return config, open_index(str(folder / "index"))


def batches(data, count, **options):
    config, index = data
    values = {"micro_batch_size": 2, "data_parallel_rank": 0, "data_parallel_size": 1, "prefetch": 0, **options}
    loader = MicroBatches(index, config, vision_config(), **values)
    taken = [next(loader) for _ in range(count)]
    loader.close()
    return taken


def rows(taken):
    return [tuple(row.tolist()) for batch in taken for row in batch["input_ids"]]


def test_every_epoch_is_its_own_permutation(data):
    config, index = data
    seen = rows(batches(data, COUNT, decode_images=False))
    expected = [*sample_order(COUNT, config.seed, 0, "shuffled"), *sample_order(COUNT, config.seed, 1, "shuffled")]
    own = {row: number for number, row in enumerate(rows(batches_in_file_order(data)))}
    assert [own[row] for row in seen] == expected
    assert len(own) == len(index)


def batches_in_file_order(data):
    config, index = data
    sequential = data_config(config.image_folder, config.data_path, config.tokenizer_path, order="sequential")
    return batches((sequential, index), COUNT // 2, decode_images=False)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 8, 16])
def test_global_batches_do_not_depend_on_the_data_parallel_size(data, size, start):
    """Eight samples a step, resumed in the middle and across an epoch's end, against one rank from the start."""
    straight = rows(batches(data, 16, decode_images=False))[start : start + 16]
    parts = [
        batches(
            data, 8 // size, data_parallel_rank=rank, data_parallel_size=size, start_sample=start, decode_images=False
        )
        for rank in range(size)
    ]
    resumed = rows([parts[rank][number] for number in range(8 // size) for rank in range(size)])
    assert resumed == straight


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_of_images_make_up_the_whole(data, size):
    whole = batches(data, 4, micro_batch_size=4)
    shares = [batches(data, 4, micro_batch_size=4, image_share=(rank, size)) for rank in range(size)]
    for number, batch in enumerate(whole):
        joined = torch.cat([share[number]["pixel_values"] for share in shares])
        assert torch.equal(joined, batch["pixel_values"])
        assert len(joined) == batch["num_images"] == batch["counts"]["images"]
        assert batch["pixel_values"].shape[1:] == (3, 28, 28)
        assert batch["image_mask"].sum() == 4 * batch["num_images"] == len(batch["image_feature_index"])
    assert batches(data, 1, decode_images=False)[0]["pixel_values"] is None


def test_the_thread_gives_the_same_and_ends(data):
    config, index = data
    loader = MicroBatches(
        index, config, vision_config(), micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1
    )
    threaded = [next(loader) for _ in range(6)]
    assert loader.data_wait_seconds > 0
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "data-prefetch"]
    for one, other in zip(threaded, batches(data, 6), strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["pixel_values"], other["pixel_values"])
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_a_forgotten_loader_ends_its_thread(data):
    config, index = data
    loader = MicroBatches(
        index, config, vision_config(), micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1
    )
    next(loader)
    del loader
    until = time.monotonic() + 5
    while [thread for thread in threading.enumerate() if thread.name == "data-prefetch"]:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_an_exception_of_the_thread_surfaces(data):
    config, index = data

    class Faulty:
        summary = index.summary

        def __len__(self):
            return len(index)

        def __getitem__(self, number):
            raise ValueError("the disk is gone")

    loader = MicroBatches(
        Faulty(), config, vision_config(), micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1
    )
    with pytest.raises(ValueError, match="the disk is gone"):
        next(loader)


def test_images_that_went_bad_after_indexing_are_substituted_and_counted(data, tmp_path):
    config, index = data
    elsewhere = data_config(tmp_path, config.data_path, config.tokenizer_path)
    total = batches((elsewhere, index), COUNT // 2)
    assert sum(batch["counts"]["substituted_images"] for batch in total) == index.summary.images
    assert all(batch["pixel_values"].abs().max() < 0.02 for batch in total if batch["num_images"])
