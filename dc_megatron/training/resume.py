"""What a run starts from: nothing, a complete checkpoint of its own, or another run's weights. No torch here."""

from __future__ import annotations

import os
from dataclasses import dataclass

from dc_megatron.errors import UserError
from dc_megatron.training.argv import Translation
from dc_megatron.weights import checkpoint_folder


@dataclass(frozen=True)
class Start:
    """``words`` replace the engine's own: they name a complete iteration. ``notes`` are for the user.

    ``resumes``: optimizer, schedule and data position go on as well; otherwise only weights are taken, if any.
    """

    words: list[str]
    notes: list[str]
    loads: bool = False
    resumes: bool = False
    plan_hash: str | None = None


# The engine otherwise refuses to go on where the number of steps has changed; the same flags give the same schedule.
_RESUME = ["--override-opt_param-scheduler"]


def choose_start(translation: Translation) -> Start:
    """Decide from ``--load``, ``--finetune`` and what ``--output_dir`` holds. UserError: nothing to load at --load."""
    settings = translation.settings
    output, load = settings.output_dir, settings.load
    words = list(translation.megatron_argv)
    own, incomplete = checkpoint_folder.newest_complete(output) if output else (None, [])
    notes = _passed_over(output, incomplete, own)
    if own is not None:
        notes.append(f"resuming from iteration {own} of {output}; empty the folder to start over")
        words = _without(words, "--load", "--finetune", "--ckpt-step")
        words += ["--load", output, "--ckpt-step", str(own), *_RESUME]
        manifest = checkpoint_folder.read_manifest(output, own)
        return Start(words, notes, loads=True, resumes=True, plan_hash=manifest.get("plan_hash"))
    if not load or _same_folder(load, output):
        # Launchers name one folder for both; the first launch finds it empty.
        return Start(_without(words, "--load", "--finetune"), notes)
    if not os.path.isdir(load):
        raise UserError(f"--load {load}: no such folder")
    if checkpoint_folder.is_release(load):
        return Start(words, notes, loads=True)
    iteration, incomplete = checkpoint_folder.newest_complete(load)
    if iteration is None:
        raise UserError(
            f"--load {load}: holds no complete checkpoint"
            + (f" (incomplete: {', '.join(map(str, incomplete))})" if incomplete else "")
            + "; give the --output_dir of a run that has saved one"
        )
    notes += _passed_over(load, incomplete, iteration)
    resumes = "--finetune" not in words
    manifest = checkpoint_folder.read_manifest(load, iteration)
    return Start(
        [*words, "--ckpt-step", str(iteration), *(_RESUME if resumes else [])],
        notes,
        loads=True,
        resumes=resumes,
        plan_hash=manifest.get("plan_hash") if resumes else None,
    )


def _passed_over(folder: str, incomplete: list[int], instead: int | None) -> list[str]:
    if not incomplete:
        return []
    what = f"iteration {instead} is taken" if instead is not None else "nothing is taken"
    return [f"{folder}: iteration {', '.join(map(str, incomplete))} was not written to its end; {what}"]


def _same_folder(a: str, b: str) -> bool:
    return bool(b) and os.path.realpath(a) == os.path.realpath(b)


def _without(words: list[str], *names: str) -> list[str]:
    """``words`` without the flags ``names`` and their values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word in names
        if not dropping:
            kept.append(word)
    return kept
