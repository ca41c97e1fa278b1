"""The endless stream of rows of a run: epoch after epoch, each epoch's plan made once and kept in a file."""

from __future__ import annotations

import json
import math

import numpy as np
import xxhash

from dc_megatron.config import DataConfig
from dc_megatron.data.epoch_order import epoch_samples, grouped_by_modality_length
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


class RowPlan:
    """Which samples stand in the row at any position of the stream.

    lengths, tiles, sources: int [n] of the index's samples. ``rows_per_step``: rows of a global batch (samples, where
    a row holds one). ``folder``: where plans are kept; None keeps them in memory.

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
        self._lengths, self._tiles, self._sources = np.asarray(lengths), np.asarray(tiles), np.asarray(sources)
        self._config, self._rows_per_step, self._folder = config, rows_per_step, folder
        self._packed = config.packing == "best-fit"
        self._first_rows = [0]
        self._plans: dict[int, Rows] = {}
        self._step: tuple[int, list[np.ndarray]] = (-1, [])
        self.identity = self._identity()

    def __getitem__(self, position: int) -> np.ndarray:
        """int64: numbers of the samples in the row at ``position`` >= 0."""
        if not self._packed:
            return self._row(position)
        step, place = divmod(position, self._rows_per_step)
        if step != self._step[0]:
            self._step = (step, self._rows_of_step(step))
        return self._step[1][place]

    def rows_of_epoch(self, epoch: int) -> int:
        """Rows that ``epoch`` has; it may differ a little from epoch to epoch."""
        self._reach(epoch)
        return self._first_rows[epoch + 1] - self._first_rows[epoch]

    def rows_of_epochs(self, epochs: float) -> int:
        """Rows of the first ``epochs`` epochs, those of a fraction rounded up."""
        whole = math.floor(epochs)
        rows = sum(self.rows_of_epoch(epoch) for epoch in range(whole))
        return rows + (math.ceil((epochs - whole) * self.rows_of_epoch(whole)) if epochs > whole else 0)

    def statistics(self, data_parallel_sizes: tuple[int, ...] = (2, 8, 64)) -> PackingStatistics:
        """Figures of epoch 0, its rows as the loader takes them."""
        rows = self._plan(0)
        if self._packed:
            rows = balanced(rows, self._lengths, self._tiles, self._rows_per_step)
        return statistics(
            rows, self._lengths, self._tiles, self._config.seq_length, self._rows_per_step, data_parallel_sizes
        )

    def _rows_of_step(self, step: int) -> list[np.ndarray]:
        first = step * self._rows_per_step
        rows = [self._row(first + place) for place in range(self._rows_per_step)]
        tiles = np.array([self._tiles[row].sum(dtype=np.int64) for row in rows])
        attention = np.array([(self._lengths[row].astype(np.int64) ** 2).sum() for row in rows])
        return [rows[place] for place in step_order(tiles, attention)]

    def _row(self, position: int) -> np.ndarray:
        """The row at ``position`` before steps are balanced."""
        while position >= self._first_rows[-1]:
            self._reach(len(self._first_rows) - 1)
        epoch = int(np.searchsorted(self._first_rows, position, side="right")) - 1
        return self._plan(epoch)[position - self._first_rows[epoch]]

    def _reach(self, epoch: int) -> None:
        """Know where every epoch up to ``epoch`` ends."""
        while len(self._first_rows) <= epoch + 1:
            self._first_rows.append(self._first_rows[-1] + len(self._plan(len(self._first_rows) - 1)))

    def _plan(self, epoch: int) -> Rows:
        if epoch not in self._plans:
            # A step straddles two epochs at most while steps are shorter than epochs.
            while len(self._plans) > 1:
                self._plans.pop(next(iter(self._plans)))
            self._plans[epoch] = self._make(epoch)
        return self._plans[epoch]

    def _make(self, epoch: int) -> Rows:
        config = self._config
        weights = [source.weight for source in config.sources]
        order = epoch_samples(self._sources, weights, config.seed, epoch, config.order)
        if self._packed:
            seed = None if config.order == "sequential" else (config.seed, epoch, 0)
            return pack(order, self._lengths, self._tiles, config.seq_length, seed=seed)
        if config.group_by_modality_length:
            order = grouped_by_modality_length(
                order, self._lengths, self._tiles, self._rows_per_step, config.seed, epoch
            )
        return one_a_row(order)

    def _identity(self) -> str:
        config = self._config
        digest = xxhash.xxh3_128()
        for array in (self._lengths, self._tiles, self._sources):
            digest.update(np.ascontiguousarray(array, dtype="<i8").data)
        grouped = config.group_by_modality_length and not self._packed
        settings = {
            "weights": [source.weight for source in config.sources],
            "seed": config.seed,
            "order": config.order,
            "packing": config.packing,
            "grouped": grouped,
            "seq_length": config.seq_length if self._packed else 0,
            "rows_per_step": self._rows_per_step if self._packed or grouped else 0,
            "packer": [PACKER_VERSION, WINDOW] if self._packed else [],
        }
        digest.update(json.dumps(settings, sort_keys=True).encode())
        return digest.hexdigest()
