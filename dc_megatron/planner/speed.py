"""Estimated time of a step. Everything here leans on one measurement on one GPU; what several GPUs add is assumed.

Measured: benchmarks/results/7b_stage2_h200.json, Llama 7B with CLIP-L/336 on one H200 in bf16, nothing recomputed:
1.282e15 operations in 2.365 s, 54.8 % of the data sheet's 989e12 a second, optimizer included. With the tower and the
head weighted as in ``split`` that is DECODER of the data sheet for the decoder's own operations.
Assumed: the same share at any size and on other GPUs; LINK bytes a second between tensor-parallel and between
context-parallel ranks, whose communication nothing hides; gradients and parameters travelling unseen; stages as equal
as the split makes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from dc_megatron.planner.assumed_data import MicroBatch
from dc_megatron.planner.job import Choice, Job
from dc_megatron.planner.parameter_count import learning_parameters
from dc_megatron.planner.split import PipelineSplit, StageCosts

DECODER = 0.555
# NVLink, a part of the 450e9 (H100) each way. An assumption, not measured.
LINK = 250e9


@dataclass(frozen=True)
class StepTime:
    """seconds: of a step. communication: of it, inside tensor- and context-parallel groups.

    bubble: share in which stages wait.
    """

    seconds: float
    communication: float
    bubble: float


def step_time(
    job: Job,
    choice: Choice,
    costs: StageCosts,
    split: PipelineSplit,
    batch: MicroBatch,
    micro_batches: int,
    recomputed: float,
) -> StepTime:
    """recomputed: operations that are done again over the decoder's forward pass."""
    model = job.model
    passes = 3 if "llm" in model.trainable else 2
    layers = [sum(chunks) for chunks in split.stages]
    # Two exchanges of the hidden states forward and two backward, with sequence parallelism each in two halves.
    share = (choice.tensor - 1) / choice.tensor
    positions = batch.most_positions / choice.context
    bytes_of_layer = 4 * 2 * share * positions * model.language.hidden_size * 2
    # Context-parallel ranks gather keys and values of the row, and add their gradients up.
    keys = 2 * model.language.num_key_value_heads * model.language.head_dim / choice.tensor
    bytes_of_layer += 2 * (choice.context - 1) * positions * keys * 2
    talk = max(layers) * bytes_of_layer / LINK * (1 + recomputed / passes)
    times = [costs.layer * count * (1 + recomputed / passes + _adapters(job)) for count in layers]
    times[0] += costs.front
    times[-1] += costs.head
    slowest = max(times) / (DECODER * job.gpu.flops * choice.tensor * choice.context) + talk
    waits = (choice.pipeline - 1) / choice.virtual
    seconds = (micro_batches + waits) * slowest
    return StepTime(seconds, micro_batches * talk, waits / (micro_batches + waits))


def _adapters(job: Job) -> float:
    """Operations of LoRA's adapters beside the frozen decoder's two passes."""
    model = job.model
    if not model.lora_rank:
        return 0.0
    language = model.language
    base = language.hidden_size * language.intermediate_size * 3 * language.num_hidden_layers
    return 1.5 * learning_parameters(model) / base
