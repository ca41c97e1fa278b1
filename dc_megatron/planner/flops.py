"""Floating-point operations of a training step, each part counted as what it really costs.

A matrix product of n rows with a [k, m] matrix is 2 n k m operations. A linear layer costs that once forward, once for
the gradient of its input, and once for the gradient of its weight. What is frozen has no weight gradient; what needs no
gradient of its input has none. Norms, activations, rotary positions and the optimizer are not counted (they move bytes,
and are a few operations a value). Recomputed activations are not counted either: these are the operations of the model,
not of the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig, image_tokens, layer_table


@dataclass(frozen=True)
class StepFlops:
    """Operations of one optimizer step, by part, and of all."""

    tower: float
    connector: float
    language_model: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.tower + self.connector + self.language_model + self.attention + self.head

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "total": self.total}


def linear_parameters(language: LanguageConfig) -> int:
    """Weights of all linear layers of the decoder, without embedding and head."""
    queries = language.num_attention_heads * language.head_dim
    keys = language.num_key_value_heads * language.head_dim
    attention = language.hidden_size * (2 * queries + 2 * keys)
    mlp = (3 if language.gated_mlp else 2) * language.hidden_size * language.intermediate_size
    return language.num_hidden_layers * (attention + mlp)


def tower_flops(vision: VisionConfig, connector: ConnectorConfig, learns: bool = False) -> float:
    """Operations of the tower for one picture: patch embedding and the layers that are built. Forward, if it is frozen.

    One that learns has gradients of weights and inputs as well, of all but the pixels.
    """
    width, positions = vision.hidden_size, vision.num_patches + vision.num_prefix_tokens
    patches = 2 * vision.num_patches * 3 * vision.patch_size**2 * width
    linears = 2 * positions * (4 * width**2 + 2 * width * vision.intermediate_size)
    attention = 4 * positions**2 * width
    blocks = layer_table(vision, connector).deepest * (linears + attention)
    return 2 * patches + 3 * blocks if learns else patches + blocks


def step_flops(
    language: LanguageConfig,
    vision: VisionConfig,
    connector: ConnectorConfig,
    *,
    lengths: Sequence[int],
    images: int,
    supervised_tokens: int,
    trainable: Sequence[str],
) -> StepFlops:
    """Operations of a step over samples of ``lengths`` positions with ``images`` pictures together.

    Attention is causal within each sample: half of its square. The head counts at positions with a target only. The
    connector's first layer needs no gradient of its input unless the tower below it learns.
    """
    trains_model = "llm" in trainable
    passes = 3 if trains_model else 2
    heads = language.num_attention_heads * language.head_dim
    # Scores and weighted sum, 2 * 2 * L^2 / 2 * width forward; twice that backward, whatever is frozen.
    attention = 3 * language.num_hidden_layers * sum(2 * length**2 * heads for length in lengths)
    vocabulary = 2 * language.vocab_size * language.hidden_size
    first = connector.input_size(vision) * language.hidden_size
    second = language.hidden_size**2
    trains_connector, trains_tower = "connector" in trainable, "vision_tower" in trainable
    projector = 2 * (first * (1 + trains_connector + trains_tower) + second * (1 + 2 * trains_connector))
    return StepFlops(
        tower=images * tower_flops(vision, connector, trains_tower),
        connector=images * image_tokens(vision, connector) * projector,
        language_model=passes * 2 * linear_parameters(language) * sum(lengths),
        attention=attention,
        head=passes * vocabulary * supervised_tokens,
    )
