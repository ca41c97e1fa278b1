"""The linears that get an adapter, told from the weights table: all of the layers', so every one but the head."""

from __future__ import annotations

from dc_megatron.config import AdaptedLinear, HuggingFaceLinear, LanguageConfig
from dc_megatron.weights.language_tables import language_table
from dc_megatron.weights.rules import Rule

# What adapters' names begin with in Megatron's tree; the rest is PEFT's name.
LORA_PREFIX = "lora."
FACTORS = ("lora_A", "lora_B")
_LAYER = "decoder.layers.{layer}."
_WEIGHT = ".weight"


def adapted_linears(language: LanguageConfig) -> tuple[AdaptedLinear, ...]:
    """One entry a Megatron linear of a layer, in the order of the table."""
    table = language_table(language, language.vocab_size)
    return tuple(_adapted(rule) for rule in table if _is_linear(rule))


def _is_linear(rule: Rule) -> bool:
    return rule.layered and rule.key.endswith(_WEIGHT) and len(rule.sources[0].shape) == 2


def _adapted(rule: Rule) -> AdaptedLinear:
    assert rule.kind != "copy", f"{rule.key}: a linear that is whole on every rank is not known here"
    parts = tuple(HuggingFaceLinear(source.name.removesuffix(_WEIGHT), *source.shape) for source in rule.sources)
    module = rule.key.removeprefix(_LAYER).removesuffix(_WEIGHT)
    return AdaptedLinear(module, parts, row_parallel=rule.kind == "columns", blocks=rule.groups)


def adapter_shapes(language: LanguageConfig, r: int) -> dict[str, tuple[int, int]]:
    """Name -> shape of every factor as Hugging Face's linears have them: model.layers.0....q_proj.lora_A.weight."""
    shapes = {}
    for layer in range(language.num_hidden_layers):
        for linear in adapted_linears(language):
            for part in linear.parts:
                name = part.name.format(layer=layer)
                shapes[f"{name}.lora_A.weight"] = (r, part.inputs)
                shapes[f"{name}.lora_B.weight"] = (part.outputs, r)
    return shapes
