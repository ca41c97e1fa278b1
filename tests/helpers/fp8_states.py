"""What a layer of Transformer Engine saves with delayed scaling, without Transformer Engine."""

from __future__ import annotations

import enum
import pickle
import sys
from types import ModuleType

import torch

_RECIPES, _MEGATRON = "transformer_engine.common.recipe", "megatron.core.extensions.transformer_engine"


def delayed_state(monkeypatch) -> bytes:
    """The bytes of ``get_extra_state`` of release 2.20 in a Megatron run: same structure, same names.

    Its modules are stood in for until the test ends, so that the bytes can be unpickled as well.
    """
    # Megatron replaces a function of torch's, and tensors name it in their pickles.
    from megatron.core import safe_globals  # noqa: F401

    class _FormatHelper:
        def __init__(self, max_fwd: float, max_bwd: float):
            self.max_fwd, self.max_bwd = max_fwd, max_bwd

        def __reduce__(self):
            return _FormatHelper, (self.max_fwd, self.max_bwd)

        def __eq__(self, other):
            return (self.max_fwd, self.max_bwd) == (other.max_fwd, other.max_bwd)

        __hash__ = None

    class Format(enum.Enum):
        HYBRID = _FormatHelper(448, 57344)

    class TEDelayedScaling:
        def __init__(self):
            self.fp8_format, self.margin, self.amax_history_len = Format.HYBRID, 0, 4
            self.amax_compute_algo, self.scaling_factor_compute_algo = "max", None
            self.reduce_amax, self.fp8_dpa, self.fp8_mha = True, False, False
            self.override_linear_precision = (False, False, False)

    for name, kinds in ((_RECIPES, (Format, _FormatHelper)), (_MEGATRON, (TEDelayedScaling,))):
        module = ModuleType(name)
        for kind in kinds:
            kind.__module__, kind.__qualname__ = name, kind.__name__
            setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, name, module)
    for parent in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    state = {
        "recipe": TEDelayedScaling(),
        "scale_fwd": torch.tensor([128.0, 1664.0, 1.0]),
        "amax_history_fwd": torch.arange(12.0).view(4, 3),
        "scale_bwd": torch.tensor([1024.0, 1.0]),
        "amax_history_bwd": torch.arange(8.0).view(4, 2),
        "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1, "fp8_max_fwd": 448, "fp8_max_bwd": 57344},
    }
    return pickle.dumps(state)
