"""The multimodal model in plain Hugging Face and PyTorch, as the original computes it and as slowly as need be.

No parallelism, no fusion, no padding masks: what the sharded model has to agree with.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CLIPVisionModel, SiglipVisionModel

from dc_megatron.config import STI_POOL, ConnectorConfig, VisionConfig, layer_table

IGNORED_LABEL = -100
TRAINABLE_SETS = ("connector", "connector,llm")


def dense_features(hidden_states: tuple[Tensor, ...], vision: VisionConfig, connector: ConnectorConfig) -> Tensor:
    """What enters the projector: [n, tokens, channels] from the tower's ``hidden_states``, each [n, positions, width].

    The mathematics of the original DenseConnector (DESIGN.md section 4): STI adds pooled tokens of lower layers,
    SCI and DCI add channels, DCI after averaging two halves of the layers.
    """
    layers = layer_table(vision, connector)
    patches = [states[:, vision.num_prefix_tokens :] for states in hidden_states]
    final = patches[layers.final]
    lower = [torch.stack([patches[i] for i in group]).mean(dim=0) for group in layers.groups]
    if connector.dense_connector_type == "sti":
        pooled = [F.avg_pool1d(x.transpose(1, 2), STI_POOL, STI_POOL).transpose(1, 2) for x in lower]
        return torch.cat([final, *pooled], dim=1)
    return torch.cat([final, *lower], dim=2)


class ReferenceConnector(nn.Module):
    """The projector ``mlp2x_gelu``: Linear, exact GELU, Linear; parameters ``mlp.{0,2}.{weight,bias}``."""

    def __init__(self, input_size: int, output_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(input_size, output_size), nn.GELU(), nn.Linear(output_size, output_size))

    def forward(self, features: Tensor) -> Tensor:
        """[n, tokens, input_size] -> [n, tokens, output_size]."""
        return self.mlp(features)


@dataclass
class ReferenceOutput:
    """``loss_sum`` fp32 scalar over ``supervised_tokens`` positions; ``logits`` fp32 [b, S, vocab_size]."""

    loss_sum: Tensor
    supervised_tokens: int
    logits: Tensor


class ReferenceModel(nn.Module):
    """Frozen tower, dense connector and language model, from Hugging Face folders, in fp32.

    The projector starts from PyTorch's own initialisation; load another with ``connector.load_state_dict``.
    """

    def __init__(
        self,
        vision_folder: str,
        language_folder: str,
        vision: VisionConfig,
        connector: ConnectorConfig,
        attn_implementation: str = "eager",
    ):
        super().__init__()
        self.vision = vision
        self.connector_config = connector
        tower_class = CLIPVisionModel if vision.family == "clip" else SiglipVisionModel
        options = {"dtype": torch.float32, "attn_implementation": attn_implementation}
        self.vision_tower = tower_class.from_pretrained(vision_folder, **options).eval()
        self.language_model = AutoModelForCausalLM.from_pretrained(language_folder, **options)
        hidden_size = self.language_model.config.hidden_size
        self.connector = ReferenceConnector(connector.input_size(vision), hidden_size)
        self.set_trainable("connector")

    def set_trainable(self, trainable: str) -> None:
        """Freeze everything outside ``trainable``, one of ``TRAINABLE_SETS``."""
        assert trainable in TRAINABLE_SETS, f"trainable is '{trainable}'; the reference knows {TRAINABLE_SETS}"
        self.vision_tower.requires_grad_(False)
        self.connector.requires_grad_(True)
        self.language_model.requires_grad_("llm" in trainable)

    def train(self, mode: bool = True) -> ReferenceModel:
        """As in PyTorch, but the frozen tower stays in evaluation mode."""
        super().train(mode)
        self.vision_tower.eval()
        return self

    def connector_features(self, pixel_values: Tensor) -> Tensor:
        """float32 [n, 3, H, W] -> [n, tokens_per_image, hidden_size of the language model]."""
        with torch.no_grad():
            states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        return self.connector(dense_features(states, self.vision, self.connector_config))

    def forward(self, batch: dict) -> ReferenceOutput:
        """The loss of one micro-batch that carries the pixels of all its images (``tp`` share (0, 1)).

        Every segment of ``cu_seqlens`` runs alone through the language model, so packing and padding cannot matter.
        """
        embeddings = self._embed(batch).flatten(0, 1)
        positions = batch["position_ids"].flatten()
        bounds = batch["cu_seqlens"].tolist()
        assert (bounds[0], bounds[-1]) == (0, len(positions)), f"cu_seqlens {bounds} do not cover {len(positions)}"
        segments = []
        for start, end in itertools.pairwise(bounds):
            if end > start:
                output = self.language_model(
                    inputs_embeds=embeddings[None, start:end],
                    position_ids=positions[None, start:end],
                    use_cache=False,
                )
                segments.append(output.logits[0].float())
        logits, labels = torch.cat(segments), batch["labels"].flatten()
        loss_sum = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
        supervised_tokens = int((labels != IGNORED_LABEL).sum())
        return ReferenceOutput(loss_sum, supervised_tokens, logits.unflatten(0, batch["labels"].shape))

    def _embed(self, batch: dict) -> Tensor:
        """[b, S, hidden_size]: word embeddings with the image features in their places."""
        embeddings = self.language_model.get_input_embeddings()(batch["input_ids"])
        mask = batch["image_mask"]
        if not mask.any():
            return embeddings
        features = self.connector_features(batch["pixel_values"]).flatten(0, 1)
        placed = features[batch["image_feature_index"]]
        return embeddings.masked_scatter(mask[..., None], placed)
