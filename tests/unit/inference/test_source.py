"""Which tree of a checkpoint folder the tools take, and what they ask for where it says too little."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dc_megatron.errors import UserError
from dc_megatron.inference.source import Source, resolve
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.manifest import write_manifest
from tests.helpers.tiny_models import tiny_clip, tiny_llama


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """trained: two iterations and a converted model; alone: a language model that was converted alone."""
    root = tmp_path_factory.mktemp("made")
    llama, clip = tiny_llama(root / "llama", layers=2), tiny_clip(root / "clip")
    described = checkpoint_folder.CheckpointDescription(
        clip, checkpoint_folder.hash_folder_weights(clip), "sci", "mlp2x_gelu", -2, "v1", "pad", 128
    )
    alone = replace(described, vision_tower="", vision_tower_hash="", mm_dense_connector_type="", version="")
    for name, description in (("trained", described), ("alone", alone)):
        for iteration in (None, 4, 8) if name == "trained" else (None,):
            tree = Path(checkpoint_folder.tree_folder(str(root / name), iteration))
            tree.mkdir(parents=True)
            write_manifest(str(tree), {}, {})
        checkpoint_folder.write_side_files(str(root / name), llama, description)
        (root / name / checkpoint_folder.TRACKER).write_text("release")
    return root


def test_the_newest_iteration_goes_before_a_converted_model(made, tmp_path):
    folder = shutil.copytree(made / "trained", tmp_path / "trained")
    assert resolve(Source(load=str(folder))).iteration_folder == str(folder / "iter_0000008")
    assert resolve(Source(load=str(folder), checkpoint_step=4)).iteration_folder == str(folder / "iter_0000004")
    with pytest.raises(UserError, match="holds no complete checkpoint of step 6"):
        resolve(Source(load=str(folder), checkpoint_step=6))
    for iteration in (4, 8):
        (folder / f"iter_{iteration:07d}" / "dc_manifest.json").unlink()
    (folder / checkpoint_folder.TRACKER).write_text("8")
    resolved = resolve(Source(load=str(folder)))
    assert resolved.iteration_folder == str(folder / "release")
    assert (resolved.connector.dense_connector_type, resolved.version) == ("sci", "v1")
    shutil.rmtree(folder / "release")
    with pytest.raises(UserError, match=r"--load .*trained: holds no complete checkpoint"):
        resolve(Source(load=str(folder)))


def test_a_language_model_alone_needs_a_tower_a_connector_a_projector_and_a_template(made):
    source = Source(load=str(made / "alone"))
    for flag, change in (
        ("--vision_tower", {"vision_tower": str(made / "clip")}),
        ("--mm_dense_connector_type", {"dense_connector_type": "sti"}),
        ("--pretrain_mm_mlp_adapter", {"projector": "mm_projector.safetensors"}),
        ("--version", {"version": "v1"}),
    ):
        with pytest.raises(UserError, match=rf"holds a language model alone, and {flag} is missing"):
            resolve(source)
        source = replace(source, **change)
    resolved = resolve(source)
    assert resolved.iteration_folder == str(made / "alone" / "release")
    assert resolved.connector.dense_connector_type == "sti"


def test_what_a_checkpoint_has_is_not_to_be_given(made):
    with pytest.raises(UserError, match="drop --pretrain_mm_mlp_adapter"):
        resolve(Source(load=str(made / "trained"), projector="x"))
    with pytest.raises(UserError, match="drop --model_name_or_path"):
        resolve(Source(load=str(made / "trained"), model_name_or_path="x"))
    with pytest.raises(UserError, match="was trained with sci"):
        resolve(Source(load=str(made / "trained"), dense_connector_type="dci"))


GRID = [[28, 56], [56, 28]]


@pytest.fixture
def anyres(made, tmp_path) -> str:
    """The checkpoint, as one that was trained with AnyRes."""
    folder = shutil.copytree(made / "trained", tmp_path / "anyres")
    described = checkpoint_folder.read_description(str(folder))
    described = replace(described, image_aspect_ratio="anyres", image_grid_pinpoints=GRID)
    checkpoint_folder.write_json(str(folder / "hf" / checkpoint_folder.DESCRIPTION), asdict(described))
    return str(folder)


def test_a_checkpoint_says_how_its_pictures_are_cut(made, anyres):
    tiling = resolve(Source(load=anyres)).tiling
    assert (tiling.pinpoints, tiling.merge) == (((28, 56), (56, 28)), "spatial_unpad")
    assert resolve(Source(load=anyres, image_aspect_ratio="anyres")).tiling == tiling
    assert resolve(Source(load=str(made / "trained"), image_aspect_ratio="square")).tiling.pinpoints == ()
    for source, words in (
        (Source(load=anyres, image_aspect_ratio="pad"), "--image_aspect_ratio pad: .* was trained with anyres"),
        (Source(load=str(made / "trained"), image_aspect_ratio="anyres"), "anyres: .* was trained with pad"),
        (Source(load=anyres, image_grid_pinpoints="[(28, 28)]"), "--image_grid_pinpoints: --load says"),
        (Source(load=anyres, mm_patch_merge_type="flat"), "--mm_patch_merge_type: --load says"),
    ):
        with pytest.raises(UserError, match=words):
            resolve(source)


def test_an_anyres_checkpoint_that_lost_its_resolutions_is_refused(anyres):
    described = replace(checkpoint_folder.read_description(anyres), image_grid_pinpoints=None)
    checkpoint_folder.write_json(f"{anyres}/hf/{checkpoint_folder.DESCRIPTION}", asdict(described))
    with pytest.raises(UserError, match="does not say its image_grid_pinpoints"):
        resolve(Source(load=anyres))


def test_folders_are_cut_as_the_flags_say(made):
    parts = {"model_name_or_path": str(made / "llama"), "vision_tower": str(made / "clip"), "version": "v1"}
    assert resolve(Source(**parts)).tiling.pinpoints == ()
    resolved = resolve(Source(**parts, image_aspect_ratio="anyres"))
    assert resolved.tiling.pinpoints[0] == (28, 56)
    alone = Source(
        load=str(made / "alone"),
        vision_tower=str(made / "clip"),
        dense_connector_type="dci",
        projector="mm_projector.safetensors",
        version="v1",
        image_aspect_ratio="anyres",
        image_grid_pinpoints="[(56, 56)]",
    )
    assert resolve(alone).tiling.pinpoints == ((56, 56),)
