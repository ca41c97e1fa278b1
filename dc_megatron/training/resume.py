"""What a run starts from: nothing, a complete checkpoint of its own, or another run's weights. No torch here."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace

from dc_megatron.config import ConnectorConfig, ImageTiling, LanguageConfig, VisionConfig
from dc_megatron.errors import UserError
from dc_megatron.training.argv import Translation
from dc_megatron.training.settings import RunSettings
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.manifest import damaged_files


@dataclass(frozen=True)
class Start:
    """``words`` replace the engine's own: they name a complete iteration. ``notes`` are for the user.

    ``resumes``: optimizer, schedule and data position go on as well; otherwise only weights are taken, if any.
    ``folder``, ``iteration``: where they are taken from, None for a converted model. ``global_batch_size``: rows a step
    of the run that resumes. ``consumed_tokens``: what it had seen. ``learning``: see ``what_learns``.
    """

    words: list[str]
    notes: list[str]
    loads: bool = False
    resumes: bool = False
    plan_hash: str | None = None
    folder: str = ""
    iteration: int | None = None
    global_batch_size: int | None = None
    consumed_tokens: dict[str, int] = field(default_factory=dict)
    learning: dict = field(default_factory=dict)

    @property
    def tree(self) -> str:
        """The folder with the files that will be loaded."""
        return checkpoint_folder.tree_folder(self.folder, self.iteration)


# The engine otherwise refuses to go on where the number of steps has changed; the same flags give the same schedule.
_RESUME = ["--override-opt_param-scheduler"]


def choose_start(translation: Translation) -> Start:
    """Decide from ``--load``, ``--finetune``, ``--ckpt-step`` and what lies in ``--output_dir`` and ``--load``.

    Manifests decide what is complete; no tracker is believed. UserError: nothing to load at --load, no complete
    checkpoint of the step that was asked for, or trees of another program.
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
        if output and checkpoint_folder.is_release(output):
            # Converted into the folder that will be trained in.
            return _release(output, words, notes)
        # Launchers name one folder for both; the first launch finds it empty.
        return Start(_without(words, "--load", "--finetune"), notes)
    if not os.path.isdir(load):
        raise UserError(f"--load {load}: no such folder")
    iteration, incomplete = _newest(load, step, "--load")
    if iteration is None and checkpoint_folder.is_release(load):
        return _release(load, words, [*notes, *_passed_over(load, incomplete, "the converted model")])
    if iteration is None:
        raise UserError(f"--load {load}: holds no complete checkpoint{_why_none(load)}")
    notes += _passed_over(load, incomplete, iteration)
    if "--finetune" not in words:
        return _resume(load, iteration, _without(words, "--load"), notes)
    return Start([*words, "--ckpt-step", str(iteration)], notes, loads=True, folder=load, iteration=iteration)


def starts_from_nothing(translation: Translation) -> Start:
    """A run that reads no weights: a dry run's."""
    return Start(_without(translation.megatron_argv, "--load", "--finetune", "--ckpt-step"), [])


def _resume(folder: str, iteration: int, words: list[str], notes: list[str]) -> Start:
    position = checkpoint_folder.read_manifest(folder, iteration).content
    return Start(
        [*words, "--load", folder, "--ckpt-step", str(iteration), *_RESUME],
        notes,
        loads=True,
        resumes=True,
        plan_hash=position.get("plan_hash"),
        folder=folder,
        iteration=iteration,
        global_batch_size=position.get("global_batch_size"),
        consumed_tokens=position.get("consumed_tokens", {}),
        learning=position.get("learning", {}),
    )


def _release(folder: str, words: list[str], notes: list[str]) -> Start:
    """A converted model has no position and no optimizer: its weights are taken, from step 0."""
    notes = [*notes, f"weights are taken from the converted model in {folder}"]
    return Start([*_without(words, "--load", "--finetune"), "--load", folder, "--finetune"], notes, True, folder=folder)


def _newest(folder: str, step: int | None, flag: str) -> tuple[int | None, list[int]]:
    """The newest complete iteration and the incomplete ones above it; or ``step``, which must then be complete."""
    others = checkpoint_folder.trees_of_others(folder)
    if others:
        raise UserError(f"{flag} {folder}: {checkpoint_folder.what_of_others(folder, others)}")
    if step is None or not checkpoint_folder.iterations(folder):
        return checkpoint_folder.newest_complete(folder)
    if checkpoint_folder.read_manifest(folder, step) is None:
        raise UserError(f"--ckpt-step {step}: {flag} {folder} holds no complete checkpoint of that step")
    return step, []


def _why_none(folder: str) -> str:
    trees = [*reversed(checkpoint_folder.iterations(folder))]
    trees += [None] if os.path.isdir(checkpoint_folder.tree_folder(folder, None)) else []
    if not trees:
        return "; give the --output_dir of a run that has saved one, or a folder of tools/convert.py import"
    reasons = [
        f"{os.path.basename(checkpoint_folder.tree_folder(folder, tree))}:"
        f" {checkpoint_folder.why_incomplete(folder, tree)}"
        for tree in trees[:4]
    ]
    return f" ({'; '.join(reasons)}); tools/inspect_checkpoint.py {folder} shows what is there"


