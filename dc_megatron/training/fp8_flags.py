"""FP8 on the command line: what cannot be, and what Megatron gets. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dc_megatron.errors import UserError
from dc_megatron.training.settings import RunSettings

# Transformer Engine multiplies FP8 matrices whose sides are multiples of this.
MULTIPLE = 16


def refuse_impossible_fp8(values: Mapping, given: Collection[str]) -> None:
    """UserError for flags that contradict FP8, or that say something about it without asking for it."""
    if values["fp8_format"] is None:
        for name in ("fp8_recipe", "fp8_check_interval"):
            if name in given:
                what = f"--{name.replace('_', '-')} {values[name]}"
                raise UserError(f"{what}: says how to train in FP8; add --fp8-format hybrid, or leave it out")
        return
    what = f"--fp8-format {values['fp8_format']}"
    if not values["bf16"]:
        raise UserError(f"{what}: FP8 stands beside bf16, in which all else is computed; add --bf16 True")
    length, tensor = values["seq_length"], values["tensor_model_parallel_size"]
    pieces = MULTIPLE * (tensor if values["sequence_parallel"] else 1)
    if length is not None and length % pieces:
        raise UserError(
            f"--seq-length {length}: {what} needs a multiple of {pieces}; use {-(-length // pieces) * pieces}"
        )


def length_multiple(fp8_format: str | None, tensor_model_parallel_size: int) -> int:
    """What the length of unpacked rows is rounded up to: equal pieces for the ranks, of a size that FP8 takes."""
    return tensor_model_parallel_size * (MULTIPLE if fp8_format else 1)


def fp8_words(settings: RunSettings, typed: Collection[str]) -> list[str]:
    """Megatron's flags. Delayed scaling looks back as far as Transformer Engine's own default does."""
    if settings.fp8_format is None:
        return []
    words = ["--fp8-format", settings.fp8_format, "--fp8-recipe", settings.fp8_recipe]
    if settings.fp8_recipe == "delayed":
        history = {"--fp8-amax-history-len": "1024", "--fp8-amax-compute-algo": "max"}
        words += [word for name, value in history.items() if name not in typed for word in (name, value)]
    return words


def refuse_unsupported_fp8(settings: RunSettings, obstacle: str | None, capability: tuple[int, int] | None) -> None:
    """UserError where this machine cannot do it. obstacle: why Transformer Engine cannot be used; None: it can.

    capability: compute capability of the GPU; FP8 begins with 8.9, blocks with 9.0, mxfp8 with 10.0.
    """
    if settings.fp8_format is None:
        return
    what = f"--fp8-format {settings.fp8_format}"
    if obstacle is not None:
        raise UserError(f"{what}: needs Transformer Engine, which is {obstacle}; leave it out to train in bf16")
    least = {"blockwise": (9, 0), "mxfp8": (10, 0)}.get(settings.fp8_recipe, (8, 9))
    if capability is not None and capability < least:
        have, need = (".".join(map(str, pair)) for pair in (capability, least))
        raise UserError(
            f"{what} --fp8-recipe {settings.fp8_recipe}: needs a GPU of compute capability {need}, this one has {have};"
            f" {'use --fp8-recipe delayed' if capability >= (8, 9) else 'leave it out to train in bf16'}"
        )
