"""AnyRes in the sharded model against the reference, which merges tiles with tensors as the original does.

Micro-batches are the data room's own (``rows.assemble``), so its index arithmetic is compared as well.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig, default_pinpoints, image_share
from dc_megatron.config import image_tiling as make_tiling
from dc_megatron.data.picture import make_picture
from dc_megatron.data.rows import assemble
from dc_megatron.data.tokenization import IGNORE, IMAGE_ID, TokenisedSample
from tests.helpers.tiny_models import tiny_clip, tiny_llama, tiny_siglip
from tests.multirank import parity
from tests.multirank.job import Job
from tests.multirank.test_parity import TRAIN, assert_first_step_equal

SEQUENCE, VOCABULARY = 512, 1003
# Micro-batches are one row; of each of its samples the sizes of its pictures: all grids of LLaVA-1.6, a strip that is
# cut away whole, samples and a micro-batch without any. At TP2 rank 0 encodes the first 7 of 14 tiles of the first
# micro-batch, two of them of its second picture.
SIZES = [
    [[(60, 90)], [], [(100, 100)], [(20, 61)]],
    [[], []],
    [[(64, 21), (5, 7)], [(300, 4)], [(50, 27)]],
]
LAYOUTS = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline": 2}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": tiny_llama(root / "llama", vocab=VOCABULARY, layers=2),
        "clip": tiny_clip(root / "clip"),
        "siglip": tiny_siglip(root / "siglip"),
    }


def make_sample(tiling, sizes, generator):
    """Words, then every picture behind more words, then an answer."""
    ids, pictures = [], []

    def words(count):
        ids.extend(torch.randint(3, VOCABULARY, (count,), generator=generator).tolist())

    words(2)
    for size in sizes:
        pictures.append(make_picture(tiling, "p", *size))
        ids.append(IMAGE_ID)
        words(2)
    words(6)
    labels = [IGNORE if token == IMAGE_ID else token for token in ids]
    length = len(ids) - len(pictures) + sum(picture.tokens for picture in pictures)
    return TokenisedSample(np.array(ids, np.int32), np.array(labels, np.int32), tuple(pictures), length)


def make_step(tiling, vision, sizes=SIZES, seed=0):
    """Micro-batches with random pixels for every tile."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for row in sizes:
        batch = assemble([[make_sample(tiling, sample, generator) for sample in row]], SEQUENCE, tiling)
        side = vision.image_size
        batch["pixel_values"] = torch.randn(batch["num_images"], 3, side, side, generator=generator)
        batches.append(batch)
    return batches


def make_job(folders, connector="dci", merge="spatial_unpad", tower="clip", sizes=SIZES, steps=1, **settings):
    vision, chosen = VisionConfig.from_folder(folders[tower]), ConnectorConfig(connector)
    tiling = make_tiling(vision, chosen, default_pinpoints(vision), merge)
    width = LanguageConfig.from_folder(folders["llama"]).hidden_size
    return Job(
        language_folder=folders["llama"],
        vision_folder=folders[tower],
        micro_batches=[make_step(tiling, vision, sizes, seed) for seed in range(steps)],
        connector_type=connector,
        connector_state=parity.connector_state(vision, chosen, width, newline=tiling.has_newline),
        tiling=tiling,
        packed=True,
        **settings,
    )


def assert_equal(workers, job, world):
    reference = parity.run_reference(job)
    assert ("image_newline" in reference["gradients"]) == job.tiling.has_newline
    if job.tiling.has_newline:
        assert reference["gradients"]["image_newline"].norm() > 0
    assert_first_step_equal(job, workers.run(TRAIN, world, job), reference)


def test_the_pictures_of_these_tests(folders):
    """What the other tests are about does occur: every grid, a picture on two ranks, a micro-batch without any."""
    job = make_job(folders)
    (step,) = job.micro_batches
    shapes = [job.tiling.of(p.width, p.height) for batch in step for p in batch["pictures"]]
    assert {(shape.columns, shape.rows) for shape in shapes} == {(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)}
    assert any(shape.cropped != (0, 0) for shape in shapes)
    assert [batch["num_images"] for batch in step] == [14, 0, 14]
    edges = np.cumsum([picture.tiles for picture in step[0]["pictures"]])
    assert image_share(14, 0, 2).stop not in edges


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spatial_unpad_at_every_layout(workers, folders, layout):
    world, settings = LAYOUTS[layout]
    assert_equal(workers, make_job(folders, **settings), world)


