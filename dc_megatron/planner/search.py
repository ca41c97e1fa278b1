"""Every way to lay a job out over its GPUs, what speaks against each, and the fastest of those that are left."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from dc_megatron.config import LanguageConfig
from dc_megatron.planner.assumed_data import MicroBatch, assumed_micro_batch
from dc_megatron.planner.job import PRECISIONS, Choice, Job
from dc_megatron.planner.memory import Run, StageMemory, largest_stage, stage_memory
from dc_megatron.planner.recompute import SPARE, RecomputeChoice, choose_recompute
from dc_megatron.planner.speed import StepTime, step_time
from dc_megatron.planner.split import PipelineSplit, StageCosts, balanced_split, stage_costs

# Rows of a step may differ from what the samples make by this share: they are whole, and equally many on all ranks.
_BATCH_TOLERANCE = 0.15


@dataclass(frozen=True)
class Plan:
    """A way that fits, with what it costs. rows: of a step. positions: of samples, of a step."""

    choice: Choice
    run: Run
    split: PipelineSplit
    recompute: RecomputeChoice
    time: StepTime
    batch: MicroBatch
    micro_batches: int
    rows: int
    positions: float

    @property
    def data(self) -> int:
        return self.run.data

    @property
    def memories(self) -> list[StageMemory]:
        """Of every stage."""
        return [stage_memory(self.run, stage, self.recompute.recompute) for stage in range(len(self.run.stages))]

    @property
    def tokens_per_second(self) -> float:
        """Positions of samples, of all GPUs."""
        return self.positions / self.time.seconds

    def days(self, job: Job) -> float:
        """For all epochs of the job's data."""
        total = job.epochs * job.mix.samples * job.mix.sample_positions(job.tiling.most_tokens)
        return total / self.tokens_per_second / 86400


@dataclass(frozen=True)
class Verdict:
    """The best that came of a tensor and a pipeline size: a plan, or why there is none."""

    tensor: int
    pipeline: int
    plan: Plan | None
    reason: str = ""


def search(job: Job) -> list[Verdict]:
    """One verdict for each tensor and pipeline size that a user might think of; plans first, the fastest first."""
    verdicts = [_best(job, tensor, pipeline) for tensor, pipeline in _sizes(job)]
    return sorted(
        verdicts, key=lambda one: (one.plan is None, -one.plan.tokens_per_second if one.plan else 0, one.tensor)
    )


def tensor_obstacle(language: LanguageConfig, tensor: int, per_node: int) -> str:
    """Why ``tensor`` ranks cannot share a layer; "" where they can."""
    sizes = {
        "attention heads": language.num_attention_heads,
        "key-value heads": language.num_key_value_heads,
        "channels of the MLP": language.intermediate_size,
    }
    wrong = [f"{size} {what}" for what, size in sizes.items() if size % tensor]
    if wrong:
        return f"does not divide {' and '.join(wrong)}"
    return f"crosses machines of {per_node} GPUs" if tensor > per_node else ""


