"""Everything a run knows before it opens its data: checked settings, shapes, sources and what it starts from."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass

from dc_megatron.config import (
    ConnectorConfig,
    DataSource,
    ImageTiling,
    LanguageConfig,
    LoraConfig,
    VisionConfig,
    check_parallel_layout,
    language_shape,
    layer_table,
    tiling_of_flags,
    vision_shape,
)
from dc_megatron.data.image_store import open_store
from dc_megatron.data.sources import read_sources
from dc_megatron.errors import UserError
from dc_megatron.training.arguments import plan_steps
from dc_megatron.training.argv import REQUIRED_FOR_TRAINING, Translation, translate
from dc_megatron.training.lora_flags import lora_of, refuse_other_adapters
from dc_megatron.training.resume import (
    Start,
    choose_start,
    refuse_another_batch,
    refuse_another_model,
    refuse_other_groups,
    starts_from_nothing,
)
from dc_megatron.training.settings import RunSettings


@dataclass(frozen=True)
class Checked:
    """A command line that agrees with the files it names."""

    translation: Translation
    language: LanguageConfig
    vision: VisionConfig
    connector: ConnectorConfig
    tiling: ImageTiling
    sources: tuple[DataSource, ...]
    start: Start
    # Held-out records; none where nothing is evaluated during training.
    validation_sources: tuple[DataSource, ...] = ()

    @property
    def settings(self) -> RunSettings:
        return self.translation.settings

    @property
    def lora(self) -> LoraConfig | None:
        return lora_of(self.settings)

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
    language, vision = _shapes(settings)
    connector = ConnectorConfig(
        settings.mm_dense_connector_type, settings.mm_projector_type, settings.mm_vision_select_layer
    )
    layer_table(vision, connector)
    tiling = _tiling(settings, vision, connector)
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
    # One row stands for the data set, whose size is not known yet: unpacked batches do not depend on it.
    plan = plan_steps(settings, 1, world_size)
    sources = _sources(settings.data_path, settings.image_folder, ("--data_path", "--image_folder"), settings.dry_run)
    held_out = _validation_sources(settings)
    projector = settings.pretrain_mm_mlp_adapter
    if projector and not settings.dry_run and not os.path.exists(projector):
        raise UserError(f"--pretrain_mm_mlp_adapter {projector}: no such file")
    start = starts_from_nothing(translation) if settings.dry_run else choose_start(translation)
    if settings.packing == "none":
        refuse_another_batch(start, plan.global_batch_size)
    refuse_other_groups(start, settings)
    if start.loads:
        refuse_other_adapters(start.folder, lora_of(settings), settings.lora_weight_path, start.resumes)
    refuse_another_model(start, language, vision, connector, tiling, bool(projector))
    return Checked(translation, language, vision, connector, tiling, sources, start, held_out)


def _shapes(settings: RunSettings) -> tuple[LanguageConfig, VisionConfig]:
    """Of the folders; a dry run also takes the preset that is called as a folder that is not there."""
    if settings.dry_run:
        return language_shape(settings.model_name_or_path), vision_shape(settings.vision_tower)
    return LanguageConfig.from_folder(settings.model_name_or_path), VisionConfig.from_folder(settings.vision_tower)


def _tiling(settings: RunSettings, vision: VisionConfig, connector: ConnectorConfig) -> ImageTiling:
    """How pictures are cut. UserError: flags that contradict each other, pictures that fit into no sample."""
    tiling = tiling_of_flags(
        vision,
        connector,
        settings.image_aspect_ratio,
        settings.image_grid_pinpoints,
        settings.mm_patch_merge_type,
    )
    most = tiling.most_tokens
    if most > settings.model_max_length:
        fewer = ", or give fewer --image_grid_pinpoints" if tiling.pinpoints else ""
        raise UserError(
            f"--model_max_length {settings.model_max_length}: a picture takes up to {most} positions and would be left"
            f" out of every sample; raise it above that by the length of the text{fewer}"
        )
    return tiling


def _validation_sources(settings: RunSettings) -> tuple[DataSource, ...]:
    if not settings.eval_data_path or settings.eval_iters == 0:
        return ()
    folders = settings.eval_image_folder or settings.image_folder[:1]
    if not settings.eval_image_folder and len(set(settings.image_folder)) > 1:
        raise UserError("--eval_data_path: --image_folder names several folders; say which: --eval_image_folder DIR")
    sources = _sources(settings.eval_data_path, folders, ("--eval_data_path", "--eval_image_folder"), settings.dry_run)
    for source in sources:
        if source.weight != 1:
            raise UserError(
                f"--eval_data_path {source.data_path}:{source.weight:g}: every record counts once; no weight"
            )
    return sources


def _sources(
    paths: tuple[str, ...], folders: tuple[str, ...], flags: tuple[str, str], dry_run: bool
) -> tuple[DataSource, ...]:
    """The data sources, whose files and folders are there (tar shards and addresses are opened with the data).

    flags: that ``paths`` and ``folders`` are the words of. A dry run looks at none of them; only a YAML file has to be
    there.
    """
    sources = read_sources(paths, folders, flags)
    for source in () if dry_run else sources:
        if not os.path.isfile(source.data_path):
            raise UserError(f"{flags[0]} {source.data_path}: no such file")
        if not source.image_folder.endswith(".tar") and "://" not in source.image_folder:
            open_store(source.image_folder)
    return sources


def index_folder(settings: RunSettings) -> str:
    """Where this node keeps the data index."""
    if settings.index_folder:
        return settings.index_folder
    if settings.output_dir:
        return os.path.join(settings.output_dir, "index")
    cache = os.environ.get("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache"))
    names = " ".join(os.path.abspath(path) for path in settings.data_path)
    name = hashlib.sha256(names.encode()).hexdigest()[:16]
    return os.path.join(cache, "dc_megatron", "index", name)


def resolved(checked: Checked, engine_words: list[str]) -> dict:
    """What the run was started with, for ``resolved_config.json``."""
    return {
        "settings": asdict(checked.settings),
        "megatron_argv": engine_words,
        "language": asdict(checked.language),
        "vision": asdict(checked.vision),
        "connector": asdict(checked.connector),
        "tiling": asdict(checked.tiling),
        "sources": [asdict(source) for source in checked.sources],
        "validation_sources": [asdict(source) for source in checked.validation_sources],
    }
