"""A recipe's flags as a plan: what it would take, without a GPU, weights or data."""

from __future__ import annotations

import os
import subprocess

from dc_megatron.errors import UserError
from dc_megatron.planner.assumed_data import assumed_mix
from dc_megatron.planner.job import Choice, Gpu, Job
from dc_megatron.planner.memory import largest_stage
from dc_megatron.planner.recompute import SPARE, RecomputeChoice
from dc_megatron.planner.search import Plan
from dc_megatron.planner.speed import step_time
from dc_megatron.planner.split import PipelineSplit, bubble, stage_costs, stage_times
from dc_megatron.training import auto_choices
from dc_megatron.training.arguments import sharding_argv, typed_options
from dc_megatron.training.planned_job import assumed_steps, planned_model, planned_recompute
from dc_megatron.training.printed_argv import read_printed
from dc_megatron.training.run import Checked, check


def recipe_words(recipe: str) -> tuple[list[str], int]:
    """(flags, processes) that the recipe would start with in this environment. UserError: it is none, or it refuses."""
    if not os.path.isfile(recipe):
        raise UserError(f"--check {recipe}: no such file")
    environment = {**os.environ, "DC_PRINT_ARGV": "1"}
    done = subprocess.run(["bash", recipe], capture_output=True, text=True, env=environment, timeout=60)
    if done.returncode:
        raise UserError(f"--check {recipe}: {done.stderr.strip() or f'ended with status {done.returncode}'}")
    return read_printed(done.stdout)


def planned(words: list[str], processes: int, gpu: Gpu, per_node: int) -> tuple[Job, Plan]:
    """What ``words`` come to. UserError for whatever a run would refuse before it starts."""
    checked = check([*words, "--dry-run"], processes)
    auto_choices.refuse_impossible_auto(checked.settings, checked.language, checked.translation.megatron_argv)
    steps, batch = assumed_steps(checked, processes)
    chosen = auto_choices.choose_for(checked, steps, batch, gpu.memory)
    sharded = sharding_argv(checked.translation, steps.replicas, cuda=True)
    typed = typed_options([*sharded, *chosen.applied(checked.start.words)])
    virtual = auto_choices.virtual_stages(typed, checked.settings, checked.language)
    stages = auto_choices.typed_stages(typed, checked.settings, checked.language, virtual)
    run = auto_choices.planned_run(checked, steps, batch, stages, typed)
    job = _job(checked, processes, gpu, per_node, steps.seq_length, steps.global_batch_size)
    choice = Choice(
        checked.settings.tensor_model_parallel_size,
        len(stages),
        len(stages[0]),
        steps.micro_batch_size,
        steps.seq_length,
        "the recipe's numbers",
        run.numbers.shards_optimizer,
        steps.context_parallel_size,
    )
    costs = stage_costs(
        checked.language,
        checked.vision,
        checked.connector,
        lengths=[batch.length] * max(1, round(batch.positions / batch.length)),
        images=batch.images,
        supervised_tokens=batch.supervised,
        trainable=checked.settings.trainable,
        tensor=choice.tensor * choice.context,
        fp8=run.numbers.fp8,
    )
    times = stage_times(costs, [sum(chunks) for chunks in stages])
    waiting = bubble(len(stages), steps.accumulation_steps, len(stages[0]))
    split = PipelineSplit(stages, (), tuple(time / max(times) for time in times), None, waiting)
    recompute = _recompute(run, typed, gpu)
    time = step_time(job, choice, costs, split, batch, steps.accumulation_steps, recompute.extra)
    positions = batch.positions * steps.global_batch_size / steps.micro_batch_size
    plan = Plan(
        choice, run, split, recompute, time, batch, steps.accumulation_steps, steps.global_batch_size, positions
    )
    return job, plan


def _job(checked: Checked, processes: int, gpu: Gpu, per_node: int, row_length: int, rows: int) -> Job:
    settings, mix = checked.settings, assumed_mix(checked.settings.trainable)
    packed = settings.packing != "none"
    mean = mix.sample_positions(checked.tiling.most_tokens)
    return Job(
        model=planned_model(checked),
        tiling=checked.tiling,
        mix=mix,
        gpus=processes,
        gpu=gpu,
        per_node=per_node,
        samples_per_step=round(rows * row_length / mean) if packed else rows,
        epochs=settings.num_train_epochs,
        max_length=settings.model_max_length,
        row_lengths=(row_length,),
        packed=packed,
    )


def _recompute(run, typed: dict[str, list[str]], gpu: Gpu) -> RecomputeChoice:
    recompute = planned_recompute(typed, run.stages)
    needed = largest_stage(run, recompute).total
    usable = (1 - SPARE) * gpu.memory
    again = {"none": 0.0, "selective": 0.5}.get(recompute.granularity)
    if again is None:
        layers = sum(min(recompute.layers, chunk) for chunks in run.stages for chunk in chunks)
        again = layers / sum(map(sum, run.stages))
    fits = needed <= usable
    why = (
        f"{recompute.granularity}, as the recipe says; the fullest GPU takes about {needed / 1e9:.1f} GB"
        f" {'of' if fits else 'and has'} {gpu.memory / 1e9:.0f} GB{'' if fits else ': it does not fit'}"
    )
    return RecomputeChoice(recompute, (), needed, again, fits, why)
