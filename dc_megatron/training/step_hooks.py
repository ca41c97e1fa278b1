"""Around the engine's steps and evaluations: images encoded ahead, metrics.jsonl, the limit on replaced images."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args, get_tensorboard_writer

from dc_megatron.errors import UserError
from dc_megatron.training.forward_step import LOSS_NAME
from dc_megatron.training.fsdp_state import DividedState
from dc_megatron.training.metrics import COUNTS, StepCounts, progress_line
from dc_megatron.training.parameter_groups import group_overrides, present_rates
from dc_megatron.training.session import Session
from dc_megatron.training.unwrapped import unwrapped


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


def log_hook(original: Callable, session: Session) -> Callable:
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
        entry = _entry(session, iteration, loss, grad_norm, seconds, totals, rates)
        if engine.fp16:
            # As the engine's log: the scale of the next step, which an overflow has lowered (from the second one on).
            entry["loss_scale"], entry["skipped"] = float(args[0]), bool(args[2])
        if session.metrics is not None:
            session.metrics.write(entry)
        if iteration % engine.tensorboard_log_interval == 0:
            _draw(entry, iteration, seconds, rates)
        if on_terminal:
            print("\r\x1b[K" + progress_line(iteration, engine.train_iters, loss, seconds), end="", flush=True)
        return result

    return training_log


def _entry(session: Session, iteration: int, loss, grad_norm, seconds: float, totals: dict, rates: dict) -> dict:
    """A step's line of metrics.jsonl. positions: those that were computed, padding among them."""
    entry = {
        "iteration": iteration,
        "loss": loss,
        **{name: totals[name] for name in rates},
        "grad_norm": float(grad_norm) if grad_norm is not None else None,
        **{name: int(totals[name]) for name in COUNTS},
        "dropped_samples": session.dropped_samples,
        "step_seconds": round(seconds, 6),
        "data_wait_seconds": round(totals["wait"], 6),
    }
    if session.band is not None:
        entry["fp8_loss_difference"] = session.band.take()
    return entry


def _draw(entry: dict, iteration: int, seconds: float, rates: dict) -> None:
    """TensorBoard's curves beside Megatron's own."""
    writer = get_tensorboard_writer()
    if writer is None:
        return
    for name in ("samples", "tokens", "supervised_tokens", "images"):
        writer.add_scalar(f"throughput/{name} per second", entry[name] / seconds, iteration)
    writer.add_scalar("throughput/data wait seconds", entry["data_wait_seconds"], iteration)
    for name in rates.keys() - {"lr"}:
        writer.add_scalar(f"learning-rate/{name.removeprefix('lr_')}", entry[name], iteration)


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

    Rows are counted once a data-parallel rank, on the first stage and first tensor- and context-parallel rank; replaced
    images on every rank that decodes: the others count none. Rank 0 always has parameters that learn or an optimizer
    group, so the rates are its.
    """
    from megatron.core import parallel_state

    rates, counts = rates or {}, step_counts.take()
    counting = (
        parallel_state.get_pipeline_model_parallel_rank() == 0
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )
    values = [counts[name] if counting or name == "substituted_images" else 0 for name in COUNTS]
    values.append(wait / parallel_state.get_data_parallel_world_size() if counting else 0.0)
    values += [rate if torch.distributed.get_rank() == 0 else 0.0 for rate in rates.values()]
    summed = torch.tensor(values, dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(summed)
    return dict(zip([*COUNTS, "wait", *rates], summed.tolist(), strict=True))


def optimizer_hook(original: Callable, session: Session) -> Callable:
    """``get_megatron_optimizer`` with a learning rate for each part, and Hugging Face's rule of what decays."""

    def get_megatron_optimizer(config, model_chunks, config_overrides=None, **more):
        overrides = group_overrides(config, session.checked.settings.own_rates, config_overrides)
        session.optimizer = original(config, model_chunks, config_overrides=overrides, **more)
        if get_args().use_megatron_fsdp:
            session.divided = DividedState(model_chunks[0], session.optimizer)
            session.divided.tell()
        return session.optimizer

    return get_megatron_optimizer


def step_hook(original: Callable, session: Session) -> Callable:
    """``train_step`` after the images of its micro-batches were encoded, where all stages do that together."""

    def train_step(forward_step_func, data_iterator, model, *args, **kwargs):
        for images in session.step_images:
            images.encode(unwrapped(model)[0], get_num_microbatches())
        return original(forward_step_func, data_iterator, model, *args, **kwargs)

    return train_step


def evaluate_hook(original: Callable, session: Session) -> Callable:
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
