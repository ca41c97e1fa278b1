"""One optimizer step of the baseline: the original's recipe in plain transformers."""

from __future__ import annotations

import torch

from dc_megatron.benchmark.random_weights import fill_randomly
from dc_megatron.benchmark.section_timer import SectionTimer
from dc_megatron.benchmark.step_variants import Variant
from dc_megatron.benchmark.step_workload import Workload
from dc_megatron.reference.padded import PaddedModel, PaddedTraining
from dc_megatron.runtime import device


class ReferenceStep:
    """As MegatronStep, in plain transformers."""

    share = (0, 1)

    def __init__(self, workload: Workload, variant: Variant):
        self.device = device.device()
        self.timer = SectionTimer(device.has_cuda())
        self.trainable = variant.trainable or workload.trainable
        model = PaddedModel(
            workload.language,
            workload.vision,
            workload.connector_config,
            self.device,
            getattr(torch, workload.dtype),
            gradient_checkpointing=variant.recompute,
        )
        fill_randomly(model.language_model)
        fill_randomly(model.vision_tower, "vision_tower.")
        fill_randomly(model.connector, "connector.")
        model.vision_tower.forward = self.timer.timed("tower", model.vision_tower.forward)
        self._training = PaddedTraining(model, self.trainable, workload.learning_rate)

    def run(self, batches: list[dict]) -> dict:
        """As ``MegatronStep.run``."""
        loss = self._training.step(batches, self._move)
        if device.has_cuda():
            torch.cuda.synchronize()
        return {"loss": loss, "sections": self.timer.take()}

    def _move(self, batch: dict) -> dict:
        moved = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        return {**batch, **{name: value.to(self.device, non_blocking=True) for name, value in moved.items()}}
