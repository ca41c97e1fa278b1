"""What a rank does for the tests of the last layer: one pass, and how many positions each layer worked on."""

from __future__ import annotations

from dc_megatron.runtime import parallel
from dc_megatron.training.forward_step import with_places
from tests.multirank.job import Job
from tests.multirank.parity_worker import build, share_pixels


def positions_of_layers(job: Job) -> dict:
    """``fc1``: rows that enter each layer's first MLP product; ``losses``: how many; ``finite``: all gradients."""
    from megatron.core import parallel_state

    parallel.start(job.tensor)
    _, (model,) = build(job)
    rows: list[int] = []
    for layer in model.language_model.decoder.layers:
        layer.mlp.linear_fc1.register_forward_pre_hook(lambda linear, given: rows.append(given[0].shape[0]))
    batch = share_pixels(job.micro_batches[0][0], parallel_state.get_tensor_model_parallel_rank(), job.tensor)
    losses = model(with_places(batch))
    losses.sum().backward()
    gradients = [p.grad for p in model.language_model.parameters() if p.grad is not None]
    return {
        "fc1": rows,
        "losses": losses.numel(),
        "with_gradient": len(gradients),
        "finite": all(bool(g.isfinite().all()) for g in gradients),
        "zero": all(not g.any() for g in gradients),
    }
