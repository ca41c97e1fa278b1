"""Samples that share rows train as they would alone: losses, gradients, and nothing that passes between samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig, image_tiling
from dc_megatron.data.picture import make_picture
from dc_megatron.data.rows import assemble, row_length
from dc_megatron.data.tokenization import IGNORE, IMAGE_ID, TokenisedSample
from tests.helpers.tiny_models import tiny_clip, tiny_llama
from tests.multirank import parity
from tests.multirank.job import Job
from tests.multirank.test_parity import TRAIN

WORKER = "tests.multirank.packing_worker"
VOCABULARY, SEQUENCE = 1003, 96
LAYOUTS = {
    "TP1": (1, {}),
    "TP2+SP": (2, {"tensor": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline": 2}),
}
# Of every sample its pictures (16 positions each) and its words; rows that are full, nearly full and half empty, one
# of them without a picture.
ROWS = [[(1, 20), (0, 9), (2, 19)], [(0, 30), (0, 11)], [(1, 14), (3, 17)]]
PERTURBED_ROW = 0


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    language, tower = tiny_llama(root / "llama", vocab=VOCABULARY), tiny_clip(root / "clip")
    vision, connector = VisionConfig.from_folder(tower), ConnectorConfig("dci")
    return Job(
        language_folder=language,
        vision_folder=tower,
        micro_batches=[],
        connector_state=parity.connector_state(vision, connector, LanguageConfig.from_folder(language).hidden_size),
        tiling=image_tiling(vision, connector),
        packed=True,
    )


def make_sample(tiling, images: int, words: int, seed: int) -> TokenisedSample:
    """Pictures among the first words; the later half of the words is the answer. A picture's name says its pixels."""
    ids = torch.randint(3, VOCABULARY, (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    pictures = tuple(make_picture(tiling, f"{seed * 10 + image}", 40, 30) for image in range(images))
    for image in range(images):
        ids.insert(2 * image + 1, IMAGE_ID)
    answer = len(ids) - words // 2
    labels = [token if position >= answer else IGNORE for position, token in enumerate(ids)]
    length = words + sum(picture.tokens for picture in pictures)
    return TokenisedSample(np.array(ids, np.int32), np.array(labels, np.int32), pictures, length)


def make_rows(tiling, changed: tuple[int, int] | None = None) -> list[list[TokenisedSample]]:
    """ROWS; the words and pictures of the sample at ``changed`` (row, place) are others, its lengths are not."""
    return [
        [make_sample(tiling, *sample, seed=100 * row + place + 50 * ((row, place) == changed))
         for place, sample in enumerate(samples)]
        for row, samples in enumerate(ROWS)
    ]  # fmt: skip


def make_batch(tiling, rows: list[list[TokenisedSample]], length: int) -> dict:
    batch = assemble(rows, length, tiling)
    pixels = [
        torch.randn(3, tiling.tile_size, tiling.tile_size, generator=torch.Generator().manual_seed(int(picture.name)))
        for picture in batch["pictures"]
    ]
    side = tiling.tile_size
    batch["pixel_values"] = torch.stack(pixels) if pixels else torch.zeros(0, 3, side, side)
    return batch


def first_step(workers, job: Job, layout: str, batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, whole gradients by Hugging Face name) of one step over ``batches``."""
    world, settings = LAYOUTS[layout]
    job = replace(job, micro_batches=[batches], **settings)
    results = workers.run(TRAIN, world, job)
    return parity.losses(results)[0], parity.merge(job, results, "gradients")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_rows_train_as_one_sample_a_row(workers, job, layout):
    rows = make_rows(job.tiling)
    assert [sum(sample.length for sample in row) for row in rows] == [96, 41, 95]
    packed = [make_batch(job.tiling, [row], SEQUENCE) for row in rows]
    alone = [[sample] for row in rows for sample in row]
    padded = [make_batch(job.tiling, alone, row_length(alone, 2))]
    assert sum(batch["counts"]["supervised_tokens"] for batch in packed) == padded[0]["counts"]["supervised_tokens"]
    loss, gradients = first_step(workers, job, layout, packed)
    expected, expected_gradients = first_step(workers, replace(job, packed=False), layout, padded)
    assert abs(loss - expected) <= parity.LOSS_TOLERANCE
    assert {"connector.mlp.0.weight", "lm_head.weight"} <= set(gradients)
    worst, name = parity.worst_difference(gradients, expected_gradients)
    assert worst <= parity.GRADIENT_TOLERANCE, f"gradient of {name} differs by {worst:.2e}"


def others(job: Job, place: int, changed: bool, one_segment: bool = False) -> list[dict]:
    """The row with the sample at ``place`` changed or not; only the other samples' words are targets."""
    row = make_rows(job.tiling, (PERTURBED_ROW, place) if changed else None)[PERTURBED_ROW]
    row[place] = replace(row[place], labels=np.full_like(row[place].labels, IGNORE))
    batch = make_batch(job.tiling, [row], SEQUENCE)
    if one_segment:
        batch["cu_seqlens"], batch["max_seqlen"] = torch.tensor([0, SEQUENCE], dtype=torch.int32), SEQUENCE
    return [batch]


@pytest.mark.parametrize("place", range(len(ROWS[PERTURBED_ROW])))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changed_sample_moves_nothing_of_the_others(workers, job, layout, place):
    """To the bit: what the changed sample adds to the others' sums and gradients is exactly zero."""
    loss, gradients = first_step(workers, job, layout, others(job, place, changed=False))
    loss_beside_another, gradients_beside_another = first_step(workers, job, layout, others(job, place, changed=True))
    assert loss == loss_beside_another
    moved = [name for name, value in gradients.items() if not torch.equal(value, gradients_beside_another[name])]
    assert moved == []


def test_without_bounds_a_changed_sample_moves_the_others(workers, job):
    """The test above can see a leak: attention and positions over the whole row let the first sample through."""
    loss, _ = first_step(workers, job, "TP1", others(job, 0, changed=False, one_segment=True))
    leaked, _ = first_step(workers, job, "TP1", others(job, 0, changed=True, one_segment=True))
    assert abs(loss - leaked) > 1e-3
    bounded, _ = first_step(workers, job, "TP1", others(job, 0, changed=False))
    assert abs(loss - bounded) > 1e-3


@pytest.mark.parametrize(
    ("lengths", "longest"),
    [([7, 1, 30, 2, 24], 30), ([64], 64), ([1] * 5, 3), ([9, 3], 64)],
    ids=["several", "one of the row's length", "single positions", "frequencies left over"],
)
def test_a_row_rotated_at_once_is_megatrons_rotation(workers, lengths, longest):
    (got,) = workers.run(f"{WORKER}:rotation", 1, lengths, longest)
    assert got == {"replaced": True, "output": True, "gradient": True}
