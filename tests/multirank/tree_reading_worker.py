"""What ranks do for the tests of reading trees: Megatron saves one, and loads it whole."""

from __future__ import annotations

import torch
from torch import Tensor

from dc_megatron.config import LanguageConfig
from dc_megatron.model.language_model import Layout
from dc_megatron.runtime import parallel
from tests.multirank.tree_worker import build_chunks, start


def save(language_folder: str, vision_folder: str, layout: Layout, folder: str) -> None:
    """A model of ``layout``, every parameter random, into ``folder`` as training saves it."""
    from megatron.core import dist_checkpointing

    start(layout)
    chunks = build_chunks(LanguageConfig.from_folder(language_folder), vision_folder, layout)
    # Replicas, such as norms on all tensor-parallel ranks, stay alike: their values do not depend on the rank.
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    states = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    dist_checkpointing.save({**states, "iteration": 3, "checkpoint_version": 3.0}, folder)


def load(folder: str) -> dict[str, Tensor]:
    """Every tensor of a tree, whole, as Megatron itself reads it."""
    from megatron.core import dist_checkpointing

    parallel.start()
    loaded = dist_checkpointing.load_plain_tensors(folder)
    return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
