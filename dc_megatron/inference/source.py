"""Which model is meant: a training checkpoint or Hugging Face folders, checked before anything heavy is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from dc_megatron.config import (
    ConnectorConfig,
    ImageTiling,
    LanguageConfig,
    LoraConfig,
    VisionConfig,
    check_parallel_layout,
    image_tiling,
    tiling_of_flags,
)
from dc_megatron.errors import UserError
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.frozen_base import base_folder, refuse_another_base


@dataclass(frozen=True)
class Source:
    """Where a model comes from. Either ``load`` (an --output_dir of training) or the Hugging Face folders.

    Empty strings and None mean "as the checkpoint says", or the default where there is no checkpoint.
    """

    load: str = ""
    checkpoint_step: int | None = None
    model_name_or_path: str = ""
    vision_tower: str = ""
    projector: str = ""
    dense_connector_type: str = ""
    select_layer: int | None = None
    version: str = ""
    image_aspect_ratio: str = ""
    image_grid_pinpoints: str = ""
    mm_patch_merge_type: str = ""
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    bf16: bool = False


@dataclass(frozen=True)
class Resolved:
    """A source with every choice made and every folder read."""

    source: Source
    language: LanguageConfig
    vision: VisionConfig
    connector: ConnectorConfig
    version: str
    image_aspect_ratio: str
    tiling: ImageTiling
    iteration_folder: str
    model_max_length: int | None
    # The checkpoint's adapters to ``language``, which then lies in a folder of its own.
    lora: LoraConfig | None = None


def resolve(source: Source) -> Resolved:
    """Read the small files of ``source``; no torch work. UserError: missing or contradictory folders and settings."""
    resolved = _resolve_checkpoint(source) if source.load else _resolve_folders(source)
    check_parallel_layout(resolved.language, source.tensor_model_parallel_size, source.pipeline_model_parallel_size)
    return resolved


def _resolve_checkpoint(source: Source) -> Resolved:
    described = checkpoint_folder.read_description(source.load)
    if source.model_name_or_path and described.lora is None:
        raise UserError("--load holds the language model: drop --model_name_or_path")
    tree = checkpoint_folder.find_tree(source.load, source.checkpoint_step)
    if tree is None:
        step = source.checkpoint_step
        raise UserError(
            f"--load {source.load}: holds no complete checkpoint" + (f" of step {step}" if step is not None else "")
        )
    vision = VisionConfig.from_folder(_tower(source, described))
    connector = _connector(source, described)
    return Resolved(
        source=source,
        language=_language(source, described),
        vision=vision,
        connector=connector,
        version=source.version or described.version or _missing(source, "--version", "conversation template"),
        image_aspect_ratio=source.image_aspect_ratio or described.image_aspect_ratio or "pad",
        tiling=_tiling(source, described, vision, connector),
        iteration_folder=tree.path,
        model_max_length=described.model_max_length,
        lora=described.lora,
    )


def _language(source: Source, described: checkpoint_folder.CheckpointDescription) -> LanguageConfig:
    """The checkpoint's language model; below adapters the one in its folder, whose weights are those of training."""
    language = LanguageConfig.from_folder(os.path.join(source.load, "hf"), "--load")
    if described.lora is None:
        return language
    folder = base_folder(described, source.load, source.model_name_or_path)
    refuse_another_base(folder, described.language_model_files, source.load)
    return replace(language, path=folder)


def _connector(source: Source, described: checkpoint_folder.CheckpointDescription) -> ConnectorConfig:
    """The checkpoint's connector; that of --pretrain_mm_mlp_adapter where a language model was imported alone."""
    was = described.mm_dense_connector_type
    if not was:
        kind = source.dense_connector_type or _missing(source, "--mm_dense_connector_type", "connector")
        if not source.projector:
            _missing(source, "--pretrain_mm_mlp_adapter", "projector")
        select_layer = {} if source.select_layer is None else {"select_layer": source.select_layer}
        return ConnectorConfig(kind, **select_layer)
    if source.projector:
        raise UserError("--load holds the projector: drop --pretrain_mm_mlp_adapter")
    if source.dense_connector_type not in ("", was):
        raise UserError(
            f"--mm_dense_connector_type {source.dense_connector_type}: {source.load} was trained with {was}"
        )
    return ConnectorConfig(was, described.mm_projector_type, described.mm_vision_select_layer)