def refuse_damaged_files(start: Start, rank: int, world_size: int) -> None:
    """UserError where this rank's share of the files that will be loaded is not what was saved, by its hashes.

    No process group is needed: ranks share the files out among them, and each speaks for itself. torchrun ends the
    others when one has left.
    """
    if not start.loads:
        return
    files = checkpoint_folder.read_manifest(start.folder, start.iteration)
    if files is None:
        raise UserError(
            f"--verify-checkpoint: {start.tree}: {checkpoint_folder.why_incomplete(start.folder, start.iteration)}"
        )
    # By size, so that every rank reads about as much.
    names = sorted(files.files, key=lambda name: (-files.files[name].size, name))
    damaged = damaged_files(start.tree, files, names[rank::world_size])
    if damaged:
        raise UserError(f"--verify-checkpoint: {start.tree}: {'; '.join(damaged)}; {_what_instead(start)}")


def _what_instead(start: Start) -> str:
    if start.iteration is None:
        return "convert the model again, or copy the folder again"
    older = [
        iteration
        for iteration in checkpoint_folder.iterations(start.folder)
        if iteration < start.iteration and checkpoint_folder.read_manifest(start.folder, iteration) is not None
    ]
    if not older:
        return f"there is no older complete iteration in {start.folder}"
    return f"iteration {older[-1]} is complete as well: --ckpt-step {older[-1]} goes on from there"


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


def what_learns(settings: RunSettings) -> dict:
    """What the optimizer's groups are told apart by, for the manifest: flag -> value."""
    own = {"mm_projector_lr": "connector", "vision_tower_lr": "vision_tower"}
    rates = {flag: settings.own_rates.get(part, settings.learning_rate) for flag, part in own.items()}
    return {
        "trainable": ",".join(settings.trainable),
        "learning_rate": settings.learning_rate,
        "min_lr": settings.min_lr,
        **{flag: rate for flag, rate in rates.items() if own[flag] in settings.trainable},
    }


def refuse_other_groups(start: Start, settings: RunSettings) -> None:
    """UserError where other parts learn than in the run that is resumed, or at other peaks: its state goes by both."""
    now = what_learns(settings)
    for flag, was in start.learning.items():
        if now.get(flag, was) != was:
            raise UserError(
                f"--{flag} {now[flag]}: {start.folder} was trained with {was}, and the state of its optimizer goes by"
                f" that; give --{flag} {was}, or take the weights alone: --load {start.folder} --finetune, into another"
                " --output_dir"
            )


def refuse_another_model(
    start: Start,
    language: LanguageConfig,
    vision: VisionConfig,
    connector: ConnectorConfig,
    tiling: ImageTiling,
    projector_given: bool,
) -> None:
    """UserError where the checkpoint was trained with another language model, connector or tower.

    Some of them have tensors of the same shapes (sci and dci, two towers of one size), so loading would not notice.
    Weights taken beside a projector file may come from a run with another connector: the file's counts. A language
    model that was imported alone has neither. A run that resumes must cut pictures as before; one that takes weights
    only may begin with AnyRes.
    """
    if not start.loads:
        return
    described = checkpoint_folder.read_description(start.folder)
    side = os.path.join(start.folder, "hf")
    saved = LanguageConfig.from_folder(side, "--load")
    _compare(start.folder, "--model_name_or_path", replace(saved, path=""), replace(language, path=""))
    if projector_given and not start.resumes:
        return
    if described.mm_dense_connector_type:
        was = ConnectorConfig(
            described.mm_dense_connector_type, described.mm_projector_type, described.mm_vision_select_layer
        )
        if vision.about.ends_early:
            # There is no choice of layer.
            was = replace(was, select_layer=connector.select_layer)
        _compare(start.folder, "--mm_dense_connector_type", was, connector)
    if os.path.isfile(os.path.join(side, "vision_tower", "config.json")):
        tower = VisionConfig.from_folder(os.path.join(side, "vision_tower"), "--load")
        _compare(start.folder, "--vision_tower", replace(tower, path=""), replace(vision, path=""))
    if start.resumes:
        _refuse_another_tiling(start.folder, described, tiling)


def _refuse_another_tiling(folder: str, described: checkpoint_folder.CheckpointDescription, now: ImageTiling) -> None:
    pinpoints = tuple((width, height) for width, height in described.image_grid_pinpoints or ())
    was = replace(now, pinpoints=pinpoints, merge=described.merge_type)
    if bool(was.pinpoints) != bool(now.pinpoints):
        there, here = described.image_aspect_ratio, "anyres" if now.pinpoints else "no anyres"
        raise UserError(f"--image_aspect_ratio: {folder} was trained with {there}, this is {here}; give the same")
    _compare(folder, "--image_grid_pinpoints, --mm_patch_merge_type", was, now)


def _compare(folder: str, flag: str, was, now) -> None:
    before, after = asdict(was), asdict(now)
    different = [f"{name} {before[name]} there, {after[name]} here" for name in before if before[name] != after[name]]
    if different:
        raise UserError(f"{flag}: not what {folder} was trained with: {'; '.join(different)}")


def refuse_other_tower_weights(start: Start, tower: str, projector_given: bool) -> None:
    """As ``refuse_another_model`` for the tower's weights, which have to be read: a gigabyte in a second."""
    if not start.loads or (projector_given and not start.resumes):
        return
    saved = checkpoint_folder.read_description(start.folder).vision_tower_hash
    if saved and saved != checkpoint_folder.hash_folder_weights(tower):
        raise UserError(f"--vision_tower {tower}: its weights are not those that {start.folder} was trained with")


def _passed_over(folder: str, incomplete: list[int], instead: int | str | None) -> list[str]:
    if not incomplete:
        return []
    if isinstance(instead, int):
        instead = f"iteration {instead}"
    names = ", ".join(map(str, incomplete))
    return [f"{folder}: iteration {names} was not written to its end; {instead or 'nothing'} is taken"]


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
