"""The original's training step in plain transformers: padded micro-batches, all logits, AdamW. A speed baseline.

The mathematics is that of ``reference.model``. Padding stands behind each sample, where causal attention never looks,
so no mask is passed and PyTorch takes its fastest attention: faster than the original, which passes one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from dc_megatron.config import ConnectorConfig, VisionConfig
from dc_megatron.reference.model import IGNORED_LABEL, ReferenceConnector, dense_features


class PaddedModel(nn.Module):
    """Tower, connector and language model made from configurations, on ``device`` in ``dtype``; random weights."""

    def __init__(
        self,
        language: dict,
        vision: dict,
        connector: ConnectorConfig,
        device: torch.device,
        dtype: torch.dtype,
        gradient_checkpointing: bool,
    ):
        super().__init__()
        self.vision = VisionConfig.from_config(vision, "vision")
        self.connector_config = connector
        about = self.vision.about
        config_class, tower_class = (getattr(transformers, name) for name in (about.config_class, about.model_class))
        config = CONFIG_MAPPING[language["model_type"]](**language)
        options = {"dtype": dtype, "attn_implementation": "sdpa"}
        with torch.device(device):
            self.vision_tower = tower_class(config_class(**vision)).to(dtype).eval()
            self.language_model = AutoModelForCausalLM.from_config(config, **options)
            self.connector = ReferenceConnector(connector.input_size(self.vision), config.hidden_size).to(dtype)
        self.vision_tower.requires_grad_(False)
        self.language_model.train()
        if gradient_checkpointing:
            self.language_model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, batch: dict) -> Tensor:
        """Sum of the losses at the targets of one micro-batch (see data/rows.py), fp32 scalar."""
        embeddings = self.language_model.get_input_embeddings()(batch["input_ids"])
        if batch["num_images"]:
            pixels = batch["pixel_values"].to(embeddings.dtype)
            with torch.no_grad():
                states = self.vision_tower(pixels, output_hidden_states=True).hidden_states
                features = dense_features(states, self.vision, self.connector_config)
            placed = self.connector(features).flatten(0, 1)[batch["image_feature_index"]]
            embeddings = embeddings.masked_scatter(batch["image_mask"][..., None], placed)
        # No position_ids either: the padding's begin at 0 again, which transformers takes for a packed row and masks.
        output = self.language_model(inputs_embeds=embeddings, attention_mask=None, use_cache=False)
        return F.cross_entropy(
            output.logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )


class PaddedTraining:
    """A PaddedModel with AdamW: ``step`` trains on the micro-batches of one global batch."""

    def __init__(self, model: PaddedModel, trainable: Sequence[str], learning_rate: float):
        self.model = model
        model.connector.requires_grad_("connector" in trainable)
        model.language_model.requires_grad_("llm" in trainable)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fused = self._parameters[0].is_cuda
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=learning_rate, weight_decay=0.0, fused=fused or None, foreach=None if fused else False
        )

    def step(self, batches: Sequence[dict], move: Callable[[dict], dict] = lambda batch: batch) -> float:
        """One step, clipped at 1.0; returns the mean loss over the targets of all ``batches``.

        ``move`` brings a batch to the model's device.
        """
        targets = sum(batch["counts"]["supervised_tokens"] for batch in batches)
        losses = []
        for batch in batches:
            loss = self.model(move(batch)) / targets
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(torch.stack(losses).sum())
