"""Bytes of GPU memory that training takes on one rank, pipeline stage by pipeline stage. 1 GB is 1e9 bytes.

Saved for the backward pass by Transformer Engine's layers (megatron-core 0.19.2), per position and layer, with h the
hidden size, q and k the widths of queries and keys, f the intermediate size, w the bytes of a number:

    inputs of both norms 2 h w; queries, keys, values and attention's output (2 q + 2 k) w; softmax sums 4 a head;
    gate and up 2 f w; and where the layer learns, inputs of its linear layers: norm outputs 2 h w, product f w.

In FP8 those inputs take 1 byte (attention's output is kept twice then), and each linear weight has two copies of 1 byte
(rows and columns), learning or not.

Against ``benchmarks/results/7b_stage*_h200.json`` (Llama 7B, CLIP-L/14-336, dci, one H200, packed rows of 8192, bf16,
nothing recomputed; peaks of PyTorch's allocator, so ``StageMemory.allocated``, not ``total``):

    ======================================================  ========  ========
    GB                                                      measured  estimate
    ======================================================  ========  ========
    stage 2, gradients, moments and remainders in bf16         103.9     103.8
    the same in FP8                                            113.0     112.8
    stage 1, fp32 gradients and optimizer of the connector      40.0      40.0
    the same in FP8                                             52.9      53.0
    ======================================================  ========  ========

Nothing was measured yet with recomputation, with tensor or pipeline stages, and of the CUDA context (``FIXED``).
"""

from __future__ import annotations

from dataclasses import dataclass

from dc_megatron.config import (
    ConnectorConfig,
    LanguageConfig,
    VisionConfig,
    image_tokens,
    layer_table,
    padded_vocab_size,
)
from dc_megatron.planner.flops import linear_parameters

# CUDA context, NCCL and cuBLAS workspaces, which PyTorch's allocator does not count. An allowance, not measured.
FIXED = 3e9
# The head's fp32 logits are never more at once: dc_megatron/model/loss_head.py, CHUNK_BYTES.
LOGITS = 256 << 20


@dataclass(frozen=True)
class Numbers:
    """Bytes of a number: of weights and activations, of gradients, and of all that the optimizer keeps for a weight.

    shards_optimizer: data-parallel ranks share the optimizer's part (--use-distributed-optimizer).
    """

    weight: int = 2
    gradient: int = 4
    optimizer: int = 12
    shards_optimizer: bool = False
    fp8: bool = False


@dataclass(frozen=True)
class Run:
    """What memory depends on. positions, images (tiles): of one micro-batch, at most.

    stages: for each pipeline stage the decoder layers of its chunks, (32,) alone without virtual stages.
    """

    language: LanguageConfig
    vision: VisionConfig
    connector: ConnectorConfig
    trainable: tuple[str, ...]
    numbers: Numbers
    positions: int
    images: float
    stages: tuple[tuple[int, ...], ...]
    micro_batches: int = 1
    tensor: int = 1
    data: int = 1
    sequence_parallel: bool = False
    # All stages encode the images of a step before its pipeline begins (--vision-tower-stages all).
    tower_on_all_stages: bool = False

    @property
    def language_learns(self) -> bool:
        return "llm" in self.trainable


@dataclass(frozen=True)
class Recompute:
    """granularity: none, selective (the MLPs) or full (the first ``layers`` of every chunk of a stage)."""

    granularity: str = "none"
    layers: int = 0


@dataclass(frozen=True)
class StageMemory:
    """Bytes. transient: what the worst moment takes beside all that is kept (the head, or one layer's backward)."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    transient: float

    @property
    def allocated(self) -> float:
        """What PyTorch's allocator holds at its peak."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.transient

    @property
    def total(self) -> float:
        return self.allocated + FIXED


