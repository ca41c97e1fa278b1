"""The parameters of any rank, tensor by tensor, in the order in which the engine's model holds them.

Megatron (megatron-core 0.19.2) divides attention and MLP by tensor-parallel ranks and the padded vocabulary by its
rows; norms, the tower, the connector and ``image_newline`` are whole on every rank that has them. The order matters:
the optimizer's buffers are laid out by it (see ``gradient_buffers``). Transformer Engine's layers hold the same
tensors, with the norms inside their linear layers and so in another place of the order.

A dry run (``dc_megatron/training/dry_run.py``) builds the model and compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from dc_megatron.config import (
    ConnectorConfig,
    LanguageConfig,
    VisionConfig,
    layer_table,
    padded_vocab_size,
)


@dataclass(frozen=True)
class Model:
    """What is trained, and how. newline: AnyRes trains an ``image_newline``.

    tower_on_all_stages: the first chunk of every stage has the tower.
    lora_rank: above 0 the language model gets adapters of that rank on every linear layer but the head, and is frozen
    itself; ``trainable`` then does not name "llm".
    """

    language: LanguageConfig
    vision: VisionConfig
    connector: ConnectorConfig
    trainable: tuple[str, ...]
    newline: bool = False
    lora_rank: int = 0
    tower_on_all_stages: bool = False


@dataclass(frozen=True)
class Parameter:
    """One tensor of a rank: Megatron's name without layer number, and how many numbers it has.

    linear: a weight that FP8 casts. tied: an embedding that stands on the first and on the last stage.
    """

    name: str
    elements: int
    learns: bool
    linear: bool = False
    tied: bool = False


@dataclass(frozen=True)
class LayerKind:
    """How a decoder layer differs from Llama's: no gate in the MLP, biases, norms."""

    gated: bool = True
    qkv_bias: bool = False
    other_bias: bool = False  # of the attention's output and of the MLP
    norms: int = 2
    norm_bias: bool = False
    head_bias: bool = False
    query_key_norms: bool = False


def layer_kind(language: LanguageConfig) -> LayerKind:
    """What the layers of ``language`` have."""
    biased = language.linear_bias
    return LayerKind(
        gated=language.gated_mlp,
        qkv_bias=language.qkv_bias or biased,
        other_bias=biased,
        norms=language.norms_per_layer,
        norm_bias=language.layer_norm,
        head_bias=biased,
        query_key_norms=language.qk_norm,
    )


def rank_parameters(model: Model, tensor: int, stages: tuple[tuple[int, ...], ...], stage: int) -> list[Parameter]:
    """All parameters of a tensor-parallel rank of pipeline stage ``stage`` (from 0), chunk after chunk.

    stages: decoder layers of each stage's chunks.
    """
    return [one for chunk in range(len(stages[stage])) for one in chunk_parameters(model, tensor, stages, stage, chunk)]


@lru_cache(maxsize=4096)
def chunk_parameters(
    model: Model, tensor: int, stages: tuple[tuple[int, ...], ...], stage: int, chunk: int
) -> tuple[Parameter, ...]:
    """Those of one chunk of the stage: the first chunk of all has embedding, tower and connector, the last the head."""
    first = stage == 0 and chunk == 0
    last = stage == len(stages) - 1 and chunk == len(stages[stage]) - 1
    layers = tuple(_layer(model, tensor)) * stages[stage][chunk]
    front = tuple(_connector_side(model)) if first else ()
    if model.tower_on_all_stages and chunk == 0 and not first:
        front = tuple(_tower(model))
    newline = (Parameter("image_newline", model.language.hidden_size, "connector" in model.trainable),)
    return (
        *(newline if first and model.newline else ()),
        *(_embedding(model, tensor, whole=first and last) if first else ()),
        *layers,
        *(_head(model, tensor, whole=first and last) if last else ()),
        *front,
        *tuple(_layer_adapters(model, tensor)) * stages[stage][chunk],
    )


def total_parameters(model: Model) -> int:
    """Of the whole model, padding of the vocabulary and tower layers that are not built left out."""
    language = model.language
    padding = (padded_vocab_size(language.vocab_size, 1) - language.vocab_size) * language.hidden_size
    tables = 1 if language.tie_word_embeddings else 2
    parameters = chunk_parameters(model, 1, ((language.num_hidden_layers,),), 0, 0)
    return sum(one.elements for one in parameters) - tables * padding


def learning_parameters(model: Model) -> int:
    """Those that are trained, likewise of the whole model; rows of padding count, as they do for the optimizer."""
    parameters = chunk_parameters(model, 1, ((model.language.num_hidden_layers,),), 0, 0)
    return sum(one.elements for one in parameters if one.learns)


def _embedding(model: Model, tensor: int, whole: bool) -> Iterator[Parameter]:
    yield Parameter("embedding", _table(model, tensor), _learns(model), tied=_tied(model) and not whole)


