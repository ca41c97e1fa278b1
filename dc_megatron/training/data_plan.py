"""The data of a run before Megatron starts: its index, the rows that samples stand in, and the steps that follow."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from dc_megatron.config import DataConfig
from dc_megatron.data.index import SampleIndex
from dc_megatron.data.row_plan import RowPlan
from dc_megatron.errors import UserError
from dc_megatron.training.arguments import StepPlan, plan_steps, row_length
from dc_megatron.training.resume import Start, refuse_another_batch
from dc_megatron.training.run import Checked
from dc_megatron.training.settings import RunSettings


def data_config(checked: Checked) -> DataConfig:
    """The data room's settings; rows are as long as the engine's sequences."""
    settings = checked.settings
    return DataConfig(
        sources=checked.sources,
        tokenizer_path=settings.model_name_or_path,
        version=settings.version,
        image_aspect_ratio=settings.image_aspect_ratio,
        model_max_length=settings.model_max_length,
        seq_length=row_length(settings, []),
        tiling=checked.tiling,
        packing=settings.packing,
        group_by_modality_length=settings.group_by_modality_length,
        order=settings.data_order,
        seed=settings.seed,
        image_backend=settings.image_backend,
        image_decode_device=settings.image_decode_device,
        max_bad_sample_rate=settings.max_bad_sample_rate,
        video_frames=settings.video_frames,
        vocab_size=checked.language.vocab_size,
    )


@dataclass(frozen=True)
class Data:
    """The opened data of a run: samples, the rows they stand in, and the steps that follow from them."""

    config: DataConfig
    index: SampleIndex
    rows: RowPlan
    steps: StepPlan
    plan_hash: str
    # Where index and plans lie, and lists of what is in tar shards.
    folder: str


def open_data(checked: Checked, config: DataConfig, index: SampleIndex, folder: str, world_size: int) -> Data:
    """Plan rows and steps. UserError where a resumed run would continue in other rows than it was trained with."""
    settings = checked.settings
    mean_length = _mean_length(index, config)
    batch = plan_steps(settings, 1, world_size, mean_length).global_batch_size
    refuse_another_batch(checked.start, batch)
    rows = RowPlan(index.lengths, index.tiles, index.sources, config, rows_per_step=batch, folder=folder)
    plan = plan_hash(index.summary.key, rows.identity)
    refuse_changed_plan(checked.start, plan, settings)
    count = rows.rows_of_epochs(settings.num_train_epochs) if settings.max_steps is None else None
    return Data(config, index, rows, plan_steps(settings, count, world_size, mean_length), plan, folder)


def _mean_length(index: SampleIndex, config: DataConfig) -> float:
    """Positions of a sample of an epoch, on average."""
    weights = np.array([source.weight for source in config.sources])[index.sources]
    return float(np.average(index.lengths, weights=weights))


def plan_hash(index_key: str, row_identity: str) -> str:
    """What the rows and their order depend on, shortened: a resumed run must have the same.

    row_identity: the row plan's, over the samples that were kept. A picture that came or went moves all samples behind
    it, under the same key.
    """
    return hashlib.sha256(f"{index_key} {row_identity}".encode()).hexdigest()[:32]


def refuse_changed_plan(start: Start, current: str, settings: RunSettings) -> None:
    if start.resumes and start.plan_hash not in (None, current):
        raise UserError(
            f"--data_path {' '.join(settings.data_path)}: data, weights, pictures found, tokenizer, template, seed,"
            " packing or lengths (or how this program reads them) are not those the checkpoint was trained with, so its"
            " position in the data means nothing here; use the same, or take only its weights: --load DIR --finetune"
            " with another --output_dir"
        )
