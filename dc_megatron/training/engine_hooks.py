"""The functions of megatron.training that are wrapped, because the engine has no callbacks.

Each row names its target, the wrapper, the condition and why; a drift test checks that the targets exist.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from megatron.training import checkpointing, get_args, get_tensorboard_writer, print_rank_0

from dc_megatron.data.loader import MicroBatches
from dc_megatron.errors import UserError
from dc_megatron.training.forward_step import LOSS_NAME
from dc_megatron.training.fp8_band import Fp8Band
from dc_megatron.training.metrics import COUNTS, Clock, MetricsFile, StepCounts, progress_line
from dc_megatron.training.model_provider import trained_connector
from dc_megatron.training.parameter_groups import fill_moments, group_overrides, present_rates
from dc_megatron.training.resume import what_learns
from dc_megatron.training.run import Checked
from dc_megatron.training.sample_pictures import SamplePictures
from dc_megatron.training.stall_watch import StallWatch
from dc_megatron.training.step_images import StepImages
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.frozen_base import hash_base
from dc_megatron.weights.projector_files import write_projector
from dc_megatron.weights.staged_iteration import StagedIteration


@dataclass
class Session:
    """What the hooks share during one run."""

    checked: Checked
    plan_hash: str
    images_of_an_epoch: int
    dropped_samples: int
    counts: StepCounts
    clock: Clock
    stall: StallWatch
    loaders: list[MicroBatches]
    # Where all stages encode images: the iterator of this rank's first chunk.
    step_images: list[StepImages] = field(default_factory=list)
    validation_counts: StepCounts = field(default_factory=StepCounts)
    # The last step of this run, and (step, result) of the last evaluation.
    iteration: int | None = None
    evaluated: tuple[int | None, tuple] | None = None
    metrics: MetricsFile | None = None
    pictures: SamplePictures | None = None
    band: Fp8Band | None = None
    tower_hash: str | None = None
    # Below adapters: file -> hash of the frozen language model's weights.
    base_files: dict[str, str] | None = None
    # Tokens that the run has seen since step 0, over all its resumes.
    consumed_tokens: dict[str, int] = field(default_factory=lambda: {"processed": 0, "supervised": 0})
    # Megatron's, of this rank: its groups say how fast each part learns.
    optimizer: MegatronOptimizer | None = None
    # Called with the folder and the iteration's place after a save, where somebody else wants to hear of it.
    saved_elsewhere: Callable[[str, str], None] | None = None


@dataclass(frozen=True)
class Hook:
    """A function of the engine that is called through ``wrapper(original, session)``."""

    target: str
    wrapper: Callable
    condition: str
    why: str


class BadImages:
    """Stops the run where more images had to be replaced than the user allows."""

    def __init__(self, allowed_rate: float, images_of_an_epoch: int):
        self._rate, self._epoch = allowed_rate, images_of_an_epoch
        self._images = self._bad = 0

    def add(self, images: int, bad: int) -> None:
        self._images += images
        self._bad += bad
        if self._bad > self._rate * max(self._images, self._epoch):
            raise UserError(
                f"--max-bad-sample-rate {self._rate}: {self._bad} of {self._images} images so far could not be decoded"
                " (warnings above name the files); repair or remove them, or raise the rate"
            )


def _log_hook(original: Callable, session: Session) -> Callable:
    """``training_log`` and, after it, metrics.jsonl and the progress line."""
    bad_images = BadImages(session.checked.settings.max_bad_sample_rate, session.images_of_an_epoch)
    on_terminal = sys.stdout.isatty()
    waited = 0.0

    def training_log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs):
        nonlocal waited
        engine = get_args()
        last_rank = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        if on_terminal and last_rank and iteration % engine.log_interval == 0:
            print("\r\x1b[K", end="", flush=True)
        rates = part_rates(session)
        # Megatron knows no rate where every part that learns has one of its own.
        learning_rate = rates["lr"] if learning_rate is None else learning_rate
        result = original(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)
        session.stall.alive()
        total_wait = max((loader.data_wait_seconds for loader in session.loaders), default=0.0)
        session.iteration = iteration
        totals = _summed(session.counts, rates, total_wait - waited)
        waited = total_wait
        session.consumed_tokens["processed"] += int(totals["tokens"])
        session.consumed_tokens["supervised"] += int(totals["supervised_tokens"])
        bad_images.add(int(totals["images"]), int(totals["substituted_images"]))
        if not last_rank:
            return result
        loss = loss_dict[LOSS_NAME].item() if LOSS_NAME in loss_dict else None
        grad_norm = kwargs.get("grad_norm", args[3] if len(args) > 3 else None)
        seconds = session.clock.lap()
        entry = {
            "iteration": iteration,
            "loss": loss,
            **{name: totals[name] for name in rates},
            "grad_norm": float(grad_norm) if grad_norm is not None else None,
            "samples": int(totals["samples"]),
            "supervised_tokens": int(totals["supervised_tokens"]),
            "tokens": int(totals["tokens"]),
            # Positions that were computed, padding among them.
            "positions": int(totals["positions"]),
            "images": int(totals["images"]),
            "substituted_images": int(totals["substituted_images"]),
            "dropped_samples": session.dropped_samples,
            "step_seconds": round(seconds, 6),
            "data_wait_seconds": round(totals["wait"], 6),
        }
        if engine.fp16:
            # As the engine's log: the scale of the next step, which an overflow has lowered (from the second one on).
            entry["loss_scale"], entry["skipped"] = float(args[0]), bool(args[2])
        if session.band is not None:
            entry["fp8_loss_difference"] = session.band.take()
        if session.metrics is not None:
            session.metrics.write(entry)
        writer = get_tensorboard_writer()
        if writer is not None and iteration % engine.tensorboard_log_interval == 0:
            for name in ("samples", "tokens", "supervised_tokens", "images"):
                writer.add_scalar(f"throughput/{name} per second", entry[name] / seconds, iteration)
            writer.add_scalar("throughput/data wait seconds", entry["data_wait_seconds"], iteration)
            for name in rates.keys() - {"lr"}:
                writer.add_scalar(f"learning-rate/{name.removeprefix('lr_')}", entry[name], iteration)
        if on_terminal:
            print("\r\x1b[K" + progress_line(iteration, engine.train_iters, loss, seconds), end="", flush=True)
        return result

    return training_log


def part_rates(session: Session) -> dict[str, float]:
    """Names in metrics.jsonl -> learning rates of this rank's groups; 0 where it has none, the same names on all ranks.

    ``lr`` is that of --learning_rate, or the connector's where nothing learns at it. Parts with a rate of their own
    follow, as ``lr_connector``.
    """
    settings = session.checked.settings
    base, parts = present_rates(session.optimizer.param_groups, settings.learning_rate, settings.own_rates)
    own = {f"lr_{part}": parts.get(part, 0.0) for part in settings.own_rates}
    if set(settings.trainable) <= set(settings.own_rates):
        base = own["lr_connector"]
    return {"lr": base or 0.0, **own}


def _summed(step_counts: StepCounts, rates: dict[str, float] | None = None, wait: float = 0.0) -> dict[str, float]:
    """Counts of all ranks, ``rates``, and what counting ranks waited for data on average, known to every rank alike.

    Rows are counted once a data-parallel rank, on the first stage and first tensor-parallel rank; replaced images on
    every rank that decodes: the others count none. Rank 0 always has parameters that learn or an optimizer group, so
    the rates are its.
    """
    from megatron.core import parallel_state

    rates, counts = rates or {}, step_counts.take()
    counting = (
        parallel_state.get_pipeline_model_parallel_rank() == 0 and parallel_state.get_tensor_model_parallel_rank() == 0
    )
    values = [counts[name] if counting or name == "substituted_images" else 0 for name in COUNTS]
    values.append(wait / parallel_state.get_data_parallel_world_size() if counting else 0.0)
    values += [rate if torch.distributed.get_rank() == 0 else 0.0 for rate in rates.values()]
    summed = torch.tensor(values, dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(summed)
    return dict(zip([*COUNTS, "wait", *rates], summed.tolist(), strict=True))


def _optimizer_hook(original: Callable, session: Session) -> Callable:
    """``get_megatron_optimizer`` with a learning rate for each part, and Hugging Face's rule of what decays."""

    def get_megatron_optimizer(config, model_chunks, config_overrides=None, **more):
        overrides = group_overrides(config, session.checked.settings.own_rates, config_overrides)
        session.optimizer = original(config, model_chunks, config_overrides=overrides, **more)
        return session.optimizer

    return get_megatron_optimizer


