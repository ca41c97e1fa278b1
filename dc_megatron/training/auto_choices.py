"""What ``--recompute auto`` and ``--pipeline-split auto`` stand for in this run: from its data, model and GPU.

All ranks must choose alike. They see the same data and the same flags; GPUs are taken to be alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dc_megatron.config import LanguageConfig
from dc_megatron.errors import UserError
from dc_megatron.planner.assumed_data import MicroBatch
from dc_megatron.planner.memory import Numbers, Run
from dc_megatron.planner.recompute import choose_recompute
from dc_megatron.planner.split import (
    PipelineSplit,
    balanced_split,
    refuse_too_few_layers,
    stage_costs,
    stages_of_layout,
)
from dc_megatron.training.arguments import StepPlan, sharding_argv, typed_options
from dc_megatron.training.data_plan import Data
from dc_megatron.training.run import Checked
from dc_megatron.training.settings import RunSettings

_VIRTUAL = ("--num-virtual-stages-per-pipeline-rank", "--num-layers-per-virtual-pipeline-stage")
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class Chosen:
    """words: for Megatron's parser, in front of those that were typed. replaced: typed options that they stand for."""

    words: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def applied(self, typed: list[str]) -> list[str]:
        """``typed`` (Megatron's words) with what was chosen."""
        if not self.replaced:
            return [*self.words, *typed]
        kept = {name: values for name, values in typed_options(typed).items() if name not in self.replaced}
        return [*self.words, *(word for name, values in kept.items() for word in (name, *values))]


def refuse_impossible_auto(settings: RunSettings, language: LanguageConfig, typed: list[str]) -> None:
    """UserError for pipeline sizes that cannot be split; before the data is looked at."""
    if settings.pipeline_split == "auto":
        virtual = virtual_stages(typed_options(typed), settings, language)
        refuse_too_few_layers(language.num_hidden_layers, settings.pipeline_model_parallel_size, virtual)


def choose(checked: Checked, data: Data, gpu_memory_bytes: int | None) -> Chosen:
    """Decide whatever is ``auto``. gpu_memory_bytes: of this process's GPU, None on a CPU."""
    if "auto" not in (checked.settings.recompute, checked.settings.pipeline_split):
        return Chosen()
    batch = micro_batch(data, packed=checked.settings.packing != "none")
    return choose_for(checked, data.steps, batch, gpu_memory_bytes)


def choose_for(checked: Checked, steps: StepPlan, batch: MicroBatch, gpu_memory_bytes: int | None) -> Chosen:
    """The same for micro-batches like ``batch``."""
    settings, translation = checked.settings, checked.translation
    sharding = sharding_argv(translation, steps.replicas, gpu_memory_bytes is not None)
    typed = typed_options([*sharding, *translation.megatron_argv])
    virtual = virtual_stages(typed, settings, checked.language)
    words, replaced, notes, stages = (), (), [], None
    if settings.pipeline_split == "auto":
        split = _split(checked, steps, batch, virtual)
        stages, words = split.stages, split.words
        replaced = _VIRTUAL if "--pipeline-model-parallel-layout" in words else ()
        notes.append(_split_note(split, steps.accumulation_steps))
    if settings.recompute == "auto":
        if gpu_memory_bytes is None:
            notes.append("--recompute auto: none, since there is no GPU here whose memory could be too small")
        else:
            stages = stages or typed_stages(typed, settings, checked.language, virtual)
            run = planned_run(checked, steps, batch, stages, typed)
            recompute = choose_recompute(run, batch.length, gpu_memory_bytes)
            words += recompute.words
            notes.append(f"--recompute auto: {recompute.why}")
    return Chosen(words, replaced, tuple(notes))


def micro_batch(data: Data, packed: bool) -> MicroBatch:
    """What a micro-batch holds, on average and at most."""
    lengths, tiles, summary = data.index.lengths.astype(np.float64), data.index.tiles, data.index.summary
    supervised = summary.supervised_tokens / max(1, summary.tokens)
    length = float((lengths**2).sum() / max(1.0, lengths.sum()))
    micro, most = data.steps.micro_batch_size, data.steps.micro_batch_size * data.steps.seq_length
    if packed:
        rows = data.rows.statistics()
        positions, images, most_images = micro * rows.fill * rows.seq_length, rows.tiles_mean, rows.tiles_max
    else:
        positions, images, most_images = micro * float(lengths.mean()), float(tiles.mean()), int(tiles.max())
    return MicroBatch(positions, most, micro * images, micro * most_images, supervised * positions, length)


def _split(checked: Checked, steps: StepPlan, batch: MicroBatch, virtual: int) -> PipelineSplit:
    settings = checked.settings
    costs = stage_costs(
        checked.language,
        checked.vision,
        checked.connector,
        lengths=[batch.length] * max(1, round(batch.positions / batch.length)),
        images=batch.images,
        supervised_tokens=batch.supervised,
        trainable=settings.trainable,
        tensor=settings.tensor_model_parallel_size * settings.context_parallel_size,
        fp8=settings.fp8_format is not None,
        tower_on_all_stages=settings.vision_tower_stages == "all",
    )
    layers, pipeline = checked.language.num_hidden_layers, settings.pipeline_model_parallel_size
    return balanced_split(costs, layers, pipeline, steps.accumulation_steps, virtual)


