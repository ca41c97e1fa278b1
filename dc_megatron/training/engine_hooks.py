"""The functions of megatron.training that are wrapped, because the engine has no callbacks.

Each row names its target, the wrapper, the condition and why; a drift test checks that the targets exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dc_megatron.training.checkpoint_hooks import artifact_hook, load_hook, save_hook, schedule_hook
from dc_megatron.training.fsdp_state import state_hook
from dc_megatron.training.session import Session
from dc_megatron.training.step_hooks import evaluate_hook, log_hook, optimizer_hook, step_hook


@dataclass(frozen=True)
class Hook:
    """A function of the engine that is called through ``wrapper(original, session)``."""

    target: str
    wrapper: Callable
    condition: str
    why: str


HOOKS = (
    Hook(
        "megatron.training.training:training_log",
        log_hook,
        "always",
        "metrics.jsonl, the progress line, and the limit on replaced images",
    ),
    Hook(
        "megatron.training.training:train_step",
        step_hook,
        "always",
        "--vision-tower-stages all: once a schedule runs, each stage comes to a micro-batch at another time",
    ),
    Hook(
        "megatron.training.training:get_megatron_optimizer",
        optimizer_hook,
        "always",
        "the engine has no flag for a part's learning rate, and does not decay image_newline as the original does",
    ),
    Hook(
        "megatron.training.training:evaluate",
        evaluate_hook,
        "always",
        "eval_loss in metrics.jsonl, the model's words about held-out pictures, no second pass at the end",
    ),
    Hook(
        "megatron.training.training:save_checkpoint",
        save_hook,
        "always",
        "projector files, side files, a manifest with hashes, and a rename when all of it is on disk",
    ),
    Hook(
        "megatron.training.checkpointing:schedule_async_save",
        schedule_hook,
        "always",
        "--async-save: manifest and rename follow when all ranks have written; the hashes are made where that is done",
    ),
    Hook(
        "megatron.training.checkpointing:generate_state_dict",
        state_hook,
        "always",
        "--use-megatron-fsdp: the engine saves such a model in a format of its own, which no tool here reads",
    ),
    Hook(
        "megatron.training.checkpointing:_load_base_checkpoint",
        load_hook,
        "always",
        "what is loaded is decided by manifests; a truncated tracker would end the run with status 0",
    ),
    Hook(
        "megatron.training.wandb_utils:on_save_checkpoint_success",
        artifact_hook,
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
