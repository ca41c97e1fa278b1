"""What one micro-batch reports: the loss that is minimised."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dc_megatron.runtime import device
from dc_megatron.training.forward_step import LOSS_NAME, make_forward_step


class Model(torch.nn.Module):
    """Says the losses that lie in the batch."""

    config = SimpleNamespace(fp8="hybrid")

    def forward(self, batch):
        assert (self.config.fp8 is None) is not self.training, "FP8 in training alone"
        return batch["losses"]


def run(loss_reduction: str, batches: list[list[float]], pixels=(), training: bool = True) -> tuple[list, list]:
    """(what the loss functions return, counts that were told) for micro-batches with these losses."""
    told, told_of_validation = [], []
    forward_step = make_forward_step(
        torch.device("cpu"), loss_reduction, told.append, on_validation_batch=told_of_validation.append
    )
    iterator = iter(
        {
            "losses": torch.tensor(losses),
            "labels": torch.zeros(1, len(losses), dtype=torch.int64),
            "image_mask": torch.zeros(1, len(losses), dtype=torch.bool),
            "pixel_values": pixels,
            "counts": {"images": len(losses)},
        }
        for losses in batches
    )
    results = []
    for _ in batches:
        output, loss_function = forward_step(iterator, Model().train(training))
        results.append(loss_function(output))
    assert not (told_of_validation if training else told), "counted in the wrong place"
    return results, told if training else told_of_validation


def reported(results: list) -> float:
    """As the engine adds up the reports of micro-batches and ranks."""
    total = torch.stack([result[-1][LOSS_NAME] for result in results]).sum(dim=0)
    return float(total[0] / total[1])


def test_token_reduction_reports_the_mean_over_all_targets():
    results, _ = run("token", [[1.0, 2.0, 3.0], [6.0]])
    assert [(float(loss), int(count)) for loss, count, _ in results] == [(6.0, 3), (6.0, 1)]
    assert reported(results) == 3.0


def test_microbatch_reduction_reports_the_mean_of_means():
    results, _ = run("microbatch", [[1.0, 2.0, 3.0], [6.0]])
    assert [float(loss) for loss, _ in results] == [2.0, 6.0]
    assert reported(results) == 4.0


@pytest.mark.parametrize("loss_reduction", ["token", "microbatch"])
def test_a_micro_batch_without_targets_has_a_finite_loss(loss_reduction):
    results, _ = run(loss_reduction, [[]])
    assert float(results[0][0]) == 0.0


@pytest.mark.parametrize("loss_reduction", ["token", "microbatch"])
def test_validation_is_the_mean_over_all_targets(loss_reduction):
    """Also where training takes the mean of means, and where the last batch is filled up with empty rows."""
    results, told = run(loss_reduction, [[1.0, 2.0, 3.0], [6.0], []], training=False)
    assert reported(results) == 3.0
    assert told == [{"images": 3}, {"images": 1}, {"images": 0}]
    assert Model.config.fp8 == "hybrid"


def test_only_ranks_that_see_pixels_count():
    assert run("token", [[1.0]])[1] == [{"images": 1}]
    assert run("token", [[1.0]], pixels=None)[1] == []


def test_every_rank_chooses_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    device.choose_gpu(3)
    assert chosen == [3]