def _head(model: Model, tensor: int, whole: bool) -> Iterator[Parameter]:
    language, learns = model.language, _learns(model)
    yield from _norm("final_layernorm", language.hidden_size, layer_kind(language), learns)
    if not (_tied(model) and whole):
        yield Parameter("output_layer", _table(model, tensor), learns, tied=_tied(model))
    if layer_kind(language).head_bias:
        yield Parameter("output_layer.bias", _table(model, tensor) // language.hidden_size, learns)


def _learns(model: Model) -> bool:
    return "llm" in model.trainable and not model.lora_rank


def _tied(model: Model) -> bool:
    return model.language.tie_word_embeddings


def _table(model: Model, tensor: int) -> int:
    language = model.language
    return padded_vocab_size(language.vocab_size, tensor) // tensor * language.hidden_size


def _norm(name: str, width: int, kind: LayerKind, learns: bool) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", width, learns)
    if kind.norm_bias:
        yield Parameter(f"{name}.bias", width, learns)


def _layer(model: Model, tensor: int) -> Iterator[Parameter]:
    language, kind, learns = model.language, layer_kind(model.language), _learns(model)
    hidden, inner = language.hidden_size, language.intermediate_size // tensor
    queries, keys = (
        heads * language.head_dim // tensor for heads in (language.num_attention_heads, language.num_key_value_heads)
    )
    gates = 2 if kind.gated else 1
    yield from _norm("input_layernorm", hidden, kind, learns)
    yield from _linear(model, "linear_proj", hidden, queries, kind.other_bias)
    yield from _linear(model, "linear_qkv", queries + 2 * keys, hidden, kind.qkv_bias)
    if kind.query_key_norms:
        yield Parameter("q_layernorm.weight", language.head_dim, learns)
        yield Parameter("k_layernorm.weight", language.head_dim, learns)
    if kind.norms == 2:
        yield from _norm("pre_mlp_layernorm", hidden, kind, learns)
    yield from _linear(model, "linear_fc1", gates * inner, hidden, kind.other_bias)
    yield from _linear(model, "linear_fc2", hidden, inner, kind.other_bias)


def _linear(model: Model, name: str, rows: int, columns: int, bias: bool) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", rows * columns, _learns(model), linear=True)
    if bias:
        yield Parameter(f"{name}.bias", rows, _learns(model))


def _layer_adapters(model: Model, tensor: int) -> Iterator[Parameter]:
    """A [rank, in] and B [out, rank] beside each Hugging Face linear of a layer.

    Where Megatron divides rows, A is whole on every rank and B divided; where it divides columns, the other way round.
    """
    language, rank = model.language, model.lora_rank
    hidden, inner = language.hidden_size, language.intermediate_size // tensor
    queries, keys = (
        heads * language.head_dim // tensor for heads in (language.num_attention_heads, language.num_key_value_heads)
    )
    gates = 2 if layer_kind(language).gated else 1
    by_rows = [(hidden, outputs) for outputs in (queries, keys, keys, *[inner] * gates)]
    by_columns = [(queries, hidden), (inner, hidden)]
    for inputs, outputs in [*by_rows, *by_columns] if rank else []:
        yield Parameter("lora_A", rank * inputs, True)
        yield Parameter("lora_B", rank * outputs, True)


def _tower(model: Model) -> Iterator[Parameter]:
    """A frozen one in one piece; each tensor of one that learns, blocks last. What is not read is frozen."""
    if "vision_tower" not in model.trainable:
        yield Parameter("vision_tower", tower_parameters(model.vision, model.connector), False)
        return
    family, dimensions = model.vision.about, model.vision.dimensions
    for number in range(-1, layer_table(model.vision, model.connector).deepest):
        for name, shape in (family.outer if number < 0 else family.block).items():
            elements = prod(dimensions.get(one, one) for one in shape)
            yield Parameter(f"vision_tower.{name}", elements, name not in family.optional)


def _connector_side(model: Model) -> Iterator[Parameter]:
    yield from _tower(model)
    width, learns = model.language.hidden_size, "connector" in model.trainable
    for name, elements in (
        ("connector.mlp.0.weight", model.connector.input_size(model.vision) * width),
        ("connector.mlp.0.bias", width),
        ("connector.mlp.2.weight", width**2),
        ("connector.mlp.2.bias", width),
    ):
        yield Parameter(name, elements, learns)


def tower_parameters(vision: VisionConfig, connector: ConnectorConfig) -> int:
    """Of the blocks that are built, and of what is around them, used or not."""
    family, dimensions = vision.about, vision.dimensions

    def numbers(shapes) -> int:
        return sum(prod(dimensions.get(one, one) for one in shape) for shape in shapes.values())

    return numbers(family.outer) + layer_table(vision, connector).deepest * numbers(family.block)
