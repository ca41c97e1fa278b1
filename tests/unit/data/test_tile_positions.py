"""Positions of AnyRes features: gathering by them equals what transformers and LLaVA do with tensors."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from dc_megatron.config import ImageTiling
from dc_megatron.data.picture import Picture, make_picture
from dc_megatron.data.tile_positions import NEWLINE, feature_positions

SIDE, TILE = 3, 21
GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def tiling(merge, tokens=SIDE * SIDE):
    return ImageTiling(TILE, tokens, SIDE, tuple((across * TILE, down * TILE) for across, down in GRIDS), merge)


def pictures(tiling, count=200):
    draw = random.Random(4)
    some = [(draw.randint(1, 200), draw.randint(1, 200)) for _ in range(count)]
    return [make_picture(tiling, "p", *size) for size in [*some, (1, 400), (400, 1), (21, 21), (500, 375)]]


def gathered(tiling, some, features, newline):
    """The features of all pictures in a row; [tiles * tokens, h] and [h]."""
    first, places = 0, []
    for picture in some:
        places.append(torch.from_numpy(feature_positions(tiling, picture, first)))
        first += picture.tiles
    places = torch.cat(places)
    assert places.dtype == torch.int64
    rows = torch.cat([features, newline[None]])
    return rows[torch.where(places == NEWLINE, len(features), places)]


def make_features(tiling, some, width=5):
    tiles = sum(picture.tiles for picture in some)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tiles, tiling.tile_tokens, width, generator=generator), torch.randn(width, generator=generator)


def test_spatial_unpad_is_that_of_transformers():
    one = tiling("spatial_unpad")
    some = pictures(one)
    features, newline = make_features(one, some)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=TILE, patch_size=TILE // SIDE),
        image_grid_pinpoints=[[down, across] for across, down in one.pinpoints],
    )
    packed, lengths = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),
        list(features.split([picture.tiles for picture in some])),
        [(picture.height, picture.width) for picture in some],
        "full",
        newline,
    )
    assert lengths.tolist() == [picture.tokens for picture in some]
    assert torch.equal(gathered(one, some, features.flatten(0, 1), newline), torch.cat(packed))


def test_spatial_is_that_of_llava():
    """llava_arch.py: view, permute(0, 2, 1, 3, 4), flatten(0, 3), the whole in front."""
    one = tiling("spatial")
    some = pictures(one)
    features, newline = make_features(one, some)
    expected = []
    for picture, tiles in zip(some, features.split([picture.tiles for picture in some]), strict=True):
        shape = one.of(picture.width, picture.height)
        grid = tiles[1:].view(shape.rows, shape.columns, SIDE, SIDE, -1).permute(0, 2, 1, 3, 4)
        expected.append(torch.cat([tiles[0], grid.flatten(0, 3)]))
    assert torch.equal(gathered(one, some, features.flatten(0, 1), newline), torch.cat(expected))


@pytest.mark.parametrize("tokens", [SIDE * SIDE, SIDE * SIDE + 2], ids=["patches", "with pooled tokens"])
def test_flat_takes_the_tiles_as_they_come(tokens):
    one = tiling("flat", tokens)
    some = pictures(one, 20)
    features, newline = make_features(one, some)
    assert torch.equal(gathered(one, some, features.flatten(0, 1), newline), features.flatten(0, 1))


def test_a_picture_of_one_tile():
    one = ImageTiling(TILE, 11, SIDE)
    picture = make_picture(one, "p", 50, 60)
    assert feature_positions(one, picture, 2).tolist() == list(range(22, 33))


def test_positions_of_another_tiling_are_noticed():
    with pytest.raises(AssertionError, match="counted with another tiling"):
        feature_positions(tiling("spatial_unpad"), Picture("p.jpg", 50, 60, 9), 0)
