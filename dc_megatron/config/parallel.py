"""How a model is divided: padded vocabulary, and the parallel sizes that fit a model."""

from __future__ import annotations

from dc_megatron.config.language import LanguageConfig
from dc_megatron.errors import UserError


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int, divisor: int = 128) -> int:
    """Rows of the embedding as Megatron pads them: up to a multiple of divisor * tensor-parallel size."""
    multiple = divisor * tensor_model_parallel_size
    return (vocab_size + multiple - 1) // multiple * multiple


def check_parallel_layout(language: LanguageConfig, tensor: int, pipeline: int, uneven_split: bool = False) -> None:
    """Refuse tensor and pipeline sizes that do not divide the model, naming those that do.

    tensor and pipeline are world sizes of the two groups; ``uneven_split`` says that the engine is given an explicit
    division of layers.
    """
    sizes = {
        "attention heads": language.num_attention_heads,
        "key-value heads": language.num_key_value_heads,
        "channels of intermediate_size": language.intermediate_size,
    }
    layers = language.num_hidden_layers
    fits = [t for t in range(1, language.num_key_value_heads + 1) if not any(size % t for size in sizes.values())]
    if tensor not in fits:
        wrong = " and ".join(f"{size} {what}" for what, size in sizes.items() if tensor < 1 or size % tensor)
        raise UserError(
            f"--tensor-model-parallel-size {tensor}: does not divide {wrong} of {language.path or 'the model'};"
            f" values that do: {', '.join(map(str, fits))}"
        )
    if layers % pipeline and not uneven_split:
        divisors = [p for p in range(1, layers + 1) if layers % p == 0]
        raise UserError(
            f"--pipeline-model-parallel-size {pipeline}: does not divide {layers} layers; values that do:"
            f" {', '.join(map(str, divisors))}; or give --pipeline-split auto, --decoder-first-pipeline-num-layers /"
            " --decoder-last-pipeline-num-layers or --pipeline-model-parallel-layout"
        )
