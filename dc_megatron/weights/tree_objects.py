"""Objects in Megatron's trees (common state, random states, extra states): which names their pickles may hold.

They are archives of torch.save. Megatron loads them with torch's weights-only unpickler, which knows torch's own names
and those that megatron-core registers; the same names are allowed here, and become inert stand-ins.
"""

from __future__ import annotations

import torch

from dc_megatron.weights import safe_pickle
from dc_megatron.weights.safe_pickle import Instance, RefusedPickle
from dc_megatron.weights.torch_zip import DTYPES, TENSOR_NAMES, Archive, BrokenArchive, TensorPlace

# megatron.core.safe_globals.SAFE_GLOBALS of 0.19.2 and its older spellings; a test compares them.
_MEGATRON = (
    *("types.SimpleNamespace", "argparse.Namespace", "pathlib.PosixPath", "pathlib._local.PosixPath", "_io.BytesIO"),
    *("signal.Signals", "torch._C.Generator", "numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType"),
    *("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct", "megatron.core.enums.ModelType"),
    *(f"megatron.core.rerun_state_machine.{name}" for name in ("RerunDiagnostic", "RerunMode", "RerunState")),
    *(f"megatron.core.transformer.enums.{name}" for name in ("AttnBackend", "CudaGraphModule", "CudaGraphScope")),
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
)
_TORCH = (
    *("_codecs.encode", "builtins.set", "builtins.bytearray", "builtins.complex", "torch.device"),
    *("torch.serialization._get_layout", "torch._tensor._rebuild_from_type_v2", "torch.nn.parameter.Parameter"),
)
OBJECT_NAMES = {**TENSOR_NAMES, **safe_pickle.inert(*_MEGATRON, *_TORCH)}

# megatron.core.safe_globals.SafeUnpickler: what Transformer Engine's extra states pickle into a byte tensor.
_RECIPES = "Float8CurrentScaling Float8BlockScaling MXFP8BlockScaling NVFP4BlockScaling"
_EXTRA_STATE_NAMES = {
    **safe_pickle.COMMON_NAMES,
    **DTYPES,
    **safe_pickle.inert(
        *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "bool", "bytes", "str")),
        *("torch.Size", "torch._utils._rebuild_tensor_v2", "torch._tensor._rebuild_from_type_v2"),
        *("torch.storage.UntypedStorage", "torch.storage._load_from_bytes", "numpy.ndarray", "numpy.dtype"),
        *(f"transformer_engine.common.recipe.{name}" for name in ("DelayedScaling", *_RECIPES.split())),
        *(f"transformer_engine.common.recipe.{name}" for name in ("Format", "_FormatHelper", "MMParams", "QParams")),
        *("megatron.core.extensions.transformer_engine.TEDelayedScaling", "numpy._core.multiarray._reconstruct"),
        "megatron.core.safe_globals.safe_load_from_bytes",
    ),
}
_LONGEST_EXTRA_STATE = 16 << 20


def load_object(archive: Archive) -> object:
    """Plain values as they are, tensors as TensorPlace, all else as Instance. BrokenArchive where a name is refused."""
    return archive.load(OBJECT_NAMES)


def check_extra_state(archive: Archive, read) -> None:
    """Refuse a pickle inside an extra state that Transformer Engine would execute. ``read(offset, length)`` -> bytes.

    Extra states are None or an empty tensor but where FP8 is used: then a pickle in a byte tensor, or in a BytesIO.
    """
    for value in _flat(load_object(archive)):
        if type(value) is TensorPlace and value.dtype == torch.uint8 and value.numel:
            if not value.contiguous or value.numel > _LONGEST_EXTRA_STATE:
                raise BrokenArchive(f"holds a byte tensor of shape {list(value.shape)}, which is no extra state")
            try:
                safe_pickle.load(read(value.offset, value.numel), _EXTRA_STATE_NAMES)
            except RefusedPickle as error:
                raise BrokenArchive(f"is refused: the pickle in its byte tensor: {error}") from None
        elif type(value) is Instance and value.kind == "_io.BytesIO":
            raise BrokenArchive("holds a file of Transformer Engine 1: save again with Transformer Engine 2")


def _flat(value: object) -> list:
    """All values inside ``value``, however nested; a value that holds itself is taken once."""
    waiting, seen, found = [value], set(), []
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        found.append(value)
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        elif type(value) is Instance:
            waiting += [value.args, value.state]
    return found
