"""``--dry-run``: every distinct rank of the job built for real, without memory, weights, data, GPU or other machines.

One process plays one rank after another (see ``dry_rank``). Ranks of a pipeline stage hold the same shapes, and so do
stages between the first and the last with as many layers: one of each kind is built, as its first tensor- and
data-parallel rank and as its last.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from dc_megatron.inference.assemble import build_model
from dc_megatron.planner.assumed_data import MicroBatch
from dc_megatron.planner.gradient_buffers import Sharding
from dc_megatron.planner.memory import Recompute, Run
from dc_megatron.training import auto_choices, dry_checks, dry_rank, engine
from dc_megatron.training.arguments import StepPlan, backend_argv, engine_argv, sharding_argv, typed_options
from dc_megatron.training.planned_job import assumed_steps, planned_model, planned_recompute, sharding
from dc_megatron.training.run import Checked

# Options that the engine refuses where Transformer Engine is not; none of them changes what is built.
_ON_A_GPU = (
    *("--fp8-format", "--fp8-recipe", "--fp8-amax-history-len", "--fp8-amax-compute-algo", "--fp8-margin"),
    *("--use-precision-aware-optimizer", "--main-grads-dtype", "--main-params-dtype"),
    *("--exp-avg-dtype", "--exp-avg-sq-dtype", "--first-last-layers-bf16"),
)
# Options by which the engine would write files or take over signals.
_LEAVES_TRACES = (
    *("--save", "--save-interval", "--tensorboard-dir", "--exit-signal-handler", "--exit-signal"),
    *("--wandb-project", "--wandb-exp-name", "--wandb-save-dir", "--wandb-entity"),
)


@dataclass(frozen=True)
class DryRun:
    """run, recompute: the job in the planner's words. ranks: what was built. seconds: without imports.

    tensors: of the language model's folder, of the tower's.
    """

    steps: StepPlan
    run: Run
    recompute: Recompute
    ranks: tuple[dry_rank.RankCount, ...]
    tensors: tuple[int, int]
    notes: tuple[str, ...]
    seconds: float


def rehearse(checked: Checked, world_size: int) -> DryRun:
    """Build and compare. UserError for what a user can put right; AssertionError where this program contradicts itself.

    The process must have no process groups, and the patches were applied under DC_DEVICE=cpu.
    """
    start = time.perf_counter()
    dry_checks.refuse_unfit_data(checked)
    steps, batch = assumed_steps(checked, world_size)
    chosen = auto_choices.choose_for(checked, steps, batch, None)
    words, left_out = _words(checked, steps, chosen)
    typed, settings, language = typed_options(words), checked.settings, checked.language
    virtual = auto_choices.virtual_stages(typed, settings, language)
    stages = auto_choices.typed_stages(typed, settings, language, virtual)
    with _environment(world_size):
        with dry_rank.quiet():
            args = engine.parse(words, checked)
        ranks, tensors = _build_ranks(checked, args, stages, sharding(typed, steps), batch)
    sharded = sharding_argv(checked.translation, steps.replicas, cuda=True)
    original = typed_options([*sharded, *chosen.applied(checked.start.words)])
    return DryRun(
        steps=steps,
        run=auto_choices.planned_run(checked, steps, batch, stages, original),
        recompute=planned_recompute(original, stages),
        ranks=ranks,
        tensors=tensors,
        notes=(*checked.translation.notes, *checked.start.notes, *chosen.notes, *left_out, *steps.notes),
        seconds=time.perf_counter() - start,
    )


def _words(checked: Checked, steps: StepPlan, chosen: auto_choices.Chosen) -> tuple[list[str], list[str]]:
    """Megatron's words as a job on GPUs has them, but for this machine's layers; notes on what is left out."""
    translation = checked.translation
    words = engine_argv(translation, checked.language, steps, backend_argv(False, False, False))
    own = words[: len(words) - len(translation.megatron_argv)]
    overlap = sharding_argv(translation, steps.replicas, cuda=True)
    own += [word for word in overlap if word not in own]
    options = typed_options([*own, *chosen.applied(checked.start.words)])
    dropped = [name for name in _ON_A_GPU if name in options]
    without = (*dropped, *_LEAVES_TRACES)
    kept = [word for name, values in options.items() if name not in without for word in (name, *values)]
    notes = [f"{' '.join(dropped)}: not in the engine of this dry run, which is without a GPU"] if dropped else []
    return kept, notes


@contextlib.contextmanager
def _environment(world_size: int) -> Iterator[None]:
    """What torchrun would have set, as the engine's parser reads it; behind it, the engine forgets its arguments."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    kept, argv = dict(os.environ), sys.argv
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)
        sys.argv = argv
        destroy_global_vars()
        unset_num_microbatches_calculator()


def distinct_stages(stages: tuple[tuple[int, ...], ...]) -> list[int]:
    """The first, the last, and of those between one of each division into chunks."""
    between = {chunks: stage for stage, chunks in reversed(list(enumerate(stages))) if 0 < stage < len(stages) - 1}
    return sorted({0, len(stages) - 1, *between.values()})


def _build_ranks(
    checked: Checked, args, stages: tuple, shared: Sharding, batch: MicroBatch
) -> tuple[tuple[dry_rank.RankCount, ...], tuple[int, int]]:
    # Of both kinds: a rank's number among those with the same weights.
    tensor, data = args.tensor_model_parallel_size, shared.data
    table = dry_checks.WeightsTable(checked.language, args.padded_vocab_size, tensor)
    ranks, tower = [], 0
    for stage in distinct_stages(stages):
        ends = {(0, 0), (tensor - 1, data - 1)}
        for tensor_rank, data_rank in sorted(ends):
            # Megatron's order of ranks: tensor, then context, then data, then pipeline.
            rank = tensor_rank + tensor * (data_rank + data * stage)
            with dry_rank.as_rank(rank, args.world_size, args):
                chunks = dry_rank.build(_provider(checked, args))
                counted = dry_rank.count(chunks, args)
                dry_checks.refuse_another_count(planned_model(checked), tensor, stages, shared, counted)
                for model in dry_rank.models_of(chunks):
                    table.follow(model)
                    if model.vision_tower is not None:
                        tower = dry_checks.refuse_tower_of_other_names(model, checked)
                if (tensor_rank, data_rank) == (0, 0):
                    _pass_shapes(checked, args, chunks, batch)
            ranks.append(counted)
    unread = table.unread()
    assert not unread, f"no rank reads {sorted(unread)[:4]} of the language model's folder"
    return tuple(ranks), (len(table.expected), tower)


def _pass_shapes(checked: Checked, args, chunks: list, batch: MicroBatch) -> None:
    packed = checked.settings.packing != "none"
    shapes = dry_rank.shapes_of_batch(
        args, checked.vision, checked.tiling, round(batch.images), round(batch.supervised), packed
    )
    dry_rank.pass_shapes(chunks, shapes)


def _provider(checked: Checked, args):
    """As ``model_provider``, and nothing is read."""
    from megatron.training.argument_utils import core_transformer_config_from_args

    def provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
        model = build_model(
            checked.language,
            checked.vision,
            checked.connector,
            config or core_transformer_config_from_args(args),
            vocab_rows=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            transformer_engine=False,
            seed=args.seed,
            tiling=checked.tiling,
            packed=checked.settings.packing != "none",
            lora=checked.lora,
            tower_on_all_stages=checked.settings.vision_tower_stages == "all",
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
        )
        model.set_trainable(set(checked.settings.trainable))
        return model

    return provider
