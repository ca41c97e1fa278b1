"""Bytes that a vision tower which learns keeps for its backward pass.

transformers' blocks on torch's kernels, per token and block; w: the tower's width, f: its MLP's, n: bytes of a number:

    inputs and outputs of both norms 4 w n; queries, keys, values and attention's output 4 w n; the activation's input
    and output 2 f n (CLIP's, where it is not one kernel, its factor as well); w n for each scale of a layer; the norms'
    means and deviations 4 n; attention's sums 4 a head.

Equal to what autograd saves (tests/unit/planner/test_tower_memory.py). Computed again, a block keeps its input alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from dc_megatron.config import ConnectorConfig, VisionConfig, layer_table


@dataclass(frozen=True)
class TowerMemory:
    """kept: of one micro-batch until its backward pass. moment: what a block's backward pass takes beside that."""

    kept: float
    moment: float


def block_bytes(vision: VisionConfig, number: int, unfused: bool = False) -> float:
    """What a block keeps of one token. unfused: on a CPU, where CLIP's activation is three operations."""
    scales = sum(name.endswith("lambda1") for name in vision.about.block)
    inner = 3 if unfused and vision.hidden_act == "quick_gelu" else 2
    numbers = (8 + scales) * vision.hidden_size + inner * vision.intermediate_size + 4
    return number * numbers + 4 * vision.num_attention_heads


def learning_tower(
    vision: VisionConfig,
    connector: ConnectorConfig,
    images: float,
    number: int,
    *,
    recomputed: bool = False,
    unfused: bool = False,
) -> TowerMemory:
    """Of ``images`` that this rank encodes; the pixels of their patches, which the first product keeps, among it."""
    tokens = images * (vision.num_patches + vision.num_prefix_tokens)
    block, state = block_bytes(vision, number, unfused), number * vision.hidden_size
    pixels = number * 3 * vision.patch_size**2
    moment = number * (2 * vision.intermediate_size + 2 * vision.hidden_size)
    if not recomputed:
        return TowerMemory(tokens * (layer_table(vision, connector).deepest * block + pixels), tokens * moment)
    kept = layer_table(vision, connector).deepest * state + pixels
    return TowerMemory(tokens * kept, tokens * (block + moment))
