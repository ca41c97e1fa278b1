"""PEFT's adapters on the plain reference: what LoRA has to agree with."""

from __future__ import annotations

import torch

from dc_megatron.config import LanguageConfig, LoraConfig
from dc_megatron.reference.model import ReferenceModel
from dc_megatron.weights.lora_table import adapter_shapes


def factors(language_folder: str, r: int, seed: int = 21) -> dict[str, torch.Tensor]:
    """Whole factors of every linear by name. B is not zero, so that A has a gradient in the first step."""
    generator = torch.Generator().manual_seed(seed)
    shapes = adapter_shapes(LanguageConfig.from_folder(language_folder), r)
    return {name: 0.1 * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def add_peft_adapters(model: ReferenceModel, lora: LoraConfig, state: dict[str, torch.Tensor]) -> None:
    """Wrap the language model with PEFT, on every linear but the head, as LLaVA does, and fill in ``state``.

    ``set_trainable`` then leaves the adapters learning and the linears frozen, whatever it is told.
    """
    import peft

    names = {name.split(".")[-3] for name in state}
    settings = peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=sorted(names))
    model.language_model = peft.get_peft_model(model.language_model, settings)
    own = {f"base_model.model.{name}".replace(".weight", ".default.weight"): value for name, value in state.items()}
    unexpected = model.language_model.load_state_dict(own, strict=False).unexpected_keys
    assert not unexpected, f"PEFT has no {unexpected[:3]}"
    filled = {name for name, _ in model.language_model.named_parameters() if ".lora_" in name}
    assert filled == own.keys(), f"PEFT adapts other linears: {sorted(filled ^ own.keys())[:3]}"
    frozen = model.set_trainable

    def set_trainable(_trainable: str) -> None:
        frozen("connector")
        for name, parameter in model.language_model.named_parameters():
            parameter.requires_grad_(".lora_" in name)

    model.set_trainable = set_trainable
