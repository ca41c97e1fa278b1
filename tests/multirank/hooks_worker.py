"""What a rank says about the hooks of training: they stand on megatron.training, which takes seconds to import."""

from __future__ import annotations

import ast
import importlib
import inspect
from types import SimpleNamespace

from dc_megatron.errors import UserError


def table() -> list[dict]:
    """Rows of the hooks' table; of a target its parameters and how the engine's own code calls it.

    ``positional`` has the names of the arguments that every call in its module passes by position, call by call, and
    ``keywords`` those passed by name.
    """
    from dc_megatron.training.engine_hooks import HOOKS

    found = []
    for hook in HOOKS:
        module_name, name = hook.target.split(":")
        module = importlib.import_module(module_name)
        calls = [
            node
            for node in ast.walk(ast.parse(inspect.getsource(module)))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
        ]
        found.append(
            {
                "target": hook.target,
                "condition": hook.condition,
                "why": hook.why,
                "parameters": list(inspect.signature(getattr(module, name)).parameters),
                "wrapped": list(inspect.signature(hook.wrapper(lambda *a, **k: None, _Session())).parameters),
                "positional": [[ast.unparse(argument) for argument in call.args] for call in calls],
                "keywords": [[keyword.arg for keyword in call.keywords] for call in calls],
            }
        )
    return found


class _Settings:
    max_bad_sample_rate = 0.1


class _Checked:
    settings = _Settings


class _Session:
    """As much of a session as a hook looks at before the engine calls it."""

    checked = _Checked
    images_of_an_epoch = 10


def parameters_of_the_inner_load() -> list[str]:
    """Of the engine's function that loads a torch_dist tree which was already chosen."""
    from megatron.training import checkpointing

    return list(inspect.signature(checkpointing._load_global_dist_base_checkpoint).parameters)


def asked_to_load(folder: str, iteration: int | None, load_dir: str | None = None):
    """(folder, iteration, release, iteration told to the engine) that the hook makes of a Start, or what it leaves."""
    from unittest import mock

    from megatron.training import checkpointing

    from dc_megatron.training import checkpoint_hooks
    from dc_megatron.training.resume import Start

    session = SimpleNamespace(checked=SimpleNamespace(start=Start([], [], True, folder=folder, iteration=iteration)))
    hook = checkpoint_hooks.load_hook(lambda *a, **k: "left to the engine", session)
    told = []
    with (
        mock.patch.object(checkpointing, "set_loaded_iteration", told.append),
        mock.patch.object(checkpointing, "_load_global_dist_base_checkpoint", lambda *a, **k: (a, k)),
    ):
        # As load_checkpoint calls it.
        found = hook(
            load_dir or folder,
            "args",
            False,
            sharded_state_dict={},
            checkpointing_context=None,
            dp_cp_group="dp",
            expt_dp_group=None,
            gpt_compat_layer_maps=None,
        )
    if found == "left to the engine":
        return found
    given, named = found
    assert given[1:4] == ("args", False, {})
    assert given[6] is None
    assert named == {"dp_cp_group": "dp", "expt_dp_group": None}
    return (given[0], given[4], given[5], told[0])


def told_of_a_save() -> tuple:
    """What Weights & Biases is told, when the save hook lets it."""
    from dc_megatron.training import checkpoint_hooks

    session, told = SimpleNamespace(saved_elsewhere=None), []
    hook = checkpoint_hooks.artifact_hook(lambda *a: told.append(a), session)
    hook("run/.saving-iter_0000004/iter_0000004", "run/.saving-iter_0000004/latest", "run/.saving-iter_0000004", 4)
    assert told == []
    session.saved_elsewhere("run", "run/iter_0000004")
    return told[0]


def bad_images(rate: float, images_of_an_epoch: int, steps: list[tuple[int, int]]) -> tuple[int, str]:
    """Steps of (images, replaced ones) that pass, and what is said at the one that does not."""
    from dc_megatron.training.step_hooks import BadImages

    limit = BadImages(rate, images_of_an_epoch)
    for number, (images, bad) in enumerate(steps):
        try:
            limit.add(images, bad)
        except UserError as error:
            return number, str(error)
    return len(steps), ""


def installed_and_removed() -> dict[str, bool]:
    """Whether ``install`` puts a wrapper that calls the original in the place of every target."""
    from dc_megatron.training import engine_hooks

    report = {}
    for hook in engine_hooks.HOOKS:
        module_name, name = hook.target.split(":")
        report[hook.target] = importlib.import_module(module_name).__dict__[name]
    originals = dict(report)
    try:
        engine_hooks.install(_Session())
        for target, original in originals.items():
            module_name, name = target.split(":")
            wrapper = getattr(importlib.import_module(module_name), name)
            kept = [cell.cell_contents for cell in wrapper.__closure__]
            report[target] = wrapper is not original and any(value is original for value in kept)
        return report
    finally:
        for target, original in originals.items():
            module_name, name = target.split(":")
            setattr(importlib.import_module(module_name), name, original)


def part_rates(flags: list[str], groups: list[dict]) -> dict[str, float]:
    """What metrics.jsonl says of the learning rates of ``groups`` in a run with ``flags``."""
    from dc_megatron.training import step_hooks
    from dc_megatron.training.argv import translate

    checked = SimpleNamespace(settings=translate(flags).settings)
    return step_hooks.part_rates(SimpleNamespace(checked=checked, optimizer=SimpleNamespace(param_groups=groups)))
