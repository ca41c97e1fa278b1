"""What a run starts from: nothing, a complete checkpoint of its own, or another run's weights. No torch here."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig
from dc_megatron.errors import UserError
from dc_megatron.training.argv import Translation
from dc_megatron.weights import checkpoint_folder


@dataclass(frozen=True)
class Start:
    """``words`` replace the engine's own: they name a complete iteration. ``notes`` are for the user.

    ``resumes``: optimizer, schedule and data position go on as well; otherwise only weights are taken, if any.
    ``folder``, ``iteration``: where they are taken from. ``global_batch_size``: rows a step of the run that resumes.
    """

    words: list[str]
    notes: list[str]
    loads: bool = False
    resumes: bool = False
    plan_hash: str | None = None
    folder: str = ""
    iteration: int | None = None
    global_batch_size: int | None = None


# The engine otherwise refuses to go on where the number of steps has changed; the same flags give the same schedule.
_RESUME = ["--override-opt_param-scheduler"]


def choose_start(translation: Translation) -> Start:
    """Decide from ``--load``, ``--finetune``, ``--ckpt-step`` and what ``--output_dir`` holds.

    UserError: nothing to load at --load, or no complete checkpoint of the step that was asked for.
    """
    settings = translation.settings
    output, load = settings.output_dir, settings.load
    step = _typed_step(translation.megatron_argv)
    words = _without(translation.megatron_argv, "--ckpt-step")
    own, incomplete = _newest(output, step, "--output_dir") if output else (None, [])
    notes = _passed_over(output, incomplete, own)
    if own is not None:
        notes.append(f"resuming from iteration {own} of {output}; empty the folder to start over")
        return _resume(output, own, _without(words, "--load", "--finetune"), notes)
    if not load or _same_folder(load, output):
        # Launchers name one folder for both; the first launch finds it empty.
        return Start(_without(words, "--load", "--finetune"), notes)
    if not os.path.isdir(load):
        raise UserError(f"--load {load}: no such folder")
    if checkpoint_folder.is_release(load):
        return Start(words, notes, loads=True, folder=load)
    iteration, incomplete = _newest(load, step, "--load")
    if iteration is None:
        raise UserError(
            f"--load {load}: holds no complete checkpoint"
            + (f" (incomplete: {', '.join(map(str, incomplete))})" if incomplete else "")
            + "; give the --output_dir of a run that has saved one"
        )
    notes += _passed_over(load, incomplete, iteration)
    if "--finetune" not in words:
        return _resume(load, iteration, _without(words, "--load"), notes)
    return Start([*words, "--ckpt-step", str(iteration)], notes, loads=True, folder=load, iteration=iteration)


def _resume(folder: str, iteration: int, words: list[str], notes: list[str]) -> Start:
    manifest = checkpoint_folder.read_manifest(folder, iteration)
    return Start(
        [*words, "--load", folder, "--ckpt-step", str(iteration), *_RESUME],
        notes,
        loads=True,
        resumes=True,
        plan_hash=manifest.get("plan_hash"),
        folder=folder,
        iteration=iteration,
        global_batch_size=manifest.get("global_batch_size"),
    )


def _newest(folder: str, step: int | None, flag: str) -> tuple[int | None, list[int]]:
    """The newest complete iteration and the incomplete ones above it; or ``step``, which must then be complete."""
    if step is None or not checkpoint_folder.iterations(folder):
        return checkpoint_folder.newest_complete(folder)
    if checkpoint_folder.read_manifest(folder, step) is None:
        raise UserError(f"--ckpt-step {step}: {flag} {folder} holds no complete checkpoint of that step")
    return step, []


def _typed_step(words: list[str]) -> int | None:
    if "--ckpt-step" not in words:
        return None
    return int(words[len(words) - words[::-1].index("--ckpt-step")])


def refuse_another_batch(start: Start, global_batch_size: int) -> None:
    """UserError where a resumed run would count its steps in another size than the checkpoint did."""
    if start.resumes and start.global_batch_size not in (None, global_batch_size):
        raise UserError(
            f"--global-batch-size {global_batch_size} (given, or per device x accumulation x processes): {start.folder}"
            f" was trained with {start.global_batch_size} rows a step, and its position, schedule and number of steps"
            f" count those; give --global-batch-size {start.global_batch_size}"
        )


def refuse_another_model(
    start: Start, language: LanguageConfig, vision: VisionConfig, connector: ConnectorConfig, projector_given: bool
) -> None:
    """UserError where the checkpoint was trained with another language model, connector or tower.

    Some of them have tensors of the same shapes (sci and dci, two towers of one size), so loading would not notice.
    Weights taken beside a projector file may come from a run with another connector: the file's counts.
    """
    if not os.path.isdir(os.path.join(start.folder, "hf")):
        return
    saved = LanguageConfig.from_folder(os.path.join(start.folder, "hf"), "--load")
    _compare(start.folder, "--model_name_or_path", replace(saved, path=""), replace(language, path=""))
    if projector_given and not start.resumes:
        return
    described = checkpoint_folder.read_description(start.folder)
    was = ConnectorConfig(
        described.mm_dense_connector_type, described.mm_projector_type, described.mm_vision_select_layer
    )
    if vision.family == "siglip":
        # SigLIP has no choice of layer.
        was = replace(was, select_layer=connector.select_layer)
    _compare(start.folder, "--mm_dense_connector_type", was, connector)
    tower = VisionConfig.from_folder(os.path.join(start.folder, "hf", "vision_tower"), "--load")
    _compare(start.folder, "--vision_tower", replace(tower, path=""), replace(vision, path=""))


def _compare(folder: str, flag: str, was, now) -> None:
    before, after = asdict(was), asdict(now)
    different = [f"{name} {before[name]} there, {after[name]} here" for name in before if before[name] != after[name]]
    if different:
        raise UserError(f"{flag}: not what {folder} was trained with: {'; '.join(different)}")


def refuse_other_tower_weights(start: Start, tower: str, projector_given: bool) -> None:
    """As ``refuse_another_model`` for the tower's weights, which have to be read: a gigabyte in a second."""
    if not os.path.isdir(os.path.join(start.folder, "hf")) or (projector_given and not start.resumes):
        return
    if checkpoint_folder.read_description(start.folder).vision_tower_hash != checkpoint_folder.hash_folder_weights(
        tower
    ):
        raise UserError(f"--vision_tower {tower}: its weights are not those that {start.folder} was trained with")


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
