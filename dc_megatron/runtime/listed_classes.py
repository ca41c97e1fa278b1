"""``.metadata`` of a checkpoint, unpickled by torch and Megatron through a list of the classes that belong in it.

Our own readers check a tree before Megatron sees it (`weights/dcp_metadata.py`). This stands behind them wherever
Megatron opens a tree by itself, such as for its own flags that name further checkpoints.
"""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import BinaryIO

import torch

_CLASSES = {
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "Path"},
    "builtins": {"set"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f".metadata of a checkpoint names {module}.{name}, which is not allowed")
        return super().find_class(module, name)


def with_listed_classes(original) -> SimpleNamespace:
    """The module ``pickle`` for a reader of ``.metadata``: ``load`` knows the listed classes only."""
    return SimpleNamespace(**{**vars(original), "load": load})


def load(file: BinaryIO):
    """``pickle.load``; UnpicklingError where the file names a class that is not listed."""
    return _Unpickler(file).load()
