"""What a dry run prints."""

from __future__ import annotations

from dc_megatron.planner.memory import stage_memory
from dc_megatron.training.dry_run import DryRun
from dc_megatron.training.run import Checked


def as_text(checked: Checked, done: DryRun, world_size: int) -> str:
    """One screen."""
    settings, numbers = checked.settings, done.run.numbers
    tensor, pipeline = settings.tensor_model_parallel_size, settings.pipeline_model_parallel_size
    context = f"CP {done.steps.context_parallel_size} x " if done.steps.context_parallel_size > 1 else ""
    lines = [f"note: {note}" for note in done.notes]
    lines += [
        f"model: {checked.language.path} and {checked.vision.path}, connector"
        f" {settings.mm_dense_connector_type}; learning: {', '.join(settings.trainable)}",
        f"job: {world_size} processes = TP {tensor} x PP {pipeline} x {context}DP {done.steps.data_parallel_size}",
        f"batch: {done.steps.global_batch_size} rows of {done.steps.seq_length} a step,"
        f" {done.steps.accumulation_steps} micro-batches of {done.steps.micro_batch_size}",
        "",
        "rank   stage  layers  parameters     learning      weights     gradients   optimizer",
    ]
    for one in done.ranks:
        weights = numbers.weight * (one.parameters + one.buffers - one.trainable)
        sizes = (weights, numbers.gradient * one.buffers, numbers.optimizer * one.updates)
        lines.append(
            f"{one.rank:<6} {one.stage:<6} {'+'.join(map(str, one.layers)):<7} {one.parameters:<14,}"
            f" {one.trainable:<14,} " + "  ".join(f"{size / 1e9:7.2f} GB" for size in sizes)
        )
    language, tower = done.tensors
    peaks = [stage_memory(done.run, stage, done.recompute).total for stage in range(len(done.run.stages))]
    lines += [
        "",
        f"weights table: {language} tensors of the language model and {tower} of the tower have their places",
        f"shapes: a micro-batch went forward and backward through every kind of stage; {done.seconds:.1f} s",
        "the planner counts the same parameters, buffers and optimizer states",
        f"estimated peak of the fullest GPU: {max(peaks) / 1e9:.0f} GB, on stage {peaks.index(max(peaks))}"
        " (python tools/plan.py --check RECIPE says what of)",
    ]
    return "\n".join(lines)