def _step_hook(original: Callable, session: Session) -> Callable:
    """``train_step`` after the images of its micro-batches were encoded, where all stages do that together."""

    def train_step(forward_step_func, data_iterator, model, *args, **kwargs):
        for images in session.step_images:
            images.encode(unwrap_model(model)[0], get_num_microbatches())
        return original(forward_step_func, data_iterator, model, *args, **kwargs)

    return train_step


def _evaluate_hook(original: Callable, session: Session) -> Callable:
    """``evaluate``, and its loss in metrics.jsonl; the evaluation at the end of a run is not made twice."""

    def evaluate(forward_step_func, data_iterator, model, *args, **kwargs):
        iteration = session.iteration
        if session.evaluated is not None and session.evaluated[0] == iteration:
            return session.evaluated[1]
        started = time.perf_counter()
        session.stall.alive()
        result = original(forward_step_func, data_iterator, model, *args, **kwargs)
        losses, _, out_of_time = result
        if out_of_time:
            return result
        session.evaluated = (iteration, result)
        counts = _summed(session.validation_counts)
        if session.metrics is not None and iteration is not None:
            session.metrics.write(
                {
                    "iteration": iteration,
                    "eval_loss": losses[LOSS_NAME].item(),
                    "eval_samples": int(counts["samples"]),
                    "eval_supervised_tokens": int(counts["supervised_tokens"]),
                    "eval_images": int(counts["images"]),
                    "eval_substituted_images": int(counts["substituted_images"]),
                    "eval_seconds": round(time.perf_counter() - started, 6),
                }
            )
        if session.pictures is not None and iteration is not None:
            session.pictures.write(model[0], iteration, get_tensorboard_writer())
        session.stall.alive()
        session.clock.lap()
        return result

    return evaluate


