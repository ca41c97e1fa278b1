"""The two functions of megatron.training that are wrapped, because the engine has no callbacks.

Each row names its target, the wrapper, the condition and why; a drift test checks that the targets exist.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.utils import unwrap_model
from megatron.training import get_args, get_tensorboard_writer

from dc_megatron.data.loader import MicroBatches
from dc_megatron.errors import UserError
from dc_megatron.training.forward_step import LOSS_NAME
from dc_megatron.training.metrics import COUNTS, Clock, MetricsFile, StepCounts, progress_line
from dc_megatron.training.model_provider import trained_connector
from dc_megatron.training.run import Checked
from dc_megatron.training.sample_pictures import SamplePictures
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.projector_files import write_projector


@dataclass
class Session:
    """What the hooks share during one run."""

    checked: Checked
    plan_hash: str
    images_of_an_epoch: int
    dropped_samples: int
    counts: StepCounts
    clock: Clock
    loaders: list[MicroBatches]
    metrics: MetricsFile | None = None
    pictures: SamplePictures | None = None
    tower_hash: str | None = None


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
        result = original(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)
        total_wait = max((loader.data_wait_seconds for loader in session.loaders), default=0.0)
        totals = _sum_over_ranks(session, learning_rate or 0.0, total_wait - waited)
        waited = total_wait
        bad_images.add(int(totals["images"]), int(totals["substituted_images"]))
        if not last_rank:
            return result
        loss = loss_dict[LOSS_NAME].item() if LOSS_NAME in loss_dict else None
        grad_norm = kwargs.get("grad_norm", args[3] if len(args) > 3 else None)
        seconds = session.clock.lap()
        entry = {
            "iteration": iteration,
            "loss": loss,
            "lr": totals["lr"],
            "grad_norm": float(grad_norm) if grad_norm is not None else None,
            "supervised_tokens": int(totals["supervised_tokens"]),
            "tokens": int(totals["tokens"]),
            "images": int(totals["images"]),
            "substituted_images": int(totals["substituted_images"]),
            "dropped_samples": session.dropped_samples,
            "step_seconds": round(seconds, 6),
            "data_wait_seconds": round(totals["wait"], 6),
        }
        if session.metrics is not None:
            session.metrics.write(entry)
        writer = get_tensorboard_writer()
        if writer is not None and iteration % engine.tensorboard_log_interval == 0:
            for name in ("tokens", "supervised_tokens", "images"):
                writer.add_scalar(f"throughput/{name} per second", entry[name] / seconds, iteration)
            writer.add_scalar("throughput/data wait seconds", entry["data_wait_seconds"], iteration)
        if on_terminal:
            print("\r\x1b[K" + progress_line(iteration, engine.train_iters, loss, seconds), end="", flush=True)
        return result

    return training_log


def _sum_over_ranks(session: Session, learning_rate: float, wait: float) -> dict[str, float]:
    """Counts of the global batch, known to every rank alike.

    Rows are counted once a data-parallel rank, on the first stage and first tensor-parallel rank; replaced images on
    every rank that decodes. Rank 0 always has parameters that learn or an optimizer group, so the rate is its.
    """
    from megatron.core import parallel_state

    counts = session.counts.take()
    first_stage = parallel_state.get_pipeline_model_parallel_rank() == 0
    counting = first_stage and parallel_state.get_tensor_model_parallel_rank() == 0
    values = [counts[name] if counting or (name == "substituted_images" and first_stage) else 0 for name in COUNTS]
    values.append(wait / parallel_state.get_data_parallel_world_size() if counting else 0.0)
    values.append(learning_rate if torch.distributed.get_rank() == 0 else 0.0)
    summed = torch.tensor(values, dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(summed)
    return dict(zip([*COUNTS, "wait", "lr"], summed.tolist(), strict=True))


def _save_hook(original: Callable, session: Session) -> Callable:
    """``save_checkpoint`` in an empty folder and, after it, projector, side files and last the manifest that makes it
    complete."""

    def save_checkpoint(iteration, model, *args, **kwargs):
        start = session.checked.start
        own = os.path.realpath(start.folder) == os.path.realpath(get_args().save)
        if start.resumes and start.iteration == iteration and own:
            # A finished run that was started again has trained nothing; its checkpoint is complete already.
            return None
        if torch.distributed.get_rank() == 0:
            checkpoint_folder.discard_iteration(get_args().save, iteration)
        torch.distributed.barrier()
        result = original(iteration, model, *args, **kwargs)
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            _write_beside(session, iteration, unwrap_model(model))
        if session.pictures is not None:
            session.pictures.write(model[0], iteration, get_tensorboard_writer())
        session.clock.lap()
        return result

    return save_checkpoint


def _write_beside(session: Session, iteration: int, chunks: list) -> None:
    checked, settings, folder = session.checked, session.checked.settings, get_args().save
    connector = trained_connector(chunks)
    if connector is not None:
        write_projector(folder, connector.state_dict(), checked.connector, checked.vision)
    if session.tower_hash is None:
        session.tower_hash = checkpoint_folder.hash_folder_weights(settings.vision_tower)
    description = checkpoint_folder.CheckpointDescription(
        vision_tower=settings.vision_tower,
        vision_tower_hash=session.tower_hash,
        mm_dense_connector_type=settings.mm_dense_connector_type,
        mm_projector_type=settings.mm_projector_type,
        mm_vision_select_layer=settings.mm_vision_select_layer,
        version=settings.version,
        image_aspect_ratio=settings.image_aspect_ratio,
        model_max_length=settings.model_max_length,
    )
    checkpoint_folder.write_side_files(folder, settings.model_name_or_path, description)
    args = get_args()
    position = {
        "plan_hash": session.plan_hash,
        "consumed_samples": args.consumed_train_samples,
        "global_batch_size": args.global_batch_size,
    }
    checkpoint_folder.write_manifest(folder, iteration, position)


HOOKS = (
    Hook(
        "megatron.training.training:training_log",
        _log_hook,
        "always",
        "metrics.jsonl, the progress line, and the limit on replaced images",
    ),
    Hook(
        "megatron.training.training:save_checkpoint",
        _save_hook,
        "always",
        "projector files, side files, and the manifest that tells a complete checkpoint",
    ),
)


def install(session: Session) -> None:
    """Wrap the targets for ``session``; once a process."""
    import importlib

    for hook in HOOKS:
        module_name, name = hook.target.split(":")
        module = importlib.import_module(module_name)
        setattr(module, name, hook.wrapper(getattr(module, name), session))
