"""A save through the hook, stopped at each of its writes, flushes and renames in turn; what is there afterwards.

The engine's part is a function that writes a small tree: what counts is the order in which things reach the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from types import SimpleNamespace
from unittest import mock

import torch

from dc_megatron.weights import checkpoint_folder, durable_files, projector_files, staged_iteration

SEAM = ("write_all", "flush_file", "flush_folder", "rename", "exchange")
OLDER, SAVED, LATER = 2, 4, 6
# What the folder holds before: iterations, each with the generation of its content; "broken" has no manifest.
BEFORE = {
    "nothing": {},
    "an older iteration": {OLDER: "old"},
    "the same iteration": {OLDER: "old", SAVED: "old"},
    "the same iteration, broken": {OLDER: "old", SAVED: "broken"},
}


class Killed(BaseException):
    """Stands for the end of the process."""


class Stops:
    """Counts the points that a save goes through, and raises at one of them."""

    def __init__(self, at: int | None = None):
        self.at, self.names = at, []

    def point(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) - 1 == self.at:
            raise Killed(name)

    @contextlib.contextmanager
    def installed(self, exchanges: bool):
        with contextlib.ExitStack() as stack:
            for name in SEAM:
                stopping = self._before(name, getattr(durable_files, name))
                if name == "exchange" and not exchanges:
                    stopping = lambda one, other: False  # noqa: E731 (as on a network disk)
                stack.enter_context(mock.patch.object(durable_files, name, stopping))
            stack.enter_context(
                mock.patch.object(projector_files, "save_file", self._before("save_file", projector_files.save_file))
            )
            stack.enter_context(mock.patch.object(torch, "save", self._before("torch.save", torch.save)))
            stack.enter_context(mock.patch.object(staged_iteration.shutil, "rmtree", self._half_removed(shutil.rmtree)))
            yield self

    def _before(self, name: str, original):
        def stopping(*args, **kwargs):
            self.point(name)
            return original(*args, **kwargs)

        return stopping

    def _half_removed(self, original):
        def stopping(path, **kwargs):
            for parent, _, names in os.walk(path):
                for name in names[:1]:
                    os.remove(os.path.join(parent, name))
            self.point("rmtree")
            return original(path, **kwargs)

        return stopping


def make_trees(root: str) -> None:
    """``root``/old and ``root``/new: two small trees as torch writes them, of one size."""
    for number, name in enumerate(("old", "new")):
        state = {"language_model.output_layer.weight": torch.full((4, 8), float(number))}
        torch.distributed.checkpoint.save(state, checkpoint_id=os.path.join(root, name))
        with open(os.path.join(root, name, "metadata.json"), "w") as file:
            json.dump({"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}, file)


class _Engine:
    """Writes ``tree`` file by file into args.save, as the engine does, with a tracker."""

    def __init__(self, args, tree: str, stops: Stops):
        self.args, self.tree, self.stops = args, tree, stops

    def save_checkpoint(self, iteration, model):
        target = checkpoint_folder.iteration_folder(self.args.save, iteration)
        os.makedirs(target, exist_ok=True)
        for name in sorted(os.listdir(self.tree)):
            with open(os.path.join(self.tree, name), "rb") as source, open(os.path.join(target, name), "wb") as file:
                data = source.read()
                self.stops.point(f"engine: {name} is empty")
                file.write(data[: len(data) // 2])
                file.flush()
                self.stops.point(f"engine: half of {name}")
                file.write(data[len(data) // 2 :])
        self.stops.point("engine: no tracker")
        with open(os.path.join(self.args.save, checkpoint_folder.TRACKER), "w") as file:
            file.write(str(iteration))
        self.stops.point("engine: done")


class _Connector(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.GELU(), torch.nn.Linear(4, 4))


def _checked(folder: str, llama: str, clip: str):
    from dc_megatron.config import ConnectorConfig, ImageTiling, VisionConfig
    from dc_megatron.training.argv import translate
    from dc_megatron.training.resume import choose_start

    flags = f"--output_dir {folder} --model_name_or_path {llama} --vision_tower {clip} --version v1"
    translation = translate(flags.split())
    return SimpleNamespace(
        lora=None,
        settings=translation.settings,
        start=choose_start(translation),
        connector=ConnectorConfig("dci"),
        vision=VisionConfig.from_folder(clip),
        tiling=ImageTiling(28, 16, 4),
    )


def save(folder: str, iteration: int, tree: str, models: tuple[str, str], stops: Stops, exchanges: bool = True) -> None:
    """One save of ``tree`` as ``iteration`` through the hook."""
    from dc_megatron.training import checkpoint_hooks
    from dc_megatron.training.session import Session

    args = SimpleNamespace(save=folder, async_save=False, consumed_train_samples=8, global_batch_size=4)
    checked = _checked(folder, *models)
    checked.start = SimpleNamespace(resumes=False, iteration=None, folder="")
    session = Session(
        checked, "plan", 0, 0, None, SimpleNamespace(lap=lambda: None), SimpleNamespace(alive=lambda: None), []
    )
    hook = checkpoint_hooks.save_hook(_Engine(args, tree, stops).save_checkpoint, session)
    model = [SimpleNamespace(connector=_Connector(), image_newline=None, tower_is_stored=False, whole_connector=None)]
    os.makedirs(folder, exist_ok=True)
    with mock.patch.object(checkpoint_hooks, "get_args", return_value=args), stops.installed(exchanges):
        try:
            hook(iteration, model)
        finally:
            assert args.save == folder, "the engine's own folder is not restored"


def state_of(folder: str, trees: str) -> dict:
    """What a user finds: the newest complete iteration, whose content it has, and what the tools say of it."""
    from dc_megatron.reports.checkpoint_report import examine

    iteration, _ = checkpoint_folder.newest_complete(folder)
    state = {"newest": iteration, "content": None, "resumes from": None, "problems": []}
    if iteration is not None:
        with open(os.path.join(checkpoint_folder.iteration_folder(folder, iteration), "__0_0.distcp"), "rb") as file:
            found = file.read()
        for name in ("old", "new"):
            with open(os.path.join(trees, name, "__0_0.distcp"), "rb") as file:
                state["content"] = name if file.read() == found else state["content"]
        report = examine(folder, check=True)
        state["problems"] = report["problems"]
    state["resumes from"] = _checked(folder, "unused", _CLIP[0]).start.iteration
    return state


_CLIP = [""]


def stopped_everywhere(root: str, llama: str, clip: str, before: str, exchanges: bool) -> list[dict]:
    """For every point of a save: its name, what is found after it, after the next start, and after the next save."""
    from dc_megatron.runtime import parallel

    parallel.start(1, 1, seed=1)
    _CLIP[0] = clip
    trees, models = os.path.join(root, "trees"), (llama, clip)
    make_trees(trees)
    base = os.path.join(root, "base")
    os.makedirs(base)
    for iteration, kind in BEFORE[before].items():
        save(base, iteration, os.path.join(trees, "old"), models, Stops())
        if kind == "broken":
            os.remove(os.path.join(checkpoint_folder.iteration_folder(base, iteration), checkpoint_folder.MANIFEST))
    counted = Stops()
    save(
        shutil.copytree(base, os.path.join(root, "counted")),
        SAVED,
        os.path.join(trees, "new"),
        models,
        counted,
        exchanges,
    )
    shutil.rmtree(os.path.join(root, "counted"))
    found = [{"point": "before", "after": state_of(base, trees)}]
    for number, name in enumerate(counted.names):
        folder = shutil.copytree(base, os.path.join(root, f"stop{number}"))
        entry = {"point": name}
        try:
            save(folder, SAVED, os.path.join(trees, "new"), models, Stops(number), exchanges)
            entry["stopped"] = False
        except Killed:
            entry["stopped"] = True
        entry["after"] = state_of(folder, trees)
        staged_iteration.clear_staging(folder)
        entry["next start"] = state_of(folder, trees)
        save(folder, LATER, os.path.join(trees, "new"), models, Stops(), exchanges)
        entry["next save"] = checkpoint_folder.newest_complete(folder)[0]
        entry["left"] = sorted(os.listdir(folder))
        shutil.rmtree(folder)
        found.append(entry)
    return found
