"""The model inside what the engine wraps it in."""

from __future__ import annotations

from megatron.core.distributed.fsdp.src.megatron_fsdp import MegatronFSDP
from megatron.core.utils import unwrap_model
from torch import nn

from dc_megatron.model.multimodal_model import DenseConnectorModel


def unwrapped(chunks: list[nn.Module]) -> list[DenseConnectorModel]:
    """The models of a rank. megatron-core's own function stops at the second of Megatron-FSDP's two wrappers."""
    return [unwrap_model(inner.module if isinstance(inner, MegatronFSDP) else inner) for inner in unwrap_model(chunks)]
