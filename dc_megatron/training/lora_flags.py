"""LoRA on the command line: what contradicts it, and what it may start from. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dc_megatron.config import LoraConfig
from dc_megatron.errors import UserError
from dc_megatron.training.settings import RunSettings
from dc_megatron.weights.checkpoint_folder import read_description

_SETTINGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_weight_path")
TRAINED = ("connector", "lora")


def lora_of(settings: RunSettings) -> LoraConfig | None:
    """The adapters of a run; None: it has none."""
    return LoraConfig(settings.lora_r, settings.lora_alpha, settings.lora_dropout) if settings.lora_enable else None


def refuse_impossible_lora(values: Mapping, given: Collection[str]) -> None:
    """UserError for flags that contradict adapters, or that say something about them without asking for them."""
    if not values["lora_enable"]:
        for name in _SETTINGS:
            if name in given and values[name] != "" and "lora_enable" not in given:
                raise UserError(
                    f"--{name} {values[name]}: says how adapters are trained; add --lora_enable True, or leave it out"
                )
        return
    for name in ("lora_r", "lora_alpha"):
        if values[name] <= 0:
            raise UserError(f"--{name} {values[name]}: must be above 0")
    if not 0 <= values["lora_dropout"] < 1:
        raise UserError(f"--lora_dropout {values['lora_dropout']}: must be from 0 to below 1")


def refuse_other_training(given: Mapping[str, object]) -> None:
    """UserError for flags that choose other parts to train than adapters and connector."""
    if {part.strip() for part in str(given.get("trainable", ",".join(TRAINED))).split(",")} != {*TRAINED}:
        raise UserError(
            f"--trainable {given['trainable']} contradicts --lora_enable True, which trains the connector and adapters"
            f" on a frozen language model; leave one of them out, or say --trainable {','.join(TRAINED)}"
        )
    if given.get("unfreeze_mm_vision_tower"):
        raise UserError("--unfreeze_mm_vision_tower True: the tower stays frozen beside adapters; leave it out")
    if given.get("tune_mm_mlp_adapter"):
        raise UserError("--tune_mm_mlp_adapter True, the connector alone, contradicts --lora_enable True; give one")


def refuse_other_adapters(folder: str, lora: LoraConfig | None, weight_path: str, resumes: bool) -> None:
    """UserError where the checkpoint in ``folder`` holds what this run does not train, or lacks what it trains."""
    was = read_description(folder).lora
    if was is None and lora is not None:
        raise UserError(
            f"--lora_enable True: {folder} holds a whole language model and no adapters, and these are trained on a"
            " Hugging Face folder: write one with tools/convert.py export --format hf, give it as --model_name_or_path,"
            " and its connector (mm_projector.safetensors) as --pretrain_mm_mlp_adapter"
        )
    if was is not None and lora is None:
        raise UserError(
            f"--lora_enable False: {folder} holds adapters (r {was.r}, alpha {was.alpha}); add --lora_enable True"
            f" --lora_r {was.r} --lora_alpha {was.alpha}, or merge them with tools/convert.py export --format hf and"
            " train the result"
        )
    if was is not None and (was.r, was.alpha) != (lora.r, lora.alpha):
        raise UserError(
            f"--lora_r {lora.r} --lora_alpha {lora.alpha}: {folder} was trained with --lora_r {was.r} --lora_alpha"
            f" {was.alpha}; give the same"
        )
    if was is not None and weight_path and not resumes:
        raise UserError(f"--lora_weight_path {weight_path}: --load {folder} holds adapters already; give one of them")