def _save_hook(original: Callable, session: Session) -> Callable:
    """``save_checkpoint`` beside the iteration's place, and the rename that puts it there when all of it is on disk."""

    def save_checkpoint(iteration, model, *args, **kwargs):
        start, engine, rank = session.checked.start, get_args(), torch.distributed.get_rank()
        folder = engine.save
        own = os.path.realpath(start.folder) == os.path.realpath(folder)
        if start.resumes and start.iteration == iteration and own:
            # A finished run that was started again has trained nothing; its checkpoint is complete already.
            return None
        staged = StagedIteration(folder, iteration)
        session.stall.alive()
        if rank == 0:
            staged.begin()
        torch.distributed.barrier()
        engine.save = staged.root
        fill_moments(session.optimizer)
        try:
            result = original(iteration, model, *args, **kwargs)
        finally:
            engine.save = folder
        _hash_base(session)
        digests: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(digests, staged.digests_of_rank(rank))
        if rank == 0:
            _write_side_files(session, folder, unwrap_model(model))
            staged.publish(_position(session), {name: own[name] for own in digests for name in own})
            print(f"checkpoint of iteration {iteration} is complete: {staged.place}", flush=True)
        if session.pictures is not None:
            session.pictures.write(model[0], iteration, get_tensorboard_writer())
        if session.saved_elsewhere is not None:
            session.saved_elsewhere(folder, staged.place)
            session.saved_elsewhere = None
        session.stall.alive()
        session.clock.lap()
        return result

    return save_checkpoint


def _hash_base(session: Session) -> None:
    """Hash the model below adapters, once a run: all ranks together."""
    settings = session.checked.settings
    if session.checked.lora is None or session.base_files is not None:
        return
    found: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, hash_base(settings.model_name_or_path))
    session.base_files = {name: own[name] for own in found for name in own}
    for own in found:
        for name, digest in own.items():
            if session.base_files[name] != digest:
                raise UserError(f"--model_name_or_path {settings.model_name_or_path}: {name} differs between nodes")


def _write_side_files(session: Session, folder: str, chunks: list) -> None:
    checked, settings = session.checked, session.checked.settings
    if session.tower_hash is None:
        session.tower_hash = checkpoint_folder.hash_folder_weights(settings.vision_tower)
    connector = trained_connector(chunks)
    if connector is not None:
        write_projector(
            folder,
            connector,
            checked.connector,
            checked.vision,
            tower_hash=session.tower_hash,
            tower_trained=chunks[0].tower_is_stored,
        )
    description = checkpoint_folder.CheckpointDescription(
        vision_tower=settings.vision_tower,
        vision_tower_hash=session.tower_hash,
        mm_dense_connector_type=settings.mm_dense_connector_type,
        mm_projector_type=settings.mm_projector_type,
        mm_vision_select_layer=settings.mm_vision_select_layer,
        version=settings.version,
        image_aspect_ratio=settings.image_aspect_ratio,
        model_max_length=settings.model_max_length,
        image_grid_pinpoints=[list(size) for size in checked.tiling.pinpoints] or None,
        mm_patch_merge_type=checked.tiling.merge,
        **_adapters_described(session),
    )
    checkpoint_folder.write_side_files(folder, settings.model_name_or_path, description)


