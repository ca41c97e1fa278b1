"""``--context-parallel-size`` on the command line: what does not go with it, what row lengths it needs. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from dc_megatron.errors import UserError
from dc_megatron.training.fp8_flags import MULTIPLE
from dc_megatron.training.settings import RunSettings


def refuse_impossible_context(values: Mapping, given: Collection[str]) -> None:
    """UserError for what does not go with rows that are divided over ranks."""
    if values["context_parallel_size"] <= 1:
        return
    what = f"--context-parallel-size {values['context_parallel_size']}"
    if values["packing"] == "none":
        raise UserError(
            f"{what} beside --packing none: context parallelism divides packed rows; use --packing best-fit"
        )
    if values["vision_tower_stages"] == "all":
        raise UserError(
            f"{what} beside --vision-tower-stages all: images are not dealt over context-parallel ranks; leave it out"
        )
    if values["log_images"] and "log_images" in given:
        raise UserError(
            f"--log-images {values['log_images']} beside {what}: the pictures' questions are not packed rows; leave it"
            " out"
        )


def row_multiple(settings: RunSettings) -> int:
    """What the length of a row must be a multiple of, so that all ranks get equal parts of it.

    Two pieces for a context-parallel rank; of both together one part for a tensor-parallel rank under sequence
    parallelism, of a size that FP8 takes.
    """
    context = settings.context_parallel_size
    parts = settings.tensor_model_parallel_size if settings.sequence_parallel else 1
    if context == 1:
        return parts
    return context * math.lcm(2, parts * (MULTIPLE if settings.fp8_format else 1))


def why_multiple(settings: RunSettings) -> str:
    """The flags behind ``row_multiple``, for a message."""
    if settings.context_parallel_size == 1:
        return f"--sequence-parallel needs a multiple of --tensor-model-parallel-size {row_multiple(settings)}"
    beside = " beside --sequence-parallel" if settings.sequence_parallel else ""
    return (
        f"--context-parallel-size {settings.context_parallel_size}{beside} needs a multiple of {row_multiple(settings)}"
    )


def context_argv(settings: RunSettings, backend: list[str]) -> list[str]:
    """Megatron's flags beside its own --context-parallel-size.

    The fused rotary kernel would count the positions of a rank's pieces as those of whole samples.
    """
    fused = settings.context_parallel_size > 1 and "--no-rope-fusion" not in backend
    return ["--no-rope-fusion"] if fused else []
