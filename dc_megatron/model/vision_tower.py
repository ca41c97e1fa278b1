"""The Hugging Face vision tower, cut off above the highest layer that the connector reads; frozen, or learning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from dc_megatron.config import LayerTable, VisionConfig

_HUGGING_FACE_CLASSES = {
    "clip": (CLIPVisionConfig, CLIPVisionModel),
    "siglip": (SiglipVisionConfig, SiglipVisionModel),
}


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
    """CLIP or SigLIP: pixels in, the hidden states that ``table`` names out. Frozen until ``set_learning``.

    Layers from ``table.deepest`` on are never built: their output is not read. The tower stays in evaluation mode
    whatever ``train()`` is called on its parents: it has no dropout that would make a difference.
    """

    def __init__(self, vision: VisionConfig, table: LayerTable):
        super().__init__()
        config_class, model_class = _HUGGING_FACE_CLASSES[vision.family]
        config = config_class(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=table.deepest,
            num_attention_heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_act=vision.hidden_act,
            layer_norm_eps=vision.layer_norm_eps,
        )
        if vision.family == "siglip":
            config.vision_use_head = False
        self.model = model_class(config)
        if vision.hidden_act == "quick_gelu":
            for layer in self.model.encoder.layers:
                layer.mlp.activation_fn = _QuickGelu()
        self.num_layers = table.deepest
        self.num_prefix_tokens = vision.num_prefix_tokens
        self.recompute = False
        self.set_learning(False)
        self.eval()

    def set_learning(self, learns: bool, recompute: bool = False) -> None:
        """Whether parameters learn; with ``recompute`` a layer keeps its input alone for the backward pass.

        A rank sees its share of the images only (see ``image_shares``), so gradients are a part of the sum over the
        tensor-parallel group: megatron-core reduces what carries the attribute when it finalises gradients.
        """
        self.recompute = recompute
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = learns and is_read(name)
            parameter.average_gradients_across_tp_domain = parameter.requires_grad

    @property
    def learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def read_state(self) -> dict[str, nn.Parameter]:
        """The parameters that are computed with, by Hugging Face's names: what a checkpoint holds of the tower."""
        return {name: parameter for name, parameter in self.model.named_parameters() if is_read(name)}

    def train(self, mode: bool = True) -> VisionTower:
        """Stay in evaluation mode."""
        return super().train(False)

    def load(self, state: dict[str, Tensor]) -> None:
        """Take the weights of a whole tower, keyed as the Hugging Face model in memory; unused layers are left out."""
        own = self.model.state_dict()
        unused = [name for name in state if name not in own]
        for name in unused:
            above = "encoder.layers." in name and int(name.split("encoder.layers.")[1].split(".")[0]) >= self.num_layers
            assert above or "post_layernorm" in name or "head." in name, f"vision tower has no place for {name}"
        self.model.load_state_dict({name: state.get(name, own[name]) for name in own})

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Hidden states 0 .. deepest of the encoder as HF numbers them, without prefix tokens.

        pixels [n, 3, H, W] in the dtype of the weights; each state [n, patches, hidden].
        """
        hidden = self.model.embeddings(pixels)
        if hasattr(self.model, "pre_layrnorm"):
            hidden = self.model.pre_layrnorm(hidden)
        states = [hidden]
        for layer in self.model.encoder.layers:
            if self.recompute and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, attention_mask=None, use_reentrant=False)
            else:
                hidden = layer(hidden, attention_mask=None)
            states.append(hidden)
        return [state[:, self.num_prefix_tokens :] for state in states]


def is_read(name: str) -> bool:
    """Whether the forward pass computes with a parameter: the norm behind the last layer it does not."""
    return not name.startswith("post_layernorm.")
