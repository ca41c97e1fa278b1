"""The endless stream of rows of a run: epoch after epoch, the rows of a packed epoch planned once and kept in a file.

Row counts may differ from epoch to epoch, so the row at a position is found through the counts of all epochs before it.
A global batch (a *step*) is the next ``rows_per_step`` rows, across the end of an epoch where need be. The rows of a
packed step are sorted (see ``packing.step_order``), so that at any data-parallel size the ranks that run at the same
time have alike work.
"""

from __future__ import annotations

import json
import math

import numpy as np
import xxhash

from dc_megatron.config import DataConfig
from dc_megatron.data.epoch_order import GROUPER_VERSION, epoch_samples, grouped_by_modality_length
from dc_megatron.data.packing import (
    PACKER_VERSION,
    WINDOW,
    PackingStatistics,
    Rows,
    balanced,
    one_a_row,
    pack,
    statistics,
    step_order,
)
from dc_megatron.data.plan_file import one_at_a_time, plan_path, read_plan, remove_other_plans, write_plan
from dc_megatron.errors import UserError

# Words beside seed and epoch that packing draws from.
_PACKING_DRAWS = 3


class RowPlan:
    """Which samples stand in the row at any position of the stream. For one thread at a time.

    lengths, tiles, sources: int [n] of the index's samples. ``rows_per_step``: rows of a global batch (samples, where
    a row holds one). ``folder``: where the plans of packed epochs are kept, one file each, which processes share; None
    keeps them in memory. UserError where an epoch would have no sample.

    ``identity``: hex digits over everything that the stream depends on.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        tiles: np.ndarray,
        sources: np.ndarray,
        config: DataConfig,
        *,
        rows_per_step: int,
        folder: str | None,
    ):
        assert rows_per_step > 0, f"a step of {rows_per_step} rows"
        self._lengths, self._tiles, self._sources = np.asarray(lengths), np.asarray(tiles), np.asarray(sources)
        self._config, self._rows_per_step, self._folder = config, rows_per_step, folder
        self._packed = config.packing != "none"
        assert not (self._packed and config.group_by_modality_length), "packed rows have no modality to group by"
        # Position of the first row of epoch 0, 1, ... as far as known.
        self._first_rows = [0]
        self._plans: dict[int, Rows] = {}
        self._step: tuple[int, list[np.ndarray]] = (-1, [])
        self._key = self._rows_key()
        self.identity = self._key
        if self._packed:
            self.identity = xxhash.xxh3_128_hexdigest(f"{self._key} {rows_per_step}".encode())
        if not self.rows_of_epoch(0):
            raise UserError(f"--data_path {config.data_path}: no sample is left for an epoch; see the reasons above")

    def __getitem__(self, position: int) -> np.ndarray:
        """int64: numbers of the samples in the row at ``position`` >= 0."""
        if not self._packed:
            return self._row(position)
        step, place = divmod(position, self._rows_per_step)
        if step != self._step[0]:
            self._step = (step, self._sorted_step(step))
        return self._step[1][place]

    def rows_of_epoch(self, epoch: int) -> int:
        """Rows that ``epoch`` has; packed, it may differ a little from epoch to epoch."""
        self._count_rows_to(epoch)
        return self._first_rows[epoch + 1] - self._first_rows[epoch]

    def rows_of_epochs(self, epochs: float) -> int:
        """Rows of the first ``epochs`` epochs, those of a fraction rounded up. Plans all of them."""
        whole = math.floor(epochs)
        rows = sum(self.rows_of_epoch(epoch) for epoch in range(whole))
        return rows + (math.ceil((epochs - whole) * self.rows_of_epoch(whole)) if epochs > whole else 0)

    def statistics(self, data_parallel_sizes: tuple[int, ...] = (2, 8, 64)) -> PackingStatistics:
        """Figures of epoch 0, its rows as the loader takes them."""
        rows = self._rows_of_epoch(0)
        if self._packed:
            rows = balanced(rows, self._lengths, self._tiles, self._rows_per_step)
        return statistics(
            rows, self._lengths, self._tiles, self._config.seq_length, self._rows_per_step, data_parallel_sizes
        )

    def _sorted_step(self, step: int) -> list[np.ndarray]:
        first = step * self._rows_per_step
        rows = [self._row(first + place) for place in range(self._rows_per_step)]
        tiles = np.array([self._tiles[row].sum(dtype=np.int64) for row in rows])
        attention = np.array([(self._lengths[row].astype(np.int64) ** 2).sum() for row in rows])
        return [rows[place] for place in step_order(tiles, attention)]

    def _row(self, position: int) -> np.ndarray:
        """The row at ``position`` as planned, before its step is sorted."""
        while position >= self._first_rows[-1]:
            self._count_rows_to(len(self._first_rows) - 1)
        epoch = int(np.searchsorted(self._first_rows, position, side="right")) - 1
        return self._rows_of_epoch(epoch)[position - self._first_rows[epoch]]

    def _count_rows_to(self, epoch: int) -> None:
        while len(self._first_rows) <= epoch + 1:
            # One sample a row: every epoch has as many.
            counted = len(self._first_rows) - 1 if self._packed else 0
            self._first_rows.append(self._first_rows[-1] + len(self._rows_of_epoch(counted)))

    def _rows_of_epoch(self, epoch: int) -> Rows:
        if epoch not in self._plans:
            # Two, because the step at the end of an epoch needs the next one.
            while len(self._plans) >= 2:
                self._plans.pop(next(iter(self._plans)))
            self._plans[epoch] = self._stored(epoch) if self._packed and self._folder else self._made(epoch)
        return self._plans[epoch]

    def _stored(self, epoch: int) -> Rows:
        path = plan_path(self._folder, self._key, epoch)
        with one_at_a_time(self._folder):
            rows = read_plan(path)
            if rows is None:
                rows = self._made(epoch)
                write_plan(path, rows)
                remove_other_plans(self._folder, self._key)
        return rows

    def _made(self, epoch: int) -> Rows:
        config = self._config
        weights = [source.weight for source in config.sources]
        order = epoch_samples(self._sources, weights, config.seed, epoch, config.order)
        if self._packed:
            seed = None if config.order == "sequential" else (config.seed, epoch, _PACKING_DRAWS)
            return pack(order, self._lengths, self._tiles, config.seq_length, seed=seed)
        if config.group_by_modality_length:
            order = grouped_by_modality_length(
                order, self._lengths, self._tiles, self._rows_per_step, config.seed, epoch
            )
        return one_a_row(order)

    def _rows_key(self) -> str:
        """Hex digits over all that the rows of an epoch depend on."""
        config = self._config
        grouped = config.group_by_modality_length
        settings = {
            "weights": [float(source.weight) for source in config.sources],
            "seed": config.seed,
            "order": config.order,
            "packing": config.packing,
            "packer": [PACKER_VERSION, WINDOW, config.seq_length] if self._packed else [],
            "grouped": [GROUPER_VERSION, self._rows_per_step] if grouped else [],
        }
        digest = xxhash.xxh3_128(json.dumps(settings, sort_keys=True).encode())
        for array in (self._lengths, self._tiles, self._sources):
            digest.update(np.ascontiguousarray(array, dtype="<i8"))
        return digest.hexdigest()
