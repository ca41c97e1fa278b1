"""The Hugging Face vision tower, cut off above the highest layer that the connector reads; frozen, or learning."""

from __future__ import annotations

from functools import partial

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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


class VisionTower(nn.Module):
    """A tower: pixels in, the hidden states that ``table`` names out. Frozen until ``set_learning``.

    Layers from ``table.deepest`` on are never built: their output is not read. The tower stays in evaluation mode
    whatever ``train()`` is called on its parents: it has no dropout that would make a difference.
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
        self.set_learning(False)
        self.eval()

    def set_learning(self, learns: bool, recompute: bool = False) -> None:
        """Whether parameters learn; with ``recompute`` a layer keeps its input alone for the backward pass.

        A rank sees its share of the images only (see ``image_shares``), so gradients are a part of the sum over the
        tensor-parallel group: megatron-core reduces what carries the attribute when it finalises gradients.
        """
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = learns and name not in self._optional
            parameter.average_gradients_across_tp_domain = parameter.requires_grad
        for block in self.model.get_submodule(self._blocks):
            # Inside the hooks, which see a state once. There is no dropout, so no random numbers to repeat.
            computed = type(block).forward.__get__(block)
            again = partial(checkpoint, computed, use_reentrant=False, preserve_rng_state=False)
            block.forward = again if learns and recompute else computed

    @property
    def learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def read_state(self) -> dict[str, nn.Parameter]:
        """The parameters that are computed with, by Hugging Face's names: what a checkpoint holds of the tower."""
        return {name: parameter for name, parameter in self.model.named_parameters() if name not in self._optional}

    def train(self, mode: bool = True) -> VisionTower:
        """Stay in evaluation mode."""
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