def stage_memory(run: Run, stage: int, recompute: Recompute = Recompute()) -> StageMemory:
    """Memory of a rank of pipeline stage ``stage`` (from 0)."""
    numbers = run.numbers
    language, frozen, linear = _language_parameters(run, stage)
    joined = _connector_parameters(run) if stage == 0 else 0
    learning = (language if run.language_learns else 0) + (joined if "connector" in run.trainable else 0)
    copies = 2 * linear if numbers.fp8 else 0
    optimizer = numbers.optimizer * learning / (run.data if numbers.shards_optimizer else 1)
    return StageMemory(
        weights=numbers.weight * (language + joined + frozen) + copies,
        gradients=numbers.gradient * learning,
        optimizer=optimizer,
        activations=_activations(run, stage, recompute),
        transient=_transient(run, stage, recompute),
    )


def largest_stage(run: Run, recompute: Recompute = Recompute()) -> StageMemory:
    """Memory of the stage that takes the most."""
    return max((stage_memory(run, stage, recompute) for stage in range(len(run.stages))), key=lambda one: one.total)


def _language_parameters(run: Run, stage: int) -> tuple[float, float, float]:
    """(parameters of this rank's part of the language model, of the frozen tower beside it, of its linear layers)."""
    language, last = run.language, len(run.stages) - 1
    layers = sum(run.stages[stage])
    linear = layers * linear_parameters(language) / language.num_hidden_layers / run.tensor
    table = padded_vocab_size(language.vocab_size, run.tensor) * language.hidden_size / run.tensor
    # A tied head is one more table only where it is not on the embedding's stage.
    tables = (stage == 0) + (stage == last and not (language.tie_word_embeddings and last == 0))
    vectors = _vectors(run, layers, stage == last)
    has_tower = stage == 0 or run.tower_on_all_stages
    return linear + tables * table + vectors, _tower_parameters(run) if has_tower else 0, linear


def _vectors(run: Run, layers: int, last: bool) -> float:
    """Parameters of norms and of biases, of which those of divided outputs are divided too."""
    language, hidden = run.language, run.language.hidden_size
    fused = (language.num_attention_heads + 2 * language.num_key_value_heads) * language.head_dim / run.tensor
    biases = fused * (language.qkv_bias or language.linear_bias)
    if language.linear_bias:
        biases += language.intermediate_size / run.tensor + 2 * hidden
    norms = hidden * (1 + language.layer_norm)
    of_layers = layers * (language.norms_per_layer * norms + 2 * language.head_dim * language.qk_norm + biases)
    head = padded_vocab_size(language.vocab_size, run.tensor) / run.tensor if language.linear_bias else 0
    return of_layers + last * (norms + head)


def _tower_parameters(run: Run) -> int:
    vision, width = run.vision, run.vision.hidden_size
    layer = 4 * width**2 + 2 * width * vision.intermediate_size
    inputs = width * (3 * vision.patch_size**2 + vision.num_patches + vision.num_prefix_tokens)
    return inputs + layer_table(vision, run.connector).deepest * layer


def _connector_parameters(run: Run) -> int:
    """Every tensor-parallel rank has all of them."""
    width = run.language.hidden_size
    return width * (run.connector.input_size(run.vision) + width + 2)


@dataclass(frozen=True)
class _Layer:
    """Bytes that one micro-batch leaves behind in a layer: all, of its MLP, and its input alone."""

    all: float
    mlp: float
    input: float
    # Gradients alive at once in its backward pass: of the product, of gate and up, and of two hidden states.
    backward: float


