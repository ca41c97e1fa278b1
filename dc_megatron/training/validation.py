"""The held-out records of --eval_data_path, and which of their rows an evaluation takes.

Every evaluation takes the same rows, each once: the last global batch is filled up with empty rows, which have no
target. So its loss is the mean over all supervised tokens, whatever the batch and the layout.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import numpy as np

from dc_megatron.config import DataConfig
from dc_megatron.data.index import SampleIndex
from dc_megatron.data.index_waiting import build_or_wait
from dc_megatron.data.row_plan import RowPlan
from dc_megatron.errors import UserError
from dc_megatron.training.run import Checked


class ValidationRows:
    """Samples of the row at a position: ``iterations`` batches of ``batch`` rows, then the same again.

    rows: of which epoch 0 is taken. limit: the most batches; None: all that there are.
    """

    def __init__(self, rows: RowPlan, batch: int, limit: int | None):
        self._rows, self._count = rows, rows.rows_of_epoch(0)
        batches = math.ceil(self._count / batch)
        self.iterations = batches if limit is None else min(limit, batches)
        self._cycle = self.iterations * batch

    def __getitem__(self, position: int) -> np.ndarray:
        """int64: numbers of the samples in the row; none beyond the last one."""
        place = position % self._cycle
        return self._rows[place] if place < self._count else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Validation:
    """The opened validation data; see ``data_plan.Data`` for what the fields are."""

    config: DataConfig
    index: SampleIndex
    rows: ValidationRows
    plan_hash: str
    folder: str


def open_validation(
    checked: Checked, training: DataConfig, folder: str, local_rank: int, global_batch_size: int
) -> Validation | None:
    """None where nothing is evaluated. Local rank 0 builds the index below ``folder``, others wait.

    training: its settings hold here too, but for the order, which is the file's.
    """
    if not checked.validation_sources:
        return None
    config = replace(training, sources=checked.validation_sources, order="sequential", group_by_modality_length=False)
    folder = os.path.join(folder, "validation")
    try:
        index = build_or_wait(config, folder, local_rank)
        # Rows one by one: a step of several would be sorted, and filled from the next epoch.
        rows = RowPlan(index.lengths, index.tiles, index.sources, config, rows_per_step=1, folder=None)
    except UserError as error:
        raise UserError(f"--eval_data_path: {error}") from None
    chosen = ValidationRows(rows, global_batch_size, checked.settings.eval_iters)
    return Validation(config, index, chosen, f"{index.summary.key} {rows.identity}", folder)