def _tower(source: Source, described: checkpoint_folder.CheckpointDescription) -> str:
    """The folder of the frozen tower, whose weights are those that were trained with."""
    tower = source.vision_tower or described.vision_tower or _missing(source, "--vision_tower", "vision tower")
    if not os.path.isdir(tower):
        raise UserError(
            f"--load {source.load}: its frozen vision tower was {tower}, which is not there; name it:"
            " --vision_tower DIR"
        )
    wanted = described.vision_tower_hash
    if wanted and checkpoint_folder.hash_folder_weights(tower) != wanted:
        raise UserError(f"--vision_tower {tower}: not the weights that {source.load} was trained with")
    return tower


def _tiling(
    source: Source,
    described: checkpoint_folder.CheckpointDescription,
    vision: VisionConfig,
    connector: ConnectorConfig,
) -> ImageTiling:
    """The checkpoint's tiling, whose shapes of pictures it has learned; the flags' where it has no connector yet."""
    if not described.mm_dense_connector_type:
        aspect = source.image_aspect_ratio or described.image_aspect_ratio or "pad"
        return tiling_of_flags(vision, connector, aspect, source.image_grid_pinpoints, source.mm_patch_merge_type)
    was, typed = described.image_aspect_ratio, source.image_aspect_ratio
    if typed and (typed == "anyres") != (was == "anyres"):
        raise UserError(f"--image_aspect_ratio {typed}: {source.load} was trained with {was}; leave it out")
    for flag in ("image_grid_pinpoints", "mm_patch_merge_type"):
        if getattr(source, flag):
            raise UserError(f"--{flag}: --load says how its pictures are cut; leave the flag out")
    if was == "anyres" and not described.image_grid_pinpoints:
        raise UserError(f"--load {source.load}: an AnyRes model, but hf/ does not say its image_grid_pinpoints")
    pinpoints = tuple((width, height) for width, height in described.image_grid_pinpoints or ())
    return image_tiling(vision, connector, pinpoints, described.merge_type if pinpoints else "flat")


def _missing(source: Source, flag: str, what: str) -> str:
    raise UserError(
        f"--load {source.load}: holds a language model alone, and {flag} is missing: give --vision_tower,"
        f" --mm_dense_connector_type, --pretrain_mm_mlp_adapter and --version, or train the {what} first"
    )


def _resolve_folders(source: Source) -> Resolved:
    for flag, value in (
        ("--model_name_or_path", source.model_name_or_path),
        ("--vision_tower", source.vision_tower),
        ("--version", source.version),
    ):
        if not value:
            raise UserError(
                f"{flag} is missing: give --load DIR, or --model_name_or_path, --vision_tower and --version"
            )
    select_layer = {} if source.select_layer is None else {"select_layer": source.select_layer}
    vision = VisionConfig.from_folder(source.vision_tower)
    connector = ConnectorConfig(source.dense_connector_type or "dci", **select_layer)
    aspect_ratio = source.image_aspect_ratio or "pad"
    return Resolved(
        source=source,
        language=LanguageConfig.from_folder(source.model_name_or_path),
        vision=vision,
        connector=connector,
        version=source.version,
        image_aspect_ratio=aspect_ratio,
        tiling=tiling_of_flags(
            vision, connector, aspect_ratio, source.image_grid_pinpoints, source.mm_patch_merge_type
        ),
        iteration_folder="",
        model_max_length=None,
    )


def check_world(source: Source, world: int) -> None:
    """Refuse a number of processes that the layout of ``source`` does not divide."""
    needed = source.tensor_model_parallel_size * source.pipeline_model_parallel_size
    if world % needed:
        raise UserError(
            f"{world} processes: --tensor-model-parallel-size {source.tensor_model_parallel_size} x"
            f" --pipeline-model-parallel-size {source.pipeline_model_parallel_size} needs a multiple of {needed};"
            f" start with torchrun --nproc-per-node {needed}"
        )
