"""A checked command line in the planner's words, for data like LLaVA-1.5's. No torch."""

from __future__ import annotations

from dc_megatron.planner.assumed_data import MicroBatch, assumed_micro_batch, assumed_mix
from dc_megatron.planner.gradient_buffers import Sharding
from dc_megatron.planner.memory import Recompute
from dc_megatron.planner.parameter_count import Model
from dc_megatron.training.arguments import StepPlan, plan_steps
from dc_megatron.training.run import Checked


def assumed_steps(checked: Checked, world_size: int) -> tuple[StepPlan, MicroBatch]:
    """Batches and steps for data like LLaVA-1.5's, and what a micro-batch of it holds."""
    settings, tiling = checked.settings, checked.tiling
    mix = assumed_mix(settings.trainable)
    tokens = tiling.most_tokens
    mean = min(mix.sample_positions(tokens), settings.model_max_length)
    first = plan_steps(settings, 1, world_size, mean)
    packed = settings.packing != "none"
    positions = mix.samples * (mean if packed else first.seq_length) * settings.num_train_epochs
    rows = max(1, round(positions / first.seq_length))
    steps = plan_steps(settings, rows if settings.max_steps is None else None, world_size, mean)
    tiles = max([1, *(tiling.of(*size).tiles for size in tiling.pinpoints)])
    return steps, assumed_micro_batch(mix, tokens, tiles, steps.micro_batch_size, steps.seq_length, packed)


def sharding(typed: dict[str, list[str]], steps: StepPlan) -> Sharding:
    """How Megatron's options lay out gradients and optimizer."""

    def number(option: str) -> int | None:
        return int(typed[option][0]) if option in typed else None

    return Sharding(
        data=steps.replicas,
        distributed="--use-distributed-optimizer" in typed,
        bucketed="--overlap-grad-reduce" in typed,
        bucket_size=number("--ddp-bucket-size"),
        buckets=number("--ddp-num-buckets"),
        fast_padding="--ddp-pad-buckets-for-high-nccl-busbw" in typed,
    )


def planned_model(checked: Checked) -> Model:
    """The run's model in the planner's words."""
    return Model(
        checked.language,
        checked.vision,
        checked.connector,
        checked.settings.trainable,
        newline=checked.tiling.has_newline,
        lora_rank=checked.lora.r if checked.lora else 0,
        tower_on_all_stages=checked.settings.vision_tower_stages == "all",
    )


def planned_recompute(typed: dict[str, list[str]], stages: tuple[tuple[int, ...], ...]) -> Recompute:
    """What Megatron's options compute again; what is selected beside the MLP counts as nothing (see memory.py)."""
    granularity = typed.get("--recompute-granularity", ["none"])[0]
    if granularity == "selective":
        return Recompute("selective" if "mlp" in typed.get("--recompute-modules", []) else "none")
    if granularity != "full":
        return Recompute()
    deepest = max(layers for chunks in stages for layers in chunks)
    block = typed.get("--recompute-method", ["uniform"])[0] == "block"
    return Recompute("full", int(typed["--recompute-num-layers"][0]) if block else deepest)
