"""What ``tools/plan.py`` prints of plans."""

from __future__ import annotations

import shlex
from dataclasses import asdict

from dc_megatron.planner.job import PRECISIONS, Choice, Job
from dc_megatron.planner.launch import Launch
from dc_megatron.planner.memory import FIXED
from dc_megatron.planner.parameter_count import learning_parameters, total_parameters
from dc_megatron.planner.search import Plan, Verdict
from dc_megatron.planner.speed import DECODER, LINK

_SHOWN = 5


def plan_text(job: Job, verdicts: list[Verdict], launch: Launch | None) -> str:
    """The best plan in full, the next ones in a line each, what was rejected and why, and the command to start it.

    launch: None where nothing fits.
    """
    plans = [one.plan for one in verdicts if one.plan]
    lines = [*job_lines(job), ""]
    if not plans:
        lines += ["Nothing fits:", *_rejected(verdicts), "", "More GPUs, larger ones, or --stage lora may."]
        return "\n".join(lines)
    lines += [*best_lines(job, plans[0]), "", *memory_lines(plans[0]), ""]
    if plans[1:]:
        lines += ["next best:", *(f"  {_line(job, plan)}" for plan in plans[1:_SHOWN]), ""]
    rejected = _rejected(verdicts)
    lines += ["rejected:", *rejected, ""] if rejected else []
    return "\n".join([*lines, "start it with:", launch.text(), "", *caveats(job)])


def checked_text(job: Job, plan: Plan) -> str:
    """What a recipe's flags come to."""
    return "\n".join([*job_lines(job), "", *best_lines(job, plan), "", *memory_lines(plan), "", *caveats(job)])


def plan_json(job: Job, verdicts: list[Verdict], launch: Launch | None) -> dict:
    """The same for machines."""
    return {
        "parameters": total_parameters(job.model),
        "learning": learning_parameters(job.model),
        "plans": [plan_values(job, one.plan) for one in verdicts if one.plan],
        "rejected": [
            {"tensor": one.tensor, "pipeline": one.pipeline, "reason": one.reason} for one in verdicts if not one.plan
        ],
        "command": shlex.join(launch.words()) if launch else None,
        "caveats": caveats(job),
    }


def plan_values(job: Job, plan: Plan) -> dict:
    """One plan as plain values; bytes, seconds and shares of one."""
    return {
        **asdict(plan.choice),
        "data": plan.data,
        "stages": [list(chunks) for chunks in plan.split.stages],
        "stage_times": list(plan.split.times),
        "bubble": plan.time.bubble,
        "recompute": asdict(plan.recompute.recompute),
        "micro_batches": plan.micro_batches,
        "rows": plan.rows,
        "seconds_per_step": plan.time.seconds,
        "tokens_per_second": plan.tokens_per_second,
        "days": plan.days(job),
        "fits": plan.recompute.fits,
        "memory": [{**asdict(one), "fixed": FIXED, "total": one.total} for one in plan.memories],
    }


def job_lines(job: Job) -> list[str]:
    """Model and data."""
    model = job.model
    what = f"LoRA of rank {model.lora_rank} and the connector" if model.lora_rank else " and ".join(model.trainable)
    rows = "packed rows" if job.packed else "rows of one sample"
    return [
        f"model: {model.language.path}, {model.vision.path}, connector {model.connector.dense_connector_type}:"
        f" {total_parameters(model) / 1e9:.2f} billion parameters; {what} learn ({learning_parameters(model) / 1e9:.3f}"
        " billion)",
        f"data: {job.mix.name}, {job.mix.samples:,} samples of about"
        f" {job.mix.sample_positions(job.tiling.most_tokens):.0f} positions, {job.epochs:g} epochs, {rows};"
        f" {job.samples_per_step} samples a step",
        f"machines: {job.gpus} x {job.gpu.name}, {job.gpu.memory / 1e9:.0f} GB each, {job.per_node} a machine",
    ]


