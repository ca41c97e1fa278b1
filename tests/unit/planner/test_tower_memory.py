"""The planner's bytes and numbers of a vision tower that learns are those of the tower."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dc_megatron.config import TOWERS, ConnectorConfig, LanguageConfig, VisionConfig, layer_table
from dc_megatron.model.vision_tower import VisionTower
from dc_megatron.planner.memory import Numbers, Run, stage_memory
from dc_megatron.planner.parameter_count import Model, rank_parameters
from dc_megatron.planner.tower_memory import learning_tower
from tests.helpers.language_shapes import LLAMA
from tests.helpers.tiny_models import tiny_clip, tiny_dinov2, tiny_siglip

IMAGES = 3
MAKERS = {"clip": tiny_clip, "siglip": tiny_siglip, "dinov2": tiny_dinov2}


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> dict[str, VisionConfig]:
    root = tmp_path_factory.mktemp("towers")
    return {name: VisionConfig.from_folder(make(root / name)) for name, make in MAKERS.items()}


def kept(vision: VisionConfig, connector: ConnectorConfig, recomputed: bool, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of a forward pass."""
    tower = VisionTower(vision, layer_table(vision, connector)).to(dtype)
    tower.set_learning(True, recomputed)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*tower.parameters(), *tower.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    pixels = torch.randn(IMAGES, 3, vision.image_size, vision.image_size, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # The storages stay alive in the dictionary, so no address is used twice.
        tower(pixels)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", TOWERS)
def test_what_autograd_keeps_of_a_block(towers, family, recomputed, dtype):
    """What a tower of one block more keeps more; what lies in front of the blocks is the same in both."""
    connector = ConnectorConfig("none", "mlp2x_gelu", -1)
    fewer, more = (replace(towers[family], num_hidden_layers=layers) for layers in (3, 4))

    def planned(vision: VisionConfig) -> float:
        return learning_tower(vision, connector, IMAGES, dtype.itemsize, recomputed=recomputed, unfused=True).kept

    measured = kept(more, connector, recomputed, dtype) - kept(fewer, connector, recomputed, dtype)
    assert measured == planned(more) - planned(fewer) > 0


@pytest.mark.parametrize("family", TOWERS)
def test_tensors_that_learn_lie_in_the_order_of_the_model(towers, family):
    """The optimizer's pieces depend on it."""
    vision, connector = towers[family], ConnectorConfig("dci")
    tower = VisionTower(vision, layer_table(vision, connector))
    tower.set_learning(True)
    model = Model(LLAMA, vision, connector, ("connector", "vision_tower"))
    planned = [
        one for one in rank_parameters(model, 1, ((LLAMA.num_hidden_layers,),), 0) if one.name.startswith("vision_")
    ]
    built = list(tower.model.parameters())
    assert sum(one.elements for one in planned) == sum(parameter.numel() for parameter in built)
    assert [one.elements for one in planned if one.learns] == [one.numel() for one in built if one.requires_grad]


def test_a_stage_keeps_a_tower_for_every_micro_batch_that_is_under_way(towers):
    def run(language: LanguageConfig = LLAMA, **more) -> Run:
        settings = {"trainable": ("connector", "llm", "vision_tower"), "stages": ((2,), (2,)), "micro_batches": 8}
        fixed = {"numbers": Numbers(), "positions": 64, "images": IMAGES, "connector": ConnectorConfig("dci")}
        return Run(language=language, vision=towers["clip"], **fixed, **{**settings, **more})

    frozen = run(trainable=("connector", "llm"))
    block = learning_tower(towers["clip"], ConnectorConfig("dci"), IMAGES, 2)
    first, before = stage_memory(run(), 0), stage_memory(frozen, 0)
    assert first.images - before.images == 2 * block.kept
    assert first.optimizer > before.optimizer
    assert stage_memory(run(), 1) == stage_memory(frozen, 1)
    again = learning_tower(towers["clip"], ConnectorConfig("dci"), IMAGES, 2, recomputed=True)
    assert stage_memory(run(tower_recomputed=True), 0).images - before.images == 2 * again.kept < 2 * block.kept
    # Tensor-parallel ranks share the images out; the largest share counts.
    assert stage_memory(run(tensor=2), 0).images < first.images
