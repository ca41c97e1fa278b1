"""Trees that Megatron wrote, read without Megatron: every tensor equals what Megatron's own load gives."""

from __future__ import annotations

import pytest
import torch

from dc_megatron.model.language_model import Layout
from dc_megatron.weights.torch_dist_tree import TorchDistTree
from tests.helpers.tiny_models import tiny_clip, tiny_llama

WORKER = "tests.multirank.tree_reading_worker"
LAYERS = "language_model.decoder.layers."


@pytest.mark.parametrize("layout", [Layout(2, 2), Layout(1, 2, 2)], ids=["TP2xPP2", "PP2xVPP2"])
def test_tensors_are_those_megatron_loads(workers, tmp_path, layout):
    folder = tmp_path / "iter_0000003"
    folder.mkdir()
    world_size = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    models = tiny_llama(tmp_path / "llama"), tiny_clip(tmp_path / "clip")
    workers.run(f"{WORKER}:save", world_size, *models, layout, str(folder))
    (expected,) = workers.run(f"{WORKER}:load", 1, str(folder))
    tree = TorchDistTree(str(folder))
    tree.check()
    assert tree.common_state()["iteration"] == 3
    assert tree.tensors.keys() == expected.keys()
    for key, value in expected.items():
        if key.startswith(LAYERS):
            layered = key.replace(LAYERS, LAYERS + "{layer}.")
            assert tree.num_layers(layered) == len(value)
            for layer, part in enumerate(value):
                assert torch.equal(read_in_blocks(tree, layered, layer), part), (key, layer)
        else:
            assert torch.equal(read_in_blocks(tree, key, None), value), key


def read_in_blocks(tree: TorchDistTree, key: str, layer: int | None) -> torch.Tensor:
    """The tensor, some rows at a time, with blocks that do not fall on chunks."""
    out = torch.empty(tree.shape(key, layer), dtype=tree.dtype(key))
    for start in range(0, out.shape[0], 37):
        end = min(start + 37, out.shape[0])
        tree.read_rows(key, layer, start, end, out[start:end])
    return out
