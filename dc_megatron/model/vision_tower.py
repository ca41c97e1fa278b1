"""The frozen Hugging Face vision tower, cut off above the highest layer that the connector reads."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from dc_megatron.config import LayerTable, VisionConfig


def _quick_gelu(hidden: Tensor) -> Tensor:
    return hidden * torch.sigmoid(1.702 * hidden)


class _QuickGelu(nn.Module):
    """CLIP's activation; on a GPU in one kernel where transformers' takes three, each of which moves all of it."""

    _fused = None

    def forward(self, hidden: Tensor) -> Tensor:
        if not hidden.is_cuda:
            return _quick_gelu(hidden)
        if _QuickGelu._fused is None:
            # Any number of pictures: one kernel for all.
            _QuickGelu._fused = torch.compile(_quick_gelu, dynamic=True)
        return _QuickGelu._fused(hidden)


class FrozenVisionTower(nn.Module):
    """A tower without gradients: pixels in, the hidden states that ``table`` names out.

    Layers from ``table.deepest`` on are never built: their output is not read. The tower stays in evaluation mode
    whatever ``train()`` is called on its parents.
    """

    def __init__(self, vision: VisionConfig, table: LayerTable):
        super().__init__()
        family = vision.about
        config_class, model_class = (getattr(transformers, name) for name in (family.config_class, family.model_class))
        self.model = model_class(config_class(**vision.hugging_face_values(table.deepest)))
        blocks = self.model.get_submodule(family.blocks)
        if vision.hidden_act == "quick_gelu":
            for block in blocks:
                block.mlp.activation_fn = _QuickGelu()
        self._states: list[Tensor] = []
        blocks[0].register_forward_pre_hook(self._begin, with_kwargs=True)
        for block in blocks:
            block.register_forward_hook(self._keep)
        self._blocks, self._optional = family.blocks, family.optional
        self.num_layers = table.deepest
        self.num_prefix_tokens = vision.num_prefix_tokens
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenVisionTower:
        """Stay in evaluation mode: the tower does not train."""
        return super().train(False)

    def load(self, state: dict[str, Tensor]) -> None:
        """Take the weights of a whole tower, keyed as the Hugging Face model in memory; unused layers are left out."""
        own = self.model.state_dict()
        unused = [name for name in state if name not in own]
        for name in unused:
            inside = name.startswith(f"{self._blocks}.")
            above = inside and int(name.removeprefix(f"{self._blocks}.").split(".")[0]) >= self.num_layers
            assert above or name in self._optional, f"vision tower has no place for {name}"
        self.model.load_state_dict({name: state.get(name, own[name]) for name in own})

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Hidden states 0 .. deepest of the encoder as HF numbers them, without prefix tokens.

        pixels [n, 3, H, W] in the dtype of the weights; each state [n, patches, hidden].
        """
        self._states = []
        self.model(pixels)
        states, self._states = self._states, []
        return [state[:, self.num_prefix_tokens :] for state in states]

    def _begin(self, _block: nn.Module, given: tuple, named: dict) -> None:
        """What enters the first block, behind all that a family has in front of it."""
        self._states.append(given[0] if given else named["hidden_states"])

    def _keep(self, _block: nn.Module, _given: tuple, output: Tensor | tuple) -> None:
        self._states.append(output[0] if isinstance(output, tuple) else output)
