"""``hf/dc_megatron.json``: what is needed to use a checkpoint, read strictly, because people edit it."""

from __future__ import annotations

import json
import os

import pytest

from dc_megatron.errors import UserError
from dc_megatron.weights.checkpoint_folder import read_description

GOOD = {
    "vision_tower": "/towers/clip",
    "vision_tower_hash": "0",
    "mm_dense_connector_type": "dci",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "version": "v1",
    "image_aspect_ratio": "pad",
    "model_max_length": 2048,
}


def write(folder, text: str) -> str:
    os.makedirs(folder / "hf")
    (folder / "hf" / "dc_megatron.json").write_text(text)
    return str(folder)


def test_an_absolute_tower_is_kept_and_a_carried_one_lies_in_the_checkpoint(tmp_path):
    assert read_description(write(tmp_path / "a", json.dumps(GOOD))).vision_tower == "/towers/clip"
    carried = write(tmp_path / "b", json.dumps({**GOOD, "vision_tower": "vision_tower"}))
    assert read_description(carried).vision_tower == os.path.join(carried, "hf", "vision_tower")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_tower": 3}, "vision_tower is 3"),
        ({"model_max_length": True}, "model_max_length is true"),
        ({"model_max_length": "2048"}, 'model_max_length is "2048"'),
        ({"image_grid_pinpoints": [[1, 2], [3]]}, "image_grid_pinpoints is "),
        ({"image_grid_pinpoints": "all"}, 'image_grid_pinpoints is "all"'),
        ({"colour": "red"}, "entries not known here: colour"),
        ({"version": None}, "version is null"),
    ],
)
def test_an_entry_of_another_type_is_named(tmp_path, change, message):
    folder = write(tmp_path / "run", json.dumps({**GOOD, **change}))
    with pytest.raises(UserError, match=r"--load .*hf/dc_megatron.json cannot be read: ") as caught:
        read_description(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", '{"version": "v1"}', "[" * 100_000, '"v1"'])
def test_what_is_no_description_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"hf/dc_megatron.json cannot be read: "):
        read_description(write(tmp_path / "run", text))


@pytest.mark.parametrize(
    ("more", "merge"),
    [
        ({}, "flat"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[28, 56]]}, "spatial_unpad"),
        ({"image_grid_pinpoints": [[28, 56]], "mm_patch_merge_type": "flat"}, "flat"),
    ],
)
def test_how_tiles_are_joined(tmp_path, more, merge):
    """Files of before knew AnyRes with spatial_unpad only, and did not say so."""
    assert read_description(write(tmp_path / "run", json.dumps({**GOOD, **more}))).merge_type == merge
