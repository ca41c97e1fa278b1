"""The dense connector: features of several tower layers joined (STI, SCI, DCI), then LLaVA's two-layer projector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dc_megatron.config import STI_POOL, ConnectorConfig, LayerTable, VisionConfig


def join_features(states: list[Tensor], table: LayerTable, dense_connector_type: str) -> Tensor:
    """What enters the projector, as Yao et al., "Dense Connector for MLLMs" (NeurIPS 2024) define it.

    states: hidden states [n, patches, hidden] by HF index. Returns [n, tokens, channels]: sti appends pooled tokens of
    two lower layers, sci appends their channels, dci appends the means over the two halves of the tower as channels.
    """
    final = states[table.final]
    lower = [torch.stack([states[i] for i in group]).mean(dim=0) for group in table.groups]
    if dense_connector_type == "sti":
        pooled = [nn.functional.avg_pool1d(low.transpose(1, 2), STI_POOL, STI_POOL).transpose(1, 2) for low in lower]
        return torch.cat([final, *pooled], dim=1)
    return torch.cat([final, *lower], dim=-1)


class DenseConnector(nn.Module):
    """The projector ``mlp2x_gelu`` behind ``join_features``; its parameters are ``mlp.{0,2}.{weight,bias}``.

    Replicated over the tensor-parallel group. Initialised from ``seed`` alone, so that every layout starts alike.
    """

    def __init__(self, vision: VisionConfig, connector: ConnectorConfig, language_width: int, seed: int):
        super().__init__()
        self.input_size = connector.input_size(vision)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mlp = nn.Sequential(
                nn.Linear(self.input_size, language_width),
                nn.GELU(),
                nn.Linear(language_width, language_width),
            )

    def forward(self, joined: Tensor) -> Tensor:
        """[..., channels] -> [..., language width]"""
        return self.mlp(joined)


def initial_newline(language_width: int, seed: int) -> Tensor:
    """LLaVA's start of ``image_newline``: float32 [language_width], normal with deviation 1 / sqrt(language_width).

    From ``seed`` alone, so that every layout starts alike.
    """
    return torch.randn(language_width, generator=torch.Generator().manual_seed(seed)) * language_width**-0.5
