"""What a rank says about the hooks of training: they stand on megatron.training, which takes seconds to import."""

from __future__ import annotations

import ast
import importlib
import inspect

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


def bad_images(rate: float, images_of_an_epoch: int, steps: list[tuple[int, int]]) -> tuple[int, str]:
    """Steps of (images, replaced ones) that pass, and what is said at the one that does not."""
    from dc_megatron.training.engine_hooks import BadImages

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
