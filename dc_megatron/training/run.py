"""Everything a run knows before Megatron starts: checked settings, shapes, the data index and the engine's flags."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass

from dc_megatron.config import (
    ConnectorConfig,
    DataConfig,
    LanguageConfig,
    VisionConfig,
    check_parallel_layout,
    image_tokens,
    layer_table,
)
from dc_megatron.errors import UserError
from dc_megatron.training.arguments import plan_steps
from dc_megatron.training.argv import REQUIRED_FOR_TRAINING, Translation, translate
from dc_megatron.training.resume import Start, choose_start, refuse_another_batch, refuse_another_model
from dc_megatron.training.settings import RunSettings


@dataclass(frozen=True)
class Checked:
    """A command line that agrees with the files it names."""

    translation: Translation
    language: LanguageConfig
    vision: VisionConfig
    connector: ConnectorConfig
    start: Start

    @property
    def settings(self) -> RunSettings:
        return self.translation.settings

    @property
    def names_connector_type(self) -> bool:
        """Whether the user typed the connector's type, which a projector file without metadata needs."""
        return "mm_dense_connector_type" in self.settings.given


def check(argv: list[str], world_size: int) -> Checked:
    """Read ``argv`` and the small files it names. Takes a tenth of a second: no torch, no weights, no data.

    Raises UserError for everything that can be known to be wrong by now.
    """
    translation = translate(argv, required=REQUIRED_FOR_TRAINING)
    settings = translation.settings
    language = LanguageConfig.from_folder(settings.model_name_or_path)
    vision = VisionConfig.from_folder(settings.vision_tower)
    connector = ConnectorConfig(
        settings.mm_dense_connector_type, settings.mm_projector_type, settings.mm_vision_select_layer
    )
    layer_table(vision, connector)
    if language.sliding_window is not None and language.sliding_window < settings.model_max_length:
        raise UserError(
            f"--model_max_length {settings.model_max_length}: config.json of {language.path} says sliding_window"
            f" {language.sliding_window}, which is not available; use a --model_max_length of at most that"
        )
    check_parallel_layout(
        language,
        settings.tensor_model_parallel_size,
        settings.pipeline_model_parallel_size,
        settings.uneven_pipeline,
    )
    # One sample stands for the data set, whose size is not known yet: batch sizes do not depend on it.
    global_batch_size = plan_steps(settings, 1, world_size).global_batch_size
    for flag, path in (
        ("--data_path", settings.data_path),
        ("--pretrain_mm_mlp_adapter", settings.pretrain_mm_mlp_adapter),
    ):
        if path and not os.path.exists(path):
            raise UserError(f"{flag} {path}: no such file")
    if settings.image_folder and not os.path.isdir(settings.image_folder):
        raise UserError(f"--image_folder {settings.image_folder}: no such folder")
    start = choose_start(translation)
    refuse_another_batch(start, global_batch_size)
    refuse_another_model(start, language, vision, connector, bool(settings.pretrain_mm_mlp_adapter))
    return Checked(translation, language, vision, connector, start)


def data_config(checked: Checked, world_size: int) -> DataConfig:
    """The data room's settings; rows are as long as the engine's sequences."""
    settings = checked.settings
    return DataConfig(
        data_path=settings.data_path,
        image_folder=settings.image_folder,
        tokenizer_path=settings.model_name_or_path,
        version=settings.version,
        image_aspect_ratio=settings.image_aspect_ratio,
        model_max_length=settings.model_max_length,
        seq_length=plan_steps(settings, 1, world_size).seq_length,
        tokens_per_image=image_tokens(checked.vision, checked.connector),
        order=settings.data_order,
        seed=settings.seed,
        image_backend=settings.image_backend,
        max_bad_sample_rate=settings.max_bad_sample_rate,
        vocab_size=checked.language.vocab_size,
    )


def index_folder(settings: RunSettings) -> str:
    """Where this node keeps the data index."""
    if settings.index_folder:
        return settings.index_folder
    if settings.output_dir:
        return os.path.join(settings.output_dir, "index")
    cache = os.environ.get("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache"))
    name = hashlib.sha256(os.path.abspath(settings.data_path).encode()).hexdigest()[:16]
    return os.path.join(cache, "dc_megatron", "index", name)


def plan_hash(index_key: str, kept_hash: str, config: DataConfig) -> str:
    """What the order of samples depends on, shortened: a resumed run must have the same.

    kept_hash: the index summary's. A picture that came or went moves all samples behind it, under the same key.
    """
    text = f"{index_key} {kept_hash} {config.seed} {config.order} {config.seq_length}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def refuse_changed_plan(start: Start, current: str, settings: RunSettings) -> None:
    if start.resumes and start.plan_hash not in (None, current):
        raise UserError(
            f"--data_path {settings.data_path}: data, pictures found, tokenizer, template, seed or lengths (or how this"
            " program reads them) are not those the checkpoint was trained with, so its position in the data means"
            " nothing here; use the same, or take only its weights: --load DIR --finetune with another --output_dir"
        )


def resolved(checked: Checked, engine_words: list[str]) -> dict:
    """What the run was started with, for ``resolved_config.json``."""
    return {
        "settings": asdict(checked.settings),
        "megatron_argv": engine_words,
        "language": asdict(checked.language),
        "vision": asdict(checked.vision),
        "connector": asdict(checked.connector),
    }
