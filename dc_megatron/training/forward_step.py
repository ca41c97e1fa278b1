"""One micro-batch through the model, and its loss as the schedule wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.utils import StragglerDetector, get_model_config
from torch import Tensor

from dc_megatron.model.loss_head import IGNORED
from dc_megatron.model.row_pieces import RowPieces, take_pieces
from dc_megatron.training.fp8_band import Fp8Band, casts_untouched, without_fp8

LOSS_NAME = "lm loss"


def with_places(batch: dict) -> dict:
    """The batch and where in its flattened rows images and targets stand, found where the batch lies.

    Done on the host: on a GPU the host would wait for the count.
    """
    return {
        **batch,
        "image_places": batch["image_mask"].flatten().nonzero().squeeze(-1),
        "target_places": (batch["labels"].flatten() != IGNORED).nonzero().squeeze(-1),
    }


def context_place() -> tuple[int, int]:
    """(this rank's number, number of ranks) in its context-parallel group; of one where there are no groups."""
    if not parallel_state.model_parallel_is_initialized():
        return 0, 1
    return parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()


def to_device(batch: dict, device: torch.device) -> dict:
    """The tensors of a batch on ``device``. ``cu_seqlens`` follows only to a GPU: kernels read it there."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor | RowPieces) else value
        for name, value in batch.items()
    }


def make_forward_step(
    device: torch.device,
    loss_reduction: str = "token",
    on_batch: Callable[[dict], None] | None = None,
    band: Fp8Band | None = None,
    on_validation_batch: Callable[[dict], None] | None = None,
) -> Callable:
    """``forward_step(data_iterator, model)`` for megatron-core's schedules.

    loss_reduction "token" needs ``calculate_per_token_loss`` in the model's config: the schedule divides gradients by
    the supervised tokens of the whole global batch. "microbatch" takes the mean of each micro-batch, as the original.
    ``on_batch`` is told the counts of every micro-batch on the ranks that see its pixels: the first pipeline stage.
    Under context parallelism every rank of a group gets the same batch, computes its pieces of the row, and its losses
    are a part of the row's.
    ``band`` compares FP8 with bf16 now and then.

    A model in evaluation mode is asked about validation rows: ``on_validation_batch`` is told their counts, the loss is
    the mean over tokens whatever ``loss_reduction``, and layers in FP8 compute in bf16, so that what training keeps
    between its steps (scales, casts) is left alone.
    """
    # Does nothing without --log-straggler, and where there is no CUDA.
    stragglers = StragglerDetector()

    def forward_step(data_iterator: Iterator[dict], model) -> tuple[Tensor, Callable]:
        with stragglers(bdata=True):
            batch = next(data_iterator)
        validates = not model.training
        told = on_validation_batch if validates else on_batch
        if told is not None and batch["pixel_values"] is not None:
            told(batch["counts"])
        targets, (rank, ranks) = int((batch["labels"] != IGNORED).sum()), context_place()
        if ranks > 1:
            batch = take_pieces(batch, rank, ranks)
        batch = to_device(with_places(batch), device)
        if validates:
            with without_fp8(get_model_config(model)), casts_untouched(model):
                return model(batch), _token_loss
        in_bf16 = band.loss_in_bf16(model, get_model_config(model), batch) if band is not None else None
        with stragglers:
            losses = model(batch)
        if in_bf16 is not None:
            band.compare(in_bf16, losses)
        if loss_reduction == "microbatch":
            return losses, partial(_microbatch_loss, targets=targets, ranks=ranks)
        return losses, _token_loss

    return forward_step


def _report(losses: Tensor) -> dict:
    """Sum and count: the engine adds both up over micro-batches and data-parallel ranks before it divides."""
    return {LOSS_NAME: torch.stack([losses.detach().sum(), losses.new_full((), losses.numel())])}


def _token_loss(losses: Tensor) -> tuple[Tensor, Tensor, dict]:
    # Filled on the device: a copy from the host would wait for all that is queued there.
    count = torch.full((), losses.numel(), dtype=torch.int, device=losses.device)
    return losses.sum(), count, _report(losses)


def _microbatch_loss(losses: Tensor, targets: int, ranks: int) -> tuple[Tensor, dict]:
    """This rank's part of the mean over the micro-batch's ``targets``, which lie on ``ranks`` ranks.

    The parts are added up: the schedule multiplies them by the number of ranks, over which gradients are averaged.
    """
    part = losses.sum() / max(targets, 1)
    # What is reported is what is minimised: the mean over micro-batches of their means.
    return part, {LOSS_NAME: torch.stack([part.detach(), part.new_full((), 1 / ranks)])}
