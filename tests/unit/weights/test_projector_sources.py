"""Stage 2 takes a projector from a file, a run or a checkpoint, and refuses one of another connector or tower."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from dc_megatron.config import ConnectorConfig, VisionConfig
from dc_megatron.errors import UserError
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.importer import import_checkpoint
from dc_megatron.weights.manifest import MANIFEST
from dc_megatron.weights.projector_files import has_newline, projector_shapes, read_projector, write_projector
from dc_megatron.weights.projector_sources import refuse_other_tower
from tests.helpers.tiny_models import tiny_clip, tiny_llama

DCI, HIDDEN = ConnectorConfig("dci"), 64


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict:
    """A tower, another one of the same shape, and a projector of the first in every form."""
    root = tmp_path_factory.mktemp("chain")
    towers = {name: tiny_clip(root / name, seed=seed) for seed, name in enumerate(("clip", "other"))}
    vision = VisionConfig.from_folder(towers["clip"])
    generator = torch.Generator().manual_seed(3)
    shapes = projector_shapes(DCI, vision, HIDDEN)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights = checkpoint_folder.hash_folder_weights(towers["clip"])
    bin_path, path = write_projector(str(root / "run"), tensors, DCI, vision, tower_hash=weights)
    imported = str(root / "imported")
    llama = tiny_llama(root / "llama", layers=1)
    import_checkpoint(llama, imported, vision_tower=towers["clip"], projector=path)
    return {
        **towers,
        "root": root,
        "vision": vision,
        "tensors": tensors,
        "llama": llama,
        "places": {"file": path, "run": str(root / "run"), "checkpoint": imported, "tree": f"{imported}/release/"},
        "bin": bin_path,
    }


@pytest.mark.parametrize("place", ["file", "run", "checkpoint", "tree"])
def test_one_flag_takes_the_projector_from_wherever_it_lies(made, place):
    read, said = read_projector(made["places"][place], DCI, made["vision"], HIDDEN, type_named=False)
    assert read.keys() == made["tensors"].keys()
    assert all(torch.equal(read[name], value) for name, value in made["tensors"].items())
    assert (said["mm_dense_connector_type"], said["vision_tower"]) == ("dci", "clip")
    assert not has_newline(made["places"][place])


@pytest.mark.parametrize("place", ["file", "run", "checkpoint", "tree"])
def test_another_connector_is_refused_though_its_shapes_fit(made, place):
    with pytest.raises(UserError, match=r"was trained for --mm_dense_connector_type dci, not sci"):
        read_projector(made["places"][place], ConnectorConfig("sci"), made["vision"], HIDDEN)


@pytest.mark.parametrize("place", ["file", "run", "checkpoint", "tree"])
def test_another_tower_of_the_same_shape_is_refused(made, place):
    refuse_other_tower(made["places"][place], made["clip"])
    with pytest.raises(
        UserError, match=r"another vision tower \(clip, hash [0-9a-f]{16}\) than --vision_tower .*other"
    ):
        refuse_other_tower(made["places"][place], made["other"])


def test_the_tower_is_compared_by_its_weights_not_by_its_name(made, tmp_path):
    refuse_other_tower(made["places"]["file"], shutil.copytree(made["clip"], tmp_path / "renamed"))
    # LLaVA's own files say nothing.
    refuse_other_tower(made["bin"], made["other"])


def test_a_conversion_refuses_it_too(made, tmp_path):
    with pytest.raises(UserError, match=r"--projector .*another vision tower"):
        import_checkpoint(
            made["llama"], str(tmp_path / "x"), vision_tower=made["other"], projector=made["places"]["file"]
        )


def test_a_checkpoint_that_is_incomplete_or_has_no_connector_is_refused(made, tmp_path):
    broken = shutil.copytree(made["places"]["checkpoint"], tmp_path / "broken")
    os.remove(broken / "release" / MANIFEST)
    with pytest.raises(UserError, match="release: not a complete checkpoint"):
        read_projector(str(broken / "release"), DCI, made["vision"], HIDDEN)
    with pytest.raises(
        UserError, match=r"neither mm_projector\.safetensors nor mm_projector\.bin, and is no checkpoint"
    ):
        read_projector(str(broken), DCI, made["vision"], HIDDEN)
    alone = str(tmp_path / "alone")
    import_checkpoint(made["llama"], alone)
    with pytest.raises(UserError, match="holds a language model alone, no connector"):
        read_projector(alone, DCI, made["vision"], HIDDEN)


def test_the_projector_of_a_tower_that_was_trained_needs_that_tower(made, tmp_path):
    write_projector(str(tmp_path), made["tensors"], DCI, made["vision"], tower_trained=True)
    with pytest.raises(UserError, match=r"trained together with its vision tower \(clip at the start\).*--load DIR"):
        refuse_other_tower(str(tmp_path), made["clip"])
    refuse_other_tower(str(tmp_path), made["clip"], trained_here=True)
