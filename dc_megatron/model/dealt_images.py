"""The frozen tower's work of a whole step, dealt out tile by tile over the stages and tensor-parallel ranks of a model.

Without it the first pipeline stage encodes every micro-batch's images while the others wait; the vision tower reads
nothing that the step changes, so all of it can be done before the schedule begins.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from dc_megatron.config import dealt_tiles
from dc_megatron.model.dense_connector import join_features
from dc_megatron.model.multimodal_model import DenseConnectorModel

# Tiles that go through the tower at once: its hidden states, of which all are kept until they are joined, take 30 MB
# each with CLIP-L/336 in bf16.
TILES_AT_ONCE = 32


def dealing_place(groups: ProcessGroupCollection) -> tuple[int, int]:
    """(this rank's number, number of ranks) among those that tiles are dealt out to: a model's tp x pp ranks."""
    tensor, pipeline = groups.tp, groups.pp
    return tensor.rank() * pipeline.size() + pipeline.rank(), tensor.size() * pipeline.size()


@torch.no_grad()
def encode_dealt(model: DenseConnectorModel, pixels: Tensor, dealt_before: int, tiles: int) -> Tensor | None:
    """What enters the projector for the ``tiles`` of a step, [tiles, tokens, channels]; None off the first stage.

    pixels [k, 3, H, W]: those that were dealt to this rank (config.dealt_tiles; ``dealt_before``: the tiles of earlier
    steps). A collective call: all ranks of a model, with the same two numbers. Every rank encodes ceil(tiles / ranks).
    """
    groups = model.pg_collection
    ranks = dealing_place(groups)[1]
    share = -(-tiles // ranks)
    if not tiles:
        return None
    mine = _encoded(model, _filled_up(pixels, share))
    if groups.pp.size() > 1:
        first = groups.pp.rank() == 0
        parts = [torch.empty_like(mine) for _ in range(groups.pp.size())] if first else None
        torch.distributed.gather(mine, parts, group=groups.pp, group_dst=0)
        if not first:
            return None
        mine = torch.cat(parts)
    if groups.tp.size() > 1:
        whole = mine.new_empty(groups.tp.size() * mine.shape[0], *mine.shape[1:])
        torch.distributed.all_gather_into_tensor(whole, mine, group=groups.tp)
        mine = whole
    # Tile u of the step is the (u // ranks)th that its rank got.
    tile = torch.arange(tiles)
    places = (dealt_before + tile) % ranks * share + tile // ranks
    return mine.index_select(0, places.to(mine.device))


def check_dealt(pixels: Tensor, dealt_before: int, tiles: int, rank: int, ranks: int) -> None:
    """The pixels that came are as many as were dealt."""
    expected = len(dealt_tiles(tiles, dealt_before, rank, ranks))
    assert pixels.shape[0] == expected, f"{pixels.shape[0]} tiles decoded, {expected} of {tiles} dealt to rank {rank}"


def _encoded(model: DenseConnectorModel, pixels: Tensor) -> Tensor:
    parts = [
        join_features(model.vision_tower(part), model.layer_table, model.dense_connector_type)
        for part in pixels.split(TILES_AT_ONCE)
    ]
    return torch.cat(parts).contiguous()


def _filled_up(pixels: Tensor, share: int) -> Tensor:
    missing = share - pixels.shape[0]
    return torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])]) if missing else pixels
