"""The command-line flags that name a model, shared by the tools that use one. Only argparse."""

from __future__ import annotations

import argparse

from dc_megatron.config import CONNECTOR_TYPES, IMAGE_ASPECT_RATIOS, MERGE_TYPES, TEMPLATES
from dc_megatron.inference.source import Source


def add_flag(parser: argparse._ActionsContainer, name: str, **options) -> None:
    """A flag in both spellings, ``--snake_case`` and ``--kebab-case``."""
    spellings = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
    parser.add_argument(*spellings, dest=name, **options)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags behind ``source_of``."""
    group = parser.add_argument_group("model: a training checkpoint, or Hugging Face folders")
    add_flag(group, "load", default="", metavar="DIR", help="an --output_dir of training")
    add_flag(group, "ckpt_step", type=int, metavar="N", help="the step to take (default: the newest complete one)")
    add_flag(group, "model_name_or_path", default="", metavar="DIR", help="language model folder")
    add_flag(group, "vision_tower", default="", metavar="DIR", help="the tower's folder (default: the checkpoint's)")
    add_flag(group, "pretrain_mm_mlp_adapter", default="", metavar="FILE", help="projector file, or a folder with one")
    add_flag(group, "mm_dense_connector_type", default="", choices=("", *CONNECTOR_TYPES), help="default: dci")
    add_flag(group, "mm_vision_select_layer", type=int, metavar="N", help="default: -2")
    add_flag(group, "version", default="", choices=("", *TEMPLATES), help="conversation template")
    add_flag(group, "image_aspect_ratio", default="", choices=("", *IMAGE_ASPECT_RATIOS), help="default: pad")
    add_flag(group, "image_grid_pinpoints", default="", metavar="LIST", help="anyres: default LLaVA-1.6's")
    add_flag(group, "mm_patch_merge_type", default="", choices=("", *MERGE_TYPES), help="anyres: spatial_unpad")
    add_flag(group, "tensor_model_parallel_size", type=int, default=1, metavar="N", help="start with torchrun")
    add_flag(group, "pipeline_model_parallel_size", type=int, default=1, metavar="N", help="start with torchrun")
    group.add_argument("--bf16", action="store_true", help="compute in bf16 (default: fp32)")
    add_flag(group, "image_backend", default="auto", choices=("auto", "dali", "pil"), help="default: auto")


def source_of(options: argparse.Namespace) -> Source:
    """The Source that parsed flags describe."""
    return Source(
        load=options.load,
        checkpoint_step=options.ckpt_step,
        model_name_or_path=options.model_name_or_path,
        vision_tower=options.vision_tower,
        projector=options.pretrain_mm_mlp_adapter,
        dense_connector_type=options.mm_dense_connector_type,
        select_layer=options.mm_vision_select_layer,
        version=options.version,
        image_aspect_ratio=options.image_aspect_ratio,
        image_grid_pinpoints=options.image_grid_pinpoints,
        mm_patch_merge_type=options.mm_patch_merge_type,
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        bf16=options.bf16,
    )