def best_lines(job: Job, plan: Plan) -> list[str]:
    """Layout, balance and speed."""
    choice = plan.choice
    note = PRECISIONS[choice.precision].note if choice.precision in PRECISIONS else ""
    times = " : ".join(f"{time:.2f}" for time in plan.split.times)
    layers = " | ".join("+".join(map(str, chunks)) for chunks in plan.split.stages)
    return [
        f"plan: TP {choice.tensor} x PP {choice.pipeline}{_context(choice)} x DP {plan.data}"
        + (f", {choice.virtual} virtual stages" if choice.virtual > 1 else "")
        + f", {choice.precision}{f' ({note})' if note else ''}, optimizer"
        f" {'shared by' if choice.sharded else 'whole on'} the data-parallel ranks",
        f"batch: {plan.rows} rows of {choice.row_length} positions a step, {plan.micro_batches} micro-batches of"
        f" {choice.rows} on each pipeline",
        f"recompute: {plan.recompute.why}",
        f"layers: {layers}; times of the stages {times}; bubble {100 * plan.time.bubble:.0f} % of a step",
        f"speed: about {plan.tokens_per_second:,.0f} positions a second, {plan.time.seconds:.2f} s a step,"
        f" {plan.days(job):.2f} days for the data",
    ]


def _context(choice: Choice) -> str:
    return f" x CP {choice.context}" if choice.context > 1 else ""


def memory_lines(plan: Plan) -> list[str]:
    """A row for each pipeline stage, GB of a GPU."""
    names = ("weights", "gradients", "optimizer", "activations", "images", "transient")
    lines = ["stage  " + "  ".join(f"{name:>11}" for name in (*names, "fixed", "in all")) + "   worst moment (logits)"]
    for stage, memory in enumerate(plan.memories):
        values = [*(getattr(memory, name) for name in names), FIXED, memory.total]
        numbers = "  ".join(f"{value / 1e9:>11.2f}" for value in values)
        logits = f" ({memory.logits / 1e9:.2f})" if memory.logits else ""
        lines.append(f"{stage:<6} {numbers}   {memory.moment}{logits}")
    return lines


def _line(job: Job, plan: Plan) -> str:
    choice, most = plan.choice, max(memory.total for memory in plan.memories)
    virtual = f" x {choice.virtual} virtual" if choice.virtual > 1 else ""
    recompute = plan.recompute.recompute
    again = {"none": "nothing", "selective": "MLPs"}.get(recompute.granularity, f"{recompute.layers} layers a chunk")
    return (
        f"TP {choice.tensor} x PP {choice.pipeline}{virtual}{_context(choice)} x DP {plan.data}, {choice.precision},"
        f" rows of {choice.row_length}: {plan.tokens_per_second:,.0f} positions/s, {plan.days(job):.2f} days,"
        f" {most / 1e9:.0f} GB, {again} recomputed, bubble {100 * plan.time.bubble:.0f} %"
    )


def _rejected(verdicts: list[Verdict]) -> list[str]:
    """One line a reason, with the sizes that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for one in verdicts:
        if not one.plan:
            by_reason.setdefault(one.reason, []).append(f"TP {one.tensor} x PP {one.pipeline}")
    return [f"  {', '.join(sizes)}: {reason}" for reason, sizes in by_reason.items()]


def caveats(job: Job) -> list[str]:
    """What the numbers are worth."""
    return [
        "Estimates. Memory: a formula that was fitted to four peaks on one H200 at TP 1 without recomputation; with TP,"
        " PP, CP, DP, LoRA or recomputation it is unmeasured. Parameters, gradient buffers and optimizer states are"
        " exact.",
        f"Speed: {DECODER:.1%} of {job.gpu.flops / 1e12:.0f} TFLOP/s, as measured on one H200 (54.8 % of a step, 7B,"
        " bf16, benchmarks/results/7b_stage2_h200.json), and"
        f" {LINK / 1e9:.0f} GB/s between tensor-parallel ranks, assumed; several GPUs are unmeasured.",
    ]