def _adapters_described(session: Session) -> dict:
    lora = session.checked.lora
    if lora is None:
        return {}
    return {
        "lora_r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "language_model": session.checked.settings.model_name_or_path,
        "language_model_files": session.base_files,
    }


def _position(session: Session) -> dict:
    """What the manifest says about an iteration besides its files."""
    engine = get_args()
    return {
        "plan_hash": session.plan_hash,
        "consumed_samples": engine.consumed_train_samples,
        "consumed_tokens": dict(session.consumed_tokens),
        "global_batch_size": engine.global_batch_size,
        "learning": what_learns(session.checked.settings),
    }


def _load_hook(original: Callable, session: Session) -> Callable:
    """The engine's choice of a tree, made by what the manifests said.

    The engine believes its tracker instead, even under --ckpt-step: one that is truncated ends the run with status 0,
    and one that says ``release`` hides every iteration.
    """

    def _load_base_checkpoint(load_dir, args, rank0=False, sharded_state_dict=None, checkpointing_context=None, **more):
        start = session.checked.start
        if not start.loads or load_dir != start.folder:
            return original(load_dir, args, rank0, sharded_state_dict, checkpointing_context, **more)
        release = start.iteration is None
        iteration = start.iteration or 0
        checkpointing.set_loaded_iteration(iteration)
        if not rank0:
            print_rank_0(f" loading {checkpoint_folder.tree_folder(load_dir, start.iteration)}")
        more.pop("gpt_compat_layer_maps", None)
        return checkpointing._load_global_dist_base_checkpoint(
            load_dir, args, rank0, sharded_state_dict, iteration, release, checkpointing_context, **more
        )

    return _load_base_checkpoint


def _artifact_hook(original: Callable, session: Session) -> Callable:
    """Weights & Biases hears of a checkpoint when it is in its place, and of that place."""

    def on_save_checkpoint_success(checkpoint_path, tracker_filename, save_dir, iteration):
        def tell(folder: str, place: str) -> None:
            original(place, os.path.join(folder, checkpoint_folder.TRACKER), folder, iteration)

        session.saved_elsewhere = tell

    return on_save_checkpoint_success


HOOKS = (
    Hook(
        "megatron.training.training:training_log",
        _log_hook,
        "always",
        "metrics.jsonl, the progress line, and the limit on replaced images",
    ),
    Hook(
        "megatron.training.training:train_step",
        _step_hook,
        "always",
        "--vision-tower-stages all: once a schedule runs, each stage comes to a micro-batch at another time",
    ),
    Hook(
        "megatron.training.training:get_megatron_optimizer",
        _optimizer_hook,
        "always",
        "the engine has no flag for a part's learning rate, and does not decay image_newline as the original does",
    ),
    Hook(
        "megatron.training.training:evaluate",
        _evaluate_hook,
        "always",
        "eval_loss in metrics.jsonl, the model's words about held-out pictures, no second pass at the end",
    ),
    Hook(
        "megatron.training.training:save_checkpoint",
        _save_hook,
        "always",
        "projector files, side files, a manifest with hashes, and a rename when all of it is on disk",
    ),
    Hook(
        "megatron.training.checkpointing:_load_base_checkpoint",
        _load_hook,
        "always",
        "what is loaded is decided by manifests; a truncated tracker would end the run with status 0",
    ),
    Hook(
        "megatron.training.wandb_utils:on_save_checkpoint_success",
        _artifact_hook,
        "always",
        "a checkpoint is logged under the name that it has in the end",
    ),
)


def install(session: Session) -> None:
    """Wrap the targets for ``session``; once a process."""
    import importlib

    for hook in HOOKS:
        module_name, name = hook.target.split(":")
        module = importlib.import_module(module_name)
        setattr(module, name, hook.wrapper(getattr(module, name), session))
