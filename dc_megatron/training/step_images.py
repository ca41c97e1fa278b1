"""Micro-batches whose images are encoded before the schedule of their step begins: ``--vision-tower-stages all``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from dc_megatron.data.loader import MicroBatches
from dc_megatron.model.dealt_images import check_dealt, dealing_place, encode_dealt
from dc_megatron.model.multimodal_model import DenseConnectorModel


class StepImages:
    """Iterator over ``batches`` (dealt out: MicroBatches(deal_images=True)) for the first chunk of a pipeline stage.

    ``encode`` must be called before the micro-batches of a step are taken, on all ranks: a schedule of pipeline stages
    does not ask them for batches at one time. Batches come with ``joined_features`` on the first stage, and without
    pixels. ``on_batch`` is told the counts of every micro-batch.
    """

    def __init__(self, batches: MicroBatches, device: torch.device, on_batch: Callable[[dict], None]):
        self._batches, self._device, self._on_batch = batches, device, on_batch
        self._ready: deque[dict] = deque()
        self._dealt = 0

    def __iter__(self) -> StepImages:
        return self

    def __next__(self) -> dict:
        assert self._ready, "the schedule asks for more micro-batches than were encoded for this step"
        return self._ready.popleft()

    def encode(self, model: DenseConnectorModel, micro_batches: int) -> None:
        """Take the next ``micro_batches`` of the stream and encode their images, together with the other ranks."""
        taken = [next(self._batches) for _ in range(micro_batches)]
        counts = [batch["num_images"] for batch in taken]
        weight = next(model.vision_tower.parameters())
        # One by one: a copy of all in float32 would be the largest tensor of the step.
        pixels = torch.cat(
            [batch["pixel_values"].to(self._device, non_blocking=True).to(weight.dtype) for batch in taken]
        )
        check_dealt(pixels, self._dealt, sum(counts), *dealing_place(model.pg_collection))
        joined = encode_dealt(model, pixels, self._dealt, sum(counts))
        self._dealt += sum(counts)
        parts = [None] * len(taken) if joined is None else joined.split(counts)
        for batch, part in zip(taken, parts, strict=True):
            self._on_batch(batch["counts"])
            self._ready.append({**batch, "pixel_values": None, "joined_features": part})
