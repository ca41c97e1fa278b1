"""FP8 scales in a checkpoint, unpickled for Transformer Engine through a list of the classes that belong in them.

With delayed scaling every layer saves its scales as a pickle in a byte tensor. Transformer Engine executes it when it
loads: releases that know of the danger refuse unless a variable is set, so that no such run could resume; older ones
just do it. Megatron has an unpickler that knows the names which these pickles need.

Our own readers check a tree before Megatron sees it (`weights/tree_objects.py`); this stands behind them.
"""

from __future__ import annotations

import importlib
import io
import pickle
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

# Where Transformer Engine reads them.
TE_LAYERS = "transformer_engine.pytorch.module.base"


def reading_by_name(layers: ModuleType) -> dict[str, object]:
    """What takes the place of which attributes of TE_LAYERS; {} where they are replaced already."""
    if isinstance(layers.pickle, SimpleNamespace):
        return {}
    replaced: dict[str, object] = {"pickle": SimpleNamespace(**{**vars(layers.pickle), "loads": _loads})}
    ask = getattr(layers, "should_load_extra_state_pickle", None)
    if ask is not None:
        replaced["should_load_extra_state_pickle"] = _without_a_variable(ask)
    return replaced


def _loads(data: bytes) -> object:
    """``pickle.loads``; UnpicklingError where the state names a class that is not listed."""
    unpickler = importlib.import_module("megatron.core.safe_globals").SafeUnpickler
    try:
        return unpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(f"an FP8 state of the checkpoint: {error}") from None


def _without_a_variable(ask: Callable[[bytes, str], bool]) -> Callable[[bytes, str], bool]:
    """Whether there is a state to load: yes as well where that was refused for what unpickling might execute."""

    def should_load(data: bytes, context: str) -> bool:
        try:
            return ask(data, context)
        except RuntimeError:
            return True

    return should_load
