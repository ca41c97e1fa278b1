"""Flags that say which parts of the model learn, and how fast. No torch here."""

from __future__ import annotations

from dc_megatron.config import nearest
from dc_megatron.errors import UserError
from dc_megatron.training.lora_flags import TRAINED, refuse_other_training

PARTS = ("connector", "llm", "vision_tower")


def trained_parts(given: dict) -> tuple[str, ...]:
    """The parts that learn, in the order of ``PARTS``, from the values that were given. LLaVA has switches for them."""
    if given.get("lora_enable"):
        refuse_other_training(given)
        return TRAINED
    only_connector = [name for name in ("tune_mm_mlp_adapter", "freeze_backbone") if given.get(name)]
    tower = given.get("unfreeze_mm_vision_tower")
    if "trainable" not in given:
        parts = ("connector",) if only_connector else ("connector", "llm")
        return (*parts, "vision_tower") if tower else parts
    text = str(given["trainable"])
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if "lora" in parts:
        raise UserError(f"--trainable {text}: adapters need --lora_enable True, with --lora_r and --lora_alpha; add it")
    for part in parts:
        if part not in PARTS:
            raise UserError(
                f"--trainable {text}: unknown part '{part}'{nearest(part, PARTS)}; parts: {', '.join(PARTS)}"
            )
    if "connector" not in parts:
        raise UserError(f"--trainable {text}: the connector always learns; use {','.join(('connector', *parts))}")
    if only_connector and "llm" in parts:
        raise UserError(
            f"--trainable {text} contradicts --{only_connector[0]} True, which trains the connector alone; give one"
        )
    if tower is not None and tower != ("vision_tower" in parts):
        raise UserError(f"--trainable {text} contradicts --unfreeze_mm_vision_tower {tower}; give one")
    return tuple(part for part in PARTS if part in parts)


def refuse_contradicted_rates(values: dict, engine: dict[str, list[str]]) -> None:
    """UserError: the rate of a part that is frozen, a start of warm-up, images encoded ahead by a tower that learns."""
    for name in ("mm_projector_lr", "vision_tower_lr"):
        if values[name] is None:
            continue
        if values[name] < 0:
            raise UserError(f"--{name} {values[name]}: must not be negative")
        if "--lr-warmup-init" in engine:
            raise UserError(
                f"--lr-warmup-init {engine['--lr-warmup-init'][0]}: cannot be given beside --{name}, whose warm-up"
                " starts at 0; leave one of them out"
            )
    learns = "vision_tower" in values["trainable"]
    if values["vision_tower_lr"] is not None and not learns:
        raise UserError(
            f"--vision_tower_lr {values['vision_tower_lr']}: the vision tower does not learn; add vision_tower to"
            " --trainable, or leave the rate out"
        )
    if learns and values["vision_tower_stages"] == "all":
        raise UserError(
            "--vision-tower-stages all: takes the vision tower for frozen, as images are encoded ahead; use first"
        )