def _sizes(job: Job) -> Iterator[tuple[int, int]]:
    """Powers of two and divisors of the layers, as far as the GPUs go."""
    layers = job.model.language.num_hidden_layers
    for tensor in (size for size in (1, 2, 4, 8, 16) if size <= job.gpus):
        for pipeline in range(1, min(layers, job.gpus // tensor) + 1):
            if job.gpus % (tensor * pipeline) == 0 and (layers % pipeline == 0 or pipeline & (pipeline - 1) == 0):
                yield tensor, pipeline


def _best(job: Job, tensor: int, pipeline: int) -> Verdict:
    obstacle = tensor_obstacle(job.model.language, tensor, job.per_node)
    if obstacle:
        return Verdict(tensor, pipeline, None, f"TP {tensor} {obstacle}")
    plans, reasons = [], {}
    for choice in _choices(job, tensor, pipeline):
        found = evaluate(job, choice)
        if isinstance(found, Plan):
            plans.append(found)
        else:
            key, rank = found
            reasons[key] = min(rank, reasons.get(key, rank))
    if plans:
        return Verdict(tensor, pipeline, min(plans, key=_order))
    # What comes closest to a plan says most.
    key = min(reasons, key=lambda one: reasons[one])
    return Verdict(tensor, pipeline, None, key)


def _order(plan: Plan) -> tuple:
    """Faster first, to a percent; of equals plain numbers, fewer virtual stages, less memory."""
    percents = round(100 * math.log(plan.tokens_per_second))
    memory = largest_stage(plan.run, plan.recompute.recompute).total
    return -percents, list(PRECISIONS).index(plan.choice.precision), plan.choice.virtual, memory


def _choices(job: Job, tensor: int, pipeline: int) -> Iterator[Choice]:
    data = job.gpus // (tensor * pipeline)
    layers = job.model.language.num_hidden_layers
    for precision in job.precisions:
        for row_length in job.row_lengths:
            for virtual in (size for size in (1, 2, 3, 4, 5) if size == 1 or (pipeline > 1)):
                if virtual > 1 and layers % (pipeline * virtual):
                    continue
                for rows in (1,) if job.packed else (1, 2, 4, 8, 16):
                    for sharded in (True, False) if data > 1 else (True,):
                        yield Choice(tensor, pipeline, virtual, rows, row_length, precision, sharded)


def evaluate(job: Job, choice: Choice) -> Plan | tuple[str, float]:
    """The plan, or (why not, how far from it: smaller is closer)."""
    precision, language = PRECISIONS[choice.precision], job.model.language
    if precision.needs_sharding and not choice.sharded:
        return f"{choice.precision} needs the distributed optimizer", 1e9
    if choice.row_length % choice.tensor:
        return f"rows of {choice.row_length} positions are no multiple of TP {choice.tensor}", 1e9
    data = job.gpus // (choice.tensor * choice.pipeline)
    rows = _rows(job, choice, data)
    if isinstance(rows, str):
        return rows, 1e6
    micro_batches = rows // (data * choice.rows)
    if choice.virtual > 1 and micro_batches % choice.pipeline:
        return f"virtual stages need micro-batches ({micro_batches}) in multiples of the {choice.pipeline} stages", 1e7
    batch = micro_batch(job, choice)
    costs = _costs(job, choice, batch)
    split = _split(costs, language.num_hidden_layers, choice.pipeline, micro_batches, choice.virtual)
    run = _run(job, choice, split, batch, micro_batches, data)
    recompute = choose_recompute(run, batch.length, job.gpu.memory)
    if not recompute.fits:
        need, least = recompute.needed / 1e9, (1 - SPARE) * job.gpu.memory / 1e9
        return (
            f"needs {need:.0f} GB with everything recomputed; {least:.0f} of {job.gpu.memory / 1e9:.0f} GB are usable",
            (recompute.needed / 1e12),
        )
    time = step_time(job, choice, costs, split, batch, micro_batches, recompute.extra)
    positions = batch.positions * rows / choice.rows
    return Plan(choice, run, split, recompute, time, batch, micro_batches, rows, positions)


def _rows(job: Job, choice: Choice, data: int) -> int | str:
    """Rows of a step; or why the batch cannot be made of them."""
    wanted = job.samples_per_step
    if job.packed:
        wanted = job.samples_per_step * job.mix.sample_positions(job.tiling.most_tokens) / choice.row_length
    each = data * choice.rows
    rows = max(1, round(wanted / each)) * each
    if abs(rows - wanted) > _BATCH_TOLERANCE * wanted:
        return (
            f"a batch of {job.samples_per_step} samples is {wanted:.0f} rows of {choice.row_length}, and {data}"
            f" data-parallel ranks take multiples of {each}"
        )
    return rows


def micro_batch(job: Job, choice: Choice) -> MicroBatch:
    """What a micro-batch of the choice holds."""
    tiles = max([1, *(job.tiling.of(*size).tiles for size in job.tiling.pinpoints)])
    return assumed_micro_batch(job.mix, job.tiling.most_tokens, tiles, choice.rows, choice.row_length, job.packed)


@lru_cache(maxsize=1024)
def _costs(job: Job, choice: Choice, batch: MicroBatch) -> StageCosts:
    model = job.model
    return stage_costs(
        model.language,
        model.vision,
        model.connector,
        lengths=[batch.length] * max(1, round(batch.positions / batch.length)),
        images=batch.images,
        supervised_tokens=batch.supervised,
        trainable=model.trainable,
        tensor=choice.tensor,
        fp8=PRECISIONS[choice.precision].numbers.fp8,
    )


_split = lru_cache(maxsize=4096)(balanced_split)


def _run(job: Job, choice: Choice, split: PipelineSplit, batch: MicroBatch, micro_batches: int, data: int) -> Run:
    model = job.model
    return Run(
        language=model.language,
        vision=model.vision,
        connector=model.connector,
        trainable=model.trainable,
        numbers=replace(PRECISIONS[choice.precision].numbers, shards_optimizer=choice.sharded),
        positions=batch.most_positions,
        images=batch.most_images,
        stages=split.stages,
        micro_batches=micro_batches,
        tensor=choice.tensor,
        data=data,
        sequence_parallel=choice.tensor > 1,
        newline=model.newline,
        lora_rank=model.lora_rank,
        bucketed=choice.sharded and data > 1,
    )
