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
    stage 2, gradients, moments and remainders in bf16         103.9     103.9
    the same in FP8                                            113.0     112.8
    stage 1, fp32 gradients and optimizer of the connector      40.0      40.0
    the same in FP8                                             52.9      53.0
    ======================================================  ========  ========

Nothing was measured yet with recomputation, with tensor or pipeline stages, and of the CUDA context (``FIXED``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dc_megatron.config import (
    ConnectorConfig,
    LanguageConfig,
    VisionConfig,
    image_tokens,
    layer_table,
    padded_vocab_size,
)
from dc_megatron.planner.gradient_buffers import Sharding, rank_buffers
from dc_megatron.planner.parameter_count import Model, rank_parameters
from dc_megatron.planner.tower_memory import TowerMemory, learning_tower

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
    # Ranks that share each row: of its positions they hold equal parts, of keys and values all.
    context: int = 1
    sequence_parallel: bool = False
    # All stages encode the images of a step before its pipeline begins (--vision-tower-stages all).
    tower_on_all_stages: bool = False
    # A tower that learns computes its blocks again (--gradient_checkpointing).
    tower_recomputed: bool = False
    newline: bool = False
    lora_rank: int = 0
    # Gradients travel in buckets while others are computed; each may end in padding.
    bucketed: bool = False
    # Megatron's local layers on torch, as on a CPU, in place of Transformer Engine's.
    local_layers: bool = False

    @property
    def model(self) -> Model:
        return Model(
            self.language,
            self.vision,
            self.connector,
            self.trainable,
            self.newline,
            self.lora_rank,
            self.tower_on_all_stages,
        )

    @property
    def own_positions(self) -> float:
        """Those of a micro-batch that a rank holds."""
        return self.positions / self.context

    @property
    def language_learns(self) -> bool:
        return "llm" in self.trainable

    @property
    def tower_learns(self) -> bool:
        return "vision_tower" in self.trainable

    @property
    def keeps_inputs(self) -> bool:
        """Of the decoder's linear layers: for their own gradients, or for those of adapters beside them."""
        return self.language_learns or self.lora_rank > 0


@dataclass(frozen=True)
class Recompute:
    """granularity: none, selective (the MLPs) or full (the first ``layers`` of every chunk of a stage)."""

    granularity: str = "none"
    layers: int = 0


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank. images: what the connector keeps, and a tower that learns. transient: what the worst
    ``moment`` takes beside all that.

    logits: of the head's moment, which counts where it is the worst. Weights and gradients with the padding of buffers.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    images: float
    transient: float
    moment: str
    logits: float

    @property
    def allocated(self) -> float:
        """What PyTorch's allocator holds at its peak."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.images + self.transient

    @property
    def total(self) -> float:
        return self.allocated + FIXED


def stage_memory(run: Run, stage: int, recompute: Recompute = Recompute()) -> StageMemory:
    """Memory of a rank of pipeline stage ``stage`` (from 0)."""
    numbers = run.numbers
    sharding = Sharding(run.data * run.context, numbers.shards_optimizer, run.bucketed)
    held = _held(run.model, run.tensor, run.stages, stage, sharding)
    moments = _moments(run, stage, recompute)
    moment = max(moments, key=moments.get)
    return StageMemory(
        weights=numbers.weight * held.weights + (2 * held.linear if numbers.fp8 else 0),
        gradients=numbers.gradient * held.gradients,
        optimizer=numbers.optimizer * held.updates,
        activations=_activations(run, stage, recompute),
        images=_images(run, stage),
        transient=moments[moment],
        moment=moment,
        logits=moments.get(_HEAD_MOMENT, 0),
    )


@dataclass(frozen=True)
class _Held:
    """Numbers of a rank; weights, gradients: with padding. updates: of the data-parallel rank that has the most."""

    weights: int
    linear: int
    gradients: int
    updates: int


@lru_cache(maxsize=4096)
def _held(model: Model, tensor: int, stages: tuple[tuple[int, ...], ...], stage: int, sharding: Sharding) -> _Held:
    parameters = rank_parameters(model, tensor, stages, stage)
    buffers = rank_buffers(model, tensor, stages, stage, sharding)
    return _Held(
        weights=sum(one.elements for one in parameters) + sum(one.padding for one in buffers),
        linear=sum(one.elements for one in parameters if one.linear),
        gradients=sum(one.numbers for one in buffers),
        updates=max(map(sum, zip(*(one.owned for one in buffers), strict=True)), default=0),
    )


def largest_stage(run: Run, recompute: Recompute = Recompute()) -> StageMemory:
    """Memory of the stage that takes the most."""
    return max((stage_memory(run, stage, recompute) for stage in range(len(run.stages))), key=lambda one: one.total)


@dataclass(frozen=True)
class _Layer:
    """Bytes that one micro-batch leaves behind in a layer: all, of its MLP, and its input alone."""

    all: float
    mlp: float
    input: float
    # Gradients alive at once in its backward pass: of the product, of gate and up, and of two hidden states.
    backward: float


def _layer(run: Run) -> _Layer:
    language, number, learns = run.language, run.numbers.weight, run.keeps_inputs
    hidden = language.hidden_size / (run.tensor if run.sequence_parallel else 1)
    queries = language.num_attention_heads * language.head_dim / run.tensor
    keys = language.num_key_value_heads * language.head_dim / run.tensor
    inner = language.intermediate_size / run.tensor
    # Kept for the gradient of a weight only.
    kept = (1 if run.numbers.fp8 else number) * learns
    # Of two linears behind one norm the norm's output counts once, with attention.
    own_norm = hidden if language.norms_per_layer == 2 else 0
    widths = 2 if language.gated_mlp else 1
    if run.local_layers:
        return _local_layer(run, hidden, queries, inner, widths)
    mlp = widths * inner * number + (own_norm + inner) * kept
    softmax = 4 * language.num_attention_heads / run.tensor
    attention = (2 * queries + run.context * 2 * keys) * number + softmax + hidden * kept
    # Gradients of the whole row's keys and values, before every rank gets its own.
    gathered = run.positions * 2 * keys * number if run.context > 1 else 0
    if run.numbers.fp8 and learns:
        attention += queries
    whole = mlp + attention + language.norms_per_layer * hidden * number
    return _Layer(
        all=run.own_positions * whole,
        mlp=run.own_positions * mlp,
        input=run.own_positions * hidden * number,
        backward=run.own_positions * number * ((widths + 1) * inner + 2 * hidden) + gathered,
    )


def _local_layer(run: Run, hidden: float, queries: float, inner: float, gates: int) -> _Layer:
    """megatron-core's local layers over torch's norms and attention, per position; w: bytes of a number.

        gate and up, and the activation's input and output, 4 f w; inputs and normalised values of both norms in fp32;
        queries, keys and values (a head for each query head) and attention's output 4 q w; sines and cosines; and where
        the layer learns, inputs of its linear layers.

    Equal to what autograd saves (tests/multirank/test_saved_memory.py).
    """
    language, number, learns = run.language, run.numbers.weight, run.keeps_inputs
    mlp = (2 * gates * inner + (inner + hidden) * learns) * number
    norms = 4 * hidden * (2 + 2 * learns) + 8
    attention = (4 * queries + 4 * language.head_dim + (hidden + queries) * learns) * number
    attention += 4 * language.num_attention_heads / run.tensor
    return _Layer(
        all=run.own_positions * (mlp + norms + attention),
        mlp=run.own_positions * mlp,
        input=run.own_positions * hidden * number,
        backward=run.own_positions * number * ((gates + 1) * inner + 2 * hidden),
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
    if stage == len(run.stages) - 1:
        kept += 2 * layer.input  # the final norm's input and output
    return kept


def _images(run: Run, stage: int) -> float:
    """The connector's input, and its hidden layer before and after GELU, of all micro-batches that are under way.

    And what a tower keeps that learns. Where all stages encode images, the input of all micro-batches of the step lies
    on the first stage.
    """
    if stage or "connector" not in run.trainable:
        return 0
    chunks = run.stages[stage]
    under_way = -(-passes_in_flight(len(run.stages), stage, run.micro_batches, len(chunks)) // len(chunks))
    tokens = run.images * image_tokens(run.vision, run.connector) * run.numbers.weight
    joined = run.connector.input_size(run.vision) * (run.micro_batches if run.tower_on_all_stages else under_way)
    kept = tokens * (joined + 2 * run.language.hidden_size * under_way)
    return kept + (under_way * _tower(run).kept if run.tower_learns else 0)


def _tower(run: Run) -> TowerMemory:
    """Of the largest share of a micro-batch's images among the ranks that get the same rows."""
    share = -(-run.images // (run.tensor * run.context))
    return learning_tower(
        run.vision,
        run.connector,
        share,
        run.numbers.weight,
        recomputed=run.tower_recomputed,
        unfused=run.local_layers,
    )


def passes_in_flight(pipeline: int, stage: int, micro_batches: int, virtual: int = 1) -> int:
    """Forward passes (of a micro-batch through a chunk) whose backward pass has not begun, at most.

    1F1B: pipeline - stage. Interleaved: megatron-core's warm-up (schedules.py, get_pp_rank_microbatches) and one more.
    """
    if virtual == 1:
        return min(pipeline - stage, micro_batches)
    return min(2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1, micro_batches * virtual)


_LAYER_MOMENT, _HEAD_MOMENT, _TOWER_MOMENT = "a layer's backward pass", "the head", "the tower"


def _moments(run: Run, stage: int, recompute: Recompute) -> dict[str, float]:
    """What comes and goes: one layer's backward pass, the head's, the tower's forward pass."""
    layer = _layer(run)
    moments = {_LAYER_MOMENT: layer.backward}
    if recompute.granularity == "full" and recompute.layers:
        moments[_LAYER_MOMENT] += layer.all
    elif recompute.granularity == "selective":
        moments[_LAYER_MOMENT] += layer.mlp
    if stage == len(run.stages) - 1:
        moments[_HEAD_MOMENT] = _head(run)
    if stage == 0 and run.tower_learns:
        moments[_TOWER_MOMENT] = _tower(run).moment
    elif stage == 0 and not run.tower_on_all_stages:
        # All its hidden states are there until the connector has chosen. Before the pipeline begins there is room.
        states = layer_table(run.vision, run.connector).deepest + 1
        tokens = -(-run.images // (run.tensor * run.context)) * run.vision.num_patches
        moments[_TOWER_MOMENT] = tokens * states * run.vision.hidden_size * run.numbers.weight
    return moments


def _head(run: Run) -> float:
    """Logits in fp32, what they are made of, and the gradient of the table, before it is added to the buffer."""
    columns = padded_vocab_size(run.language.vocab_size, run.tensor) / run.tensor
    logits = min(4 * run.own_positions * columns, LOGITS)
    table = columns * run.language.hidden_size * run.numbers.weight if run.language_learns else 0
    return 2 * logits + table
