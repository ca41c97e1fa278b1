"""The multimodal model in plain Hugging Face and PyTorch, as the original computes it and as slowly as need be.

No parallelism, no fusion, no padding masks: what the sharded model has to agree with.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from dc_megatron.config import STI_POOL, ConnectorConfig, ImageTiling, VisionConfig, layer_table

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


def merge_tiles(features: Tensor, size: tuple[int, int], tiling: ImageTiling, newline: Tensor | None) -> Tensor:
    """What the language model sees of one AnyRes picture of ``size`` (width, height) pixels: [positions, h].

    features: [tiles, tokens, h], the whole picture first. The mathematics of LLaVA's llava_arch.py, with tensors that
    are viewed, permuted, cut and joined; grid and cut are transformers' (which read (height, width)).
    """
    if tiling.merge == "flat":
        return features.flatten(0, 1)
    whole, grid = features[0], features[1:]
    pinpoints = [[height, width] for width, height in tiling.pinpoints]
    rows, columns = get_anyres_image_grid_shape(size[::-1], pinpoints, tiling.tile_size)
    grid = grid.view(rows, columns, tiling.side, tiling.side, -1)
    if tiling.merge == "spatial":
        return torch.cat([whole, grid.permute(0, 2, 1, 3, 4).contiguous().flatten(0, 3)])
    grid = grid.permute(4, 0, 2, 1, 3).contiguous().flatten(1, 2).flatten(2, 3)
    grid = unpad_image(grid, size[::-1])
    grid = torch.cat([grid, newline[:, None, None].expand(*grid.shape[:-1], 1)], dim=-1)
    return torch.cat([whole, grid.flatten(1, 2).transpose(0, 1)])


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

    The projector starts from PyTorch's own initialisation, and AnyRes' ``image_newline`` from LLaVA's; load others with
    ``load_state_dict``. ``tiling``: where it has pinpoints, batches must carry ``pictures``.
    """

    def __init__(
        self,
        vision_folder: str,
        language_folder: str,
        vision: VisionConfig,
        connector: ConnectorConfig,
        attn_implementation: str = "eager",
        tiling: ImageTiling | None = None,
    ):
        super().__init__()
        self.vision = vision
        self.connector_config = connector
        tower_class = getattr(transformers, vision.about.model_class)
        options = {"dtype": torch.float32, "attn_implementation": attn_implementation}
        self.vision_tower = tower_class.from_pretrained(vision_folder, **options).eval()
        self.language_model = AutoModelForCausalLM.from_pretrained(language_folder, **options)
        hidden_size = self.language_model.config.hidden_size
        self.connector = ReferenceConnector(connector.input_size(vision), hidden_size)
        self.tiling = tiling
        self.image_newline = None
        if tiling is not None and tiling.has_newline:
            self.image_newline = nn.Parameter(torch.randn(hidden_size) / hidden_size**0.5)
        self.set_trainable("connector")

    def set_trainable(self, trainable: str) -> None:
        """Freeze everything outside ``trainable``, one of ``TRAINABLE_SETS``."""
        assert trainable in TRAINABLE_SETS, f"trainable is '{trainable}'; the reference knows {TRAINABLE_SETS}"
        self.vision_tower.requires_grad_(False)
        self.connector.requires_grad_(True)
        if self.image_newline is not None:
            self.image_newline.requires_grad_(True)
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
        features = self.connector_features(batch["pixel_values"])
        if self.tiling is not None and self.tiling.pinpoints:
            # The pictures stand in the rows in their order, each whole.
            placed = torch.cat(self._merged(features, batch["pictures"]))
        else:
            placed = features.flatten(0, 1)[batch["image_feature_index"]]
        return embeddings.masked_scatter(mask[..., None], placed)

    def _merged(self, features: Tensor, pictures: list) -> list[Tensor]:
        split = features.split([picture.tiles for picture in pictures])
        return [
            merge_tiles(tiles, (picture.width, picture.height), self.tiling, self.image_newline)
            for tiles, picture in zip(split, pictures, strict=True)
        ]