def _split_note(split: PipelineSplit, micro_batches: int) -> str:
    pipeline = len(split.stages)
    if pipeline == 1:
        return "--pipeline-split auto: there is one pipeline stage, which has all layers"
    layers = " | ".join("+".join(map(str, chunks)) for chunks in split.stages)
    times = " : ".join(f"{time:.2f}" for time in split.times)
    even = ""
    if split.even_time is not None:
        even = " (as many each)" if not split.words else f" (as many each: the slowest takes {split.even_time:.2f})"
    return (
        f"--pipeline-split auto: layers {layers}{even}, estimated times of the stages {times}; bubble"
        f" {100 * split.bubble:.0f} % of a step ({pipeline} stages, {micro_batches} micro-batches)"
    )


def planned_run(
    checked: Checked, steps: StepPlan, batch: MicroBatch, stages: tuple, typed: Mapping[str, list[str]]
) -> Run:
    """What the planner needs of a run. typed: Megatron's options."""
    settings = checked.settings
    return Run(
        language=checked.language,
        vision=checked.vision,
        connector=checked.connector,
        trainable=settings.trainable,
        numbers=numbers(settings, typed),
        positions=batch.most_positions,
        images=batch.most_images,
        stages=stages,
        micro_batches=steps.accumulation_steps,
        tensor=settings.tensor_model_parallel_size,
        data=steps.data_parallel_size,
        context=steps.context_parallel_size,
        sequence_parallel=settings.sequence_parallel,
        tower_on_all_stages=settings.vision_tower_stages == "all",
        tower_recomputed=settings.recomputes_tower,
        newline=checked.tiling.has_newline,
        lora_rank=checked.lora.r if checked.lora else 0,
        bucketed="--overlap-grad-reduce" in typed,
    )


def numbers(settings: RunSettings, typed: Mapping[str, list[str]]) -> Numbers:
    """Bytes of a number by Megatron's flags (arguments.py and optimizer_config.py of 0.19.2).

    A precision-aware optimizer keeps of a bf16 weight's fp32 master what bf16 leaves over, 2 bytes.
    """

    def width(option: str) -> int:
        return _BYTES[typed.get(option, ["fp32"])[0]]

    half = settings.bf16 or settings.fp16
    if settings.bf16:
        short = "--grad-reduce-in-bf16" in typed or width("--main-grads-dtype") == 2
    else:
        short = settings.fp16 and "--accumulate-allreduce-grads-in-fp32" not in typed
    if "--use-precision-aware-optimizer" in typed:
        master = 2 if settings.bf16 else width("--main-params-dtype")
        optimizer = master + width("--exp-avg-dtype") + width("--exp-avg-sq-dtype")
    else:
        optimizer = 12 if half else 8
    return Numbers(
        weight=2 if half else 4,
        gradient=2 if short else 4,
        optimizer=optimizer,
        shards_optimizer="--use-distributed-optimizer" in typed,
        fp8=settings.fp8_format is not None,
    )


def virtual_stages(typed: Mapping[str, list[str]], settings: RunSettings, language: LanguageConfig) -> int:
    """Chunks of a pipeline stage. UserError where the layers of one are given and do not come out even."""
    by_number, by_layers = _VIRTUAL
    if by_number in typed:
        return int(typed[by_number][0])
    if by_layers not in typed:
        return 1
    each, pipeline = int(typed[by_layers][0]), settings.pipeline_model_parallel_size
    if each < 1 or language.num_hidden_layers % (each * pipeline):
        raise UserError(
            f"{by_layers} {each}: {language.num_hidden_layers} layers are no multiple of {each} x {pipeline} stages;"
            f" use {by_number}"
        )
    return language.num_hidden_layers // (each * pipeline)


def typed_stages(
    typed: Mapping[str, list[str]], settings: RunSettings, language: LanguageConfig, virtual: int
) -> tuple[tuple[int, ...], ...]:
    """Layers of each stage's chunks as Megatron's own flags divide them (transformer_block.py)."""
    pipeline, layers = settings.pipeline_model_parallel_size, language.num_hidden_layers
    if "--pipeline-model-parallel-layout" in typed:
        return stages_of_layout(typed["--pipeline-model-parallel-layout"][0], pipeline)
    ends = {0: "--decoder-first-pipeline-num-layers", pipeline - 1: "--decoder-last-pipeline-num-layers"}
    named = {stage: int(typed[name][0]) for stage, name in ends.items() if name in typed}
    if named:
        rest = (layers - sum(named.values())) // max(1, pipeline - len(named))
        counts = [named.get(stage, rest) for stage in range(pipeline)]
    else:
        # Embedding or loss may stand for a layer of the first or the last stage.
        embedding = "--account-for-embedding-in-pipeline-split" in typed
        loss = "--account-for-loss-in-pipeline-split" in typed
        counts = [(layers + embedding + loss) // pipeline] * pipeline
        counts[0] -= embedding
        counts[-1] -= loss
    return tuple((count // virtual,) * virtual for count in counts)
