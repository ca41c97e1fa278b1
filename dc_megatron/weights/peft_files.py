"""PEFT's adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``, read and described.

base_model.model.<module of the language model>.lora_A.weight [r, inputs], .lora_B.weight [outputs, r]
"""

from __future__ import annotations

import os

from torch import Tensor

from dc_megatron.config import LanguageConfig, LoraConfig, read_json_file
from dc_megatron.errors import UserError
from dc_megatron.weights.lora_table import adapted_linears, adapter_shapes
from dc_megatron.weights.names import refuse_wrong_names, refuse_wrong_shape
from dc_megatron.weights.safetensors_files import open_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NON_LORA = "non_lora_trainables.bin"
PEFT_PREFIX = "base_model.model."
# Settings that would make other numbers of the same factors.
_NEUTRAL = {"bias": "none", "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}


class PeftFactors:
    """The factors of an adapter folder by their names without PEFT's prefix.

    UserError: no such folder, other linears than all of the layers', another r or alpha, settings that are not
    available.
    """

    def __init__(self, folder: str, language: LanguageConfig, lora: LoraConfig, flag: str = "--lora_weight_path"):
        what = f"{flag} {folder}"
        if not os.path.isdir(folder):
            raise UserError(f"{what}: no such folder; give one with {CONFIG} and {WEIGHTS}")
        _check_config(read_json_file(folder, CONFIG, what), lora, what)
        path = os.path.join(folder, WEIGHTS)
        if not os.path.isfile(path):
            path = os.path.join(folder, "adapter_model.bin")
        if not os.path.isfile(path):
            raise UserError(f"{what}: has no {WEIGHTS}")
        self._file = open_file(path, f"{flag} {path}")
        shapes = adapter_shapes(language, lora.r)
        found, expected = set(self._file.names()), {PEFT_PREFIX + name for name in shapes}
        refuse_wrong_names(
            what,
            expected - found,
            found - expected,
            "Adapters on every linear of the layers, and on no other, are known",
        )
        for name, shape in shapes.items():
            refuse_wrong_shape(what, name, self._file.shape(PEFT_PREFIX + name), shape)

    def read(self, name: str) -> Tensor:
        """A whole factor in the file's dtype; ``name`` without PEFT's prefix."""
        return self._file.read(PEFT_PREFIX + name, None, None)


def _check_config(config: dict, lora: LoraConfig, what: str) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{what}: {CONFIG} says peft_type '{config.get('peft_type')}'; LORA is known")
    if (config.get("r"), config.get("lora_alpha")) != (lora.r, lora.alpha):
        raise UserError(
            f"{what}: has r {config.get('r')}, alpha {config.get('lora_alpha')}, not --lora_r {lora.r} --lora_alpha"
            f" {lora.alpha}; give its own"
        )
    for name, value in _NEUTRAL.items():
        if config.get(name, value) not in (value, None):
            raise UserError(f"{what}: {CONFIG} says {name} {config[name]}, which is not available")


def peft_config(language: LanguageConfig, lora: LoraConfig, base: str) -> dict:
    """The content of ``adapter_config.json``; ``base``: what it calls the language model's folder."""
    names = {part.name.split(".")[-1] for linear in adapted_linears(language) for part in linear.parts}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": sorted(names),
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
