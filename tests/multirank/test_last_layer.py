"""The last layer works where there is a target only; that this changes nothing, test_packing_parity says."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dc_megatron.data.tokenization import IGNORE
from tests.multirank import parity
from tests.multirank.test_packing_parity import SEQUENCE, first_step, job, make_batch, make_rows  # noqa: F401

WORKER = "tests.multirank.last_layer_worker:positions_of_layers"


def first_batch(job) -> dict:  # noqa: F811
    return make_batch(job.tiling, [make_rows(job.tiling)[0]], SEQUENCE)


@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_only_the_last_layer_works_on_fewer_positions(workers, job, ranks, sequence_parallel):  # noqa: F811
    batch = first_batch(job)
    targets = int((batch["labels"] != IGNORE).sum())
    layout = replace(job, micro_batches=[[batch]], tensor=ranks, sequence_parallel=sequence_parallel)
    share = ranks if sequence_parallel else 1
    for got in workers.run(WORKER, ranks, layout):
        *below, last = got["fc1"]
        assert below == [SEQUENCE // share] * 3
        assert last == -(-targets // share)
        assert got["losses"] == targets < SEQUENCE / 2


def test_a_row_without_targets_has_no_loss_and_gradients_of_zero(workers, job):  # noqa: F811
    batch = first_batch(job)
    batch["labels"] = torch.full_like(batch["labels"], IGNORE)
    (got,) = workers.run(WORKER, 1, replace(job, micro_batches=[[batch]]))
    assert got["losses"] == 0
    assert got["fc1"][-1] == 1
    assert got["with_gradient"] > 0
    assert got["finite"]
    assert got["zero"]


def test_a_pass_that_is_computed_again_finds_its_own_positions(workers, job):  # noqa: F811
    """Two micro-batches with other targets each, of which the second runs before the first comes back."""
    rows = make_rows(job.tiling)
    batches = [make_batch(job.tiling, [row], SEQUENCE) for row in rows[:2]]
    once = first_step(workers, job, "PP2", batches)
    again = first_step(workers, replace(job, recompute="full"), "PP2", batches)
    assert again[0] == pytest.approx(once[0], rel=parity.LOSS_TOLERANCE)
    worst, name = parity.worst_difference(again[1], once[1])
    assert worst <= parity.GRADIENT_TOLERANCE, name


@pytest.mark.parametrize(
    ("places", "tensor", "sequence_parallel", "fp8", "expected"),
    [
        (5, 1, False, None, 5),
        (5, 4, False, None, 5),
        (5, 4, True, None, 8),
        (0, 2, True, None, 2),
        (0, 1, False, None, 1),
        (17, 1, False, "hybrid", 32),
        (17, 2, True, "hybrid", 32),
        (33, 2, True, "hybrid", 64),
    ],
)
def test_rows_are_filled_up_for_ranks_and_for_fp8(places, tensor, sequence_parallel, fp8, expected):
    from dc_megatron.model.last_layer import wanted_rows

    config = SimpleNamespace(tensor_model_parallel_size=tensor, sequence_parallel=sequence_parallel, fp8=fp8)
    wanted = torch.arange(1, places + 1)
    rows = wanted_rows(wanted, config)
    assert rows.shape == (expected,)
    assert torch.equal(rows[:places], wanted)
    assert not rows[places:].any()