def _layer(run: Run) -> _Layer:
    language, number, learns = run.language, run.numbers.weight, run.language_learns
    hidden = language.hidden_size / (run.tensor if run.sequence_parallel else 1)
    queries = language.num_attention_heads * language.head_dim / run.tensor
    keys = language.num_key_value_heads * language.head_dim / run.tensor
    inner = language.intermediate_size / run.tensor
    # Kept for the gradient of a weight only.
    kept = (1 if run.numbers.fp8 else number) * learns
    # Of two linears behind one norm the norm's output counts once, with attention.
    own_norm = hidden if language.norms_per_layer == 2 else 0
    widths = 2 if language.gated_mlp else 1
    mlp = widths * inner * number + (own_norm + inner) * kept
    softmax = 4 * language.num_attention_heads / run.tensor
    attention = (2 * queries + 2 * keys) * number + softmax + hidden * kept
    if run.numbers.fp8 and learns:
        attention += queries
    whole = mlp + attention + language.norms_per_layer * hidden * number
    return _Layer(
        all=run.positions * whole,
        mlp=run.positions * mlp,
        input=run.positions * hidden * number,
        backward=run.positions * number * ((1 + widths) * inner + 2 * hidden),
    )


def _activations(run: Run, stage: int, recompute: Recompute) -> float:
    """Bytes kept for backward passes to come, of all micro-batches that are under way in this stage."""
    layer, chunks = _layer(run), run.stages[stage]
    each = layer.all - (layer.mlp if recompute.granularity == "selective" else 0)
    whole = recompute.layers if recompute.granularity == "full" else 0
    of_chunks = sum(min(whole, layers) * layer.input + (layers - min(whole, layers)) * each for layers in chunks) / len(
        chunks
    )
    passes = passes_in_flight(len(run.stages), stage, run.micro_batches, len(chunks))
    kept = passes * of_chunks
    if stage == 0 and "connector" in run.trainable:
        # Its input, and its hidden layer before and after GELU.
        widths = run.connector.input_size(run.vision) + 2 * run.language.hidden_size
        tokens = run.images * image_tokens(run.vision, run.connector)
        kept += tokens * widths * run.numbers.weight * -(-passes // len(chunks))
    if stage == 0 and run.tower_on_all_stages:
        # What enters the connector, of all micro-batches of the step.
        tokens = run.micro_batches * run.images * image_tokens(run.vision, run.connector)
        kept += tokens * run.connector.input_size(run.vision) * run.numbers.weight
    if stage == len(run.stages) - 1:
        kept += 2 * layer.input  # the final norm's input and output
    return kept


def passes_in_flight(pipeline: int, stage: int, micro_batches: int, virtual: int = 1) -> int:
    """Forward passes (of a micro-batch through a chunk) whose backward pass has not begun, at most.

    1F1B: pipeline - stage. Interleaved: megatron-core's warm-up (schedules.py, get_pp_rank_microbatches) and one more.
    """
    if virtual == 1:
        return min(pipeline - stage, micro_batches)
    return min(2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1, micro_batches * virtual)


def _transient(run: Run, stage: int, recompute: Recompute) -> float:
    """The most of what comes and goes: one layer's backward pass, the head's, or the tower's forward pass."""
    layer = _layer(run)
    moments = [layer.backward]
    if recompute.granularity == "full" and recompute.layers:
        moments = [layer.backward + layer.all]
    elif recompute.granularity == "selective":
        moments = [layer.backward + layer.mlp]
    if stage == len(run.stages) - 1:
        moments.append(_head(run))
    if stage == 0 and not run.tower_on_all_stages:
        # All its hidden states are kept until the connector has chosen. Before the pipeline begins there is room.
        states = layer_table(run.vision, run.connector).deepest + 1
        tokens = -(-run.images // run.tensor) * run.vision.num_patches
        moments.append(tokens * states * run.vision.hidden_size * run.numbers.weight)
    return max(moments)


def _head(run: Run) -> float:
    """Logits in fp32, what they are made of, and the gradient of the table, before it is added to the buffer."""
    columns = padded_vocab_size(run.language.vocab_size, run.tensor) / run.tensor
    logits = min(4 * run.positions * columns, LOGITS)
    table = columns * run.language.hidden_size * run.numbers.weight if run.language_learns else 0
    return 2 * logits + table
