"""Rows divided over context-parallel ranks train as they do whole: losses and gradients against one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dc_megatron.config import ConnectorConfig, LanguageConfig, LoraConfig, VisionConfig, image_tiling
from dc_megatron.data.tokenization import IGNORE
from dc_megatron.weights.lora_table import adapter_shapes
from tests.multirank import parity
from tests.multirank.test_packing_parity import SEQUENCE, job, make_batch, make_rows, make_sample  # noqa: F401
from tests.multirank.test_parity import TRAIN

LAYOUTS = {
    "CP2": (2, {"context": 2}),
    "CP2xTP2+SP": (4, {"context": 2, "tensor": 2, "sequence_parallel": True}),
    "CP2xPP2": (4, {"context": 2, "pipeline": 2}),
    "CP2xPP2, virtual stages": (4, {"context": 2, "pipeline": 2, "virtual": 2}),
    "CP2xDP2+distributed-optimizer": (4, {"context": 2, "distributed_optimizer": True}),
    "CP4": (4, {"context": 4}),
}
LONG = pytest.mark.long


def rows_of(tiling, which=(0, 1, 2)) -> list[dict]:
    """Micro-batches of one row of 96 positions: pieces of 24 begin inside samples, one of them inside a picture."""
    rows = make_rows(tiling)
    return [make_batch(tiling, [rows[number]], SEQUENCE) for number in which]


def first_step(workers, job, world: int, batches: list[dict], **settings):  # noqa: F811
    """(loss, whole gradients by Hugging Face name) of one step over ``batches``."""
    job = replace(job, micro_batches=[batches], **settings)
    results = workers.run(TRAIN, world, job)
    return parity.losses(results)[0], parity.merge(job, results, "gradients")


def assert_alike(workers, job, batches: list[dict], layout: str = "CP2", **settings) -> None:  # noqa: F811
    """Within the tolerances of the other layouts, for the same reason: sums of the same terms in another order."""
    world, divided = LAYOUTS[layout]
    loss, gradients = first_step(workers, job, world, batches, **divided, **settings)
    expected, expected_gradients = first_step(workers, job, 1, batches, **settings)
    assert abs(loss - expected) <= parity.LOSS_TOLERANCE
    # A bias of the tower's keys moves all of a query's scores alike, which softmax does not see: its gradient is noise.
    counted = {name: g for name, g in expected_gradients.items() if not name.endswith("self_attn.k_proj.bias")}
    assert len(counted) > 0
    worst, name = parity.worst_difference(gradients, counted)
    assert worst <= parity.GRADIENT_TOLERANCE, f"gradient of {name} differs by {worst:.2e}"


@pytest.mark.parametrize("layout", ["CP2", *(pytest.param(one, marks=LONG) for one in list(LAYOUTS)[1:])])
def test_divided_rows_train_as_whole_ones(workers, job, layout):  # noqa: F811
    # Two data-parallel ranks, and virtual stages, want an even number.
    even = "DP2" in layout or "virtual" in layout
    assert_alike(workers, job, rows_of(job.tiling, (0, 2) if even else (0, 1, 2)), layout)


def test_a_mean_over_each_micro_batch(workers, job):  # noqa: F811
    assert_alike(workers, job, rows_of(job.tiling), loss_reduction="microbatch")


def test_a_rank_without_a_picture(workers, job):  # noqa: F811
    """Where the connector alone learns, and an overlapped reduction waits for all of its parameters on every rank."""
    samples = [make_sample(job.tiling, *sample, seed=7 + number) for number, sample in enumerate([(0, 30), (1, 20)])]
    batch = make_batch(job.tiling, [samples], SEQUENCE)
    assert not batch["image_mask"][:, :24].any()
    assert not batch["image_mask"][:, 72:].any(), "rank 0 has the first and the last quarter"
    text = rows_of(job.tiling, (1,))
    for trainable in ("connector", "connector,llm"):
        assert_alike(workers, job, [batch, *text], trainable=trainable, overlap_grad_reduce=True)


@pytest.mark.long
@pytest.mark.parametrize(("connector", "layout"), [("sti", "CP2"), ("sci", "CP2"), ("sci", "CP2xTP2+SP")])
def test_other_connectors_and_a_tower_that_learns(workers, job, connector, layout):  # noqa: F811
    vision, settings = VisionConfig.from_folder(job.vision_folder), ConnectorConfig(connector)
    width = LanguageConfig.from_folder(job.language_folder).hidden_size
    other = replace(
        job,
        connector_type=connector,
        connector_state=parity.connector_state(vision, settings, width),
        tiling=image_tiling(vision, settings),
        trainable="connector,llm,vision_tower",
    )
    batch = make_batch(other.tiling, [make_rows(other.tiling)[0][::2]], 128)
    assert batch["num_images"] == 3, "ranks have different numbers"
    assert_alike(workers, other, [batch], layout)


@pytest.mark.long
def test_recomputed_layers(workers, job):  # noqa: F811
    assert_alike(workers, job, rows_of(job.tiling), recompute="full")


@pytest.mark.long
def test_adapters(workers, job):  # noqa: F811
    language = LanguageConfig.from_folder(job.language_folder)
    lora = LoraConfig(r=4, alpha=8)
    generator = torch.Generator().manual_seed(3)
    state = {
        name: torch.randn(*shape, generator=generator) * 0.1 for name, shape in adapter_shapes(language, 4).items()
    }
    assert_alike(workers, job, rows_of(job.tiling), trainable="connector,lora", lora=lora, lora_state=state)


@pytest.mark.parametrize("kept", [slice(24, 72), slice(0, 24)], ids=["none on rank 0", "none on rank 1"])
def test_a_rank_without_a_target(workers, job, kept):  # noqa: F811
    """Rank 0 has the first and the last quarter of a row."""
    (batch,) = rows_of(job.tiling, (2,))
    labels = torch.full_like(batch["labels"], IGNORE)
    labels[:, kept] = batch["input_ids"][:, kept]
    assert_alike(workers, job, [{**batch, "labels": labels}])