MERGES = [*((kind, merge) for kind in ("dci", "sci", "none") for merge in ("spatial_unpad", "spatial"))]
MERGES += [("sti", "flat"), ("dci", "flat")]
# The merge does not look at features, so the rest differs in what other tests compare.
QUICK = {("clip", "sci", "spatial_unpad"), ("clip", "none", "spatial"), ("clip", "sti", "flat")}
QUICK |= {("siglip", "dci", "spatial_unpad"), ("siglip", "sti", "flat")}
CASES = [
    pytest.param(tower, *pair, marks=() if (tower, *pair) in QUICK else pytest.mark.long)
    for tower in ("clip", "siglip")
    for pair in MERGES
]


@pytest.mark.parametrize(("tower", "connector", "merge"), CASES)
def test_every_connector_merge_and_tower(workers, folders, tower, connector, merge):
    assert_equal(workers, make_job(folders, connector, merge, tower, tensor=2, sequence_parallel=True), 2)


@pytest.mark.parametrize(
    ("stage", "layout"),
    [
        ("connector", {"tensor": 2}),
        ("connector,llm", {"pipeline": 2}),
        ("connector,llm", {"distributed_optimizer": True, "overlap_param_gather": True}),
    ],
    ids=["TP2", "PP2", "DP2"],
)
def test_micro_batches_without_pictures_under_overlapped_reduction(workers, folders, stage, layout):
    """image_newline takes part in every micro-batch, or the reduction of its bucket would never start."""
    sizes = [[[(60, 90)]], [[]], [[(5, 7)], []], [[]]]
    job = make_job(folders, sizes=sizes, trainable=stage, overlap_grad_reduce=True, **layout)
    vision = VisionConfig.from_folder(job.vision_folder)
    others = [[[[]]] * 4, [[[]], [[(20, 61)]], [[]], [[]]], sizes]
    job = replace(
        job, micro_batches=[job.micro_batches[0], *(make_step(job.tiling, vision, other, 9) for other in others)]
    )
    reference = parity.run_reference(job)
    results = workers.run(TRAIN, 2, job)
    assert_first_step_equal(job, results, reference)
    ours = parity.losses(results)
    worst = max(abs(a - b) for a, b in zip(ours, reference["losses"], strict=True))
    assert worst <= parity.CURVE_TOLERANCE, f"losses {ours} and {reference['losses']}"
    moved = parity.merge(job, results, "parameters")["image_newline"] - reference["start"]["image_newline"]
    expected = reference["parameters"]["image_newline"] - reference["start"]["image_newline"]
    assert (moved - expected).norm() / expected.norm() <= parity.DELTA_TOLERANCE


@pytest.mark.parametrize("fault", ["two patches changed places", "a newline is a patch"])
def test_a_seeded_fault_is_noticed(workers, folders, fault):
    """The reference does not read the index, so a wrong one shows."""
    job = make_job(folders)
    index = job.micro_batches[0][0]["image_feature_index"]
    if fault == "two patches changed places":
        index[[20, 21]] = index[[21, 20]]
    else:
        index[index.argmax()] = 20
    with pytest.raises(AssertionError, match="differs"):
        assert_equal(workers, job, 1)


def test_the_newline_is_saved_from_the_first_stage_and_loads_at_any_layout(workers, folders, tmp_path):
    state = "tests.multirank.anyres_worker:newline_state"
    job = make_job(folders, sizes=SIZES[1:2])
    (alone,) = workers.run(state, 1, job, str(tmp_path / "tp1"), "")
    assert torch.equal(alone["start"], job.connector_state["image_newline"])
    results = workers.run(state, 2, replace(job, tensor=2), str(tmp_path / "tp2"), str(tmp_path / "tp1"))
    for rank in results:
        assert torch.equal(rank["loaded"], alone["start"] + 1)
    first, last = workers.run(state, 2, replace(job, pipeline=2), str(tmp_path / "pp2"), str(tmp_path / "tp2"))
    assert torch.equal(first["loaded"], alone["start"] + 1 + 1)
    assert last["loaded"] is None
    assert last["trained"] == {"connector": False, "connector,llm": False, "llm": False}
    assert first["trained"] == {"connector": True, "connector,llm": True, "llm": False}


def test_a_newline_that_is_given_survives_the_next_load_only(workers, folders):
    (got,) = workers.run("tests.multirank.anyres_worker:given_newline", 1, make_job(folders, sizes=SIZES[1:2]))
    assert got == {"key_while_given": False, "kept": True, "the_next_load_counts": True, "missing_is_refused": True}


def test_the_newline_starts_alike_at_every_layout(workers, folders):
    job = replace(make_job(folders, sizes=SIZES[1:2]), connector_state={})
    (alone,) = workers.run("tests.multirank.anyres_worker:start", 1, job)
    width = LanguageConfig.from_folder(folders["llama"]).hidden_size
    assert 0.5 < alone.std() * width**0.5 < 1.5
    for rank in workers.run("tests.multirank.anyres_worker:start", 2, replace(job, tensor=2)):
        assert torch.equal(rank, alone)
