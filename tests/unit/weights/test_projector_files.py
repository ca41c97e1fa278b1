"""Projector files: what is written is read back, and a projector of anything else is refused."""

import os
import pathlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from dc_megatron.config import ConnectorConfig, VisionConfig
from dc_megatron.errors import UserError
from dc_megatron.weights.projector_files import has_newline, projector_shapes, read_projector, write_projector

CLIP = VisionConfig("clip", 8, 16, 6, 2, 28, 7, "gelu", 1e-5, (0.5,) * 3, (0.5,) * 3, path="towers/clip-tiny")
SIGLIP = VisionConfig("siglip", 8, 16, 6, 2, 28, 7, "gelu", 1e-5, (0.5,) * 3, (0.5,) * 3)
DCI = ConnectorConfig("dci")
HIDDEN = 12


def make_tensors(connector=DCI, dtype=torch.float32):
    return {name: torch.randn(shape).to(dtype) for name, shape in projector_shapes(connector, CLIP, HIDDEN).items()}


@pytest.fixture
def written(tmp_path):
    tensors = make_tensors()
    return tensors, *write_projector(str(tmp_path), tensors, DCI, CLIP)


def save_bin(path, tensors, prefix):
    torch.save({prefix + name.replace("mlp.", "mm_projector."): value for name, value in tensors.items()}, path)
    return str(path)


@pytest.mark.parametrize("kind", ["sti", "sci", "dci", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_files_are_read_back_bit_for_bit(kind, dtype, tmp_path):
    connector = ConnectorConfig(kind)
    tensors = make_tensors(connector, dtype)
    for path in (*write_projector(str(tmp_path), tensors, connector, CLIP), str(tmp_path)):
        read, _ = read_projector(path, connector, CLIP, HIDDEN)
        assert read.keys() == tensors.keys()
        assert all(read[name].dtype == dtype and torch.equal(read[name], tensors[name]) for name in tensors)
    assert sorted(os.listdir(tmp_path)) == ["mm_projector.bin", "mm_projector.safetensors"]


def test_files_carry_the_keys_of_llava_and_the_metadata(written):
    _, bin_path, safetensors_path = written
    keys = {f"model.mm_projector.{part}" for part in ("0.weight", "0.bias", "2.weight", "2.bias")}
    assert torch.load(bin_path, weights_only=True).keys() == load_file(safetensors_path).keys() == keys
    _, metadata = read_projector(safetensors_path, DCI, CLIP, HIDDEN)
    assert metadata["mm_dense_connector_type"] == "dci"
    assert metadata["vision_tower"] == "clip-tiny"
    assert read_projector(bin_path, DCI, CLIP, HIDDEN)[1] == {}


@pytest.mark.parametrize("prefix", ["model.", "base_model.model.model.", ""])
def test_prefixes_of_llava_files(prefix, tmp_path):
    tensors = make_tensors()
    read, _ = read_projector(save_bin(tmp_path / "mm_projector.bin", tensors, prefix), DCI, CLIP, HIDDEN)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_metadata_decides_between_sci_and_dci(written):
    with pytest.raises(UserError, match=r"was trained for --mm_dense_connector_type dci, not sci"):
        read_projector(written[2], ConnectorConfig("sci"), CLIP, HIDDEN)


def test_bare_bin_needs_the_type_named(written):
    with pytest.raises(UserError, match=r"does not say which connector.*name it with --mm_dense_connector_type"):
        read_projector(written[1], DCI, CLIP, HIDDEN, type_named=False)
    assert read_projector(written[2], DCI, CLIP, HIDDEN, type_named=False)[1]["mm_dense_connector_type"] == "dci"


def test_another_tower_of_the_same_width_is_refused(written):
    with pytest.raises(UserError, match=r"another vision tower.*vision_family clip.*vision_family siglip.*clip-tiny"):
        read_projector(written[2], DCI, SIGLIP, HIDDEN)


def test_another_select_layer_is_refused(written):
    with pytest.raises(UserError, match=r"mm_vision_select_layer -2; the run has mm_vision_select_layer -1"):
        read_projector(written[2], ConnectorConfig("dci", select_layer=-1), CLIP, HIDDEN)


@pytest.mark.parametrize("index", [1, 2])
def test_another_width_of_language_model_is_refused_with_both_shapes(written, index):
    with pytest.raises(UserError, match=r"mm_projector\.0\.weight has shape \[12, 24\].*\(width 16\) needs \[16, 24\]"):
        read_projector(written[index], DCI, CLIP, 16)


def test_another_type_in_a_bare_bin_is_refused_where_shapes_tell(written):
    with pytest.raises(UserError, match=r"but a none connector .* needs \[12, 8\]"):
        read_projector(written[1], ConnectorConfig("none"), CLIP, HIDDEN)


def test_missing_and_unknown_names_are_listed(tmp_path):
    tensors = make_tensors()
    tensors["embed_tokens.weight"] = tensors.pop("mlp.2.bias")
    path = save_bin(tmp_path / "mm_projector.bin", tensors, "model.")
    with pytest.raises(UserError, match=r"missing: model\.mm_projector\.2\.bias; .*: model\.embed_tokens\.weight"):
        read_projector(path, DCI, CLIP, HIDDEN)


@pytest.fixture
def with_newline(tmp_path):
    tensors = {**make_tensors(), "image_newline": torch.randn(HIDDEN)}
    return tensors, *write_projector(str(tmp_path / "anyres"), tensors, DCI, CLIP)


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("newline", ["optional", "required"])
def test_the_newline_of_anyres_goes_along(with_newline, written, index, newline):
    read, _ = read_projector(with_newline[index], DCI, CLIP, HIDDEN, newline=newline)
    assert read.keys() == with_newline[0].keys()
    assert torch.equal(read["image_newline"], with_newline[0]["image_newline"])
    assert "model.image_newline" in torch.load(with_newline[1], weights_only=True)
    assert has_newline(with_newline[index])
    assert not has_newline(written[index])


def test_a_newline_without_use_and_a_missing_one(with_newline, written, tmp_path):
    with pytest.raises(UserError, match=r"holds an image_newline, so it was trained with --image_aspect_ratio anyres"):
        read_projector(with_newline[1], DCI, CLIP, HIDDEN)
    with pytest.raises(UserError, match=r"holds no image_newline, which --mm_patch_merge_type spatial_unpad"):
        read_projector(written[2], DCI, CLIP, HIDDEN, newline="required")
    # Stage 1 without AnyRes, stage 2 with it: LLaVA-1.6's own recipe.
    assert "image_newline" not in read_projector(written[2], DCI, CLIP, HIDDEN, newline="optional")[0]
    path = save_bin(tmp_path / "wide.bin", {**make_tensors(), "image_newline": torch.randn(HIDDEN + 1)}, "")
    with pytest.raises(UserError, match=r"image_newline has shape \[13\]"):
        read_projector(path, DCI, CLIP, HIDDEN, newline="optional")


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"--pretrain_mm_mlp_adapter .*absent: no such file or folder"):
        read_projector(str(tmp_path / "absent"), DCI, CLIP, HIDDEN)
    with pytest.raises(UserError, match=r"neither mm_projector\.safetensors nor mm_projector\.bin"):
        read_projector(str(tmp_path), DCI, CLIP, HIDDEN)


def test_truncated_file(written):
    with open(written[2], "rb+") as file:
        file.truncate(os.path.getsize(written[2]) - 4)
    with pytest.raises(UserError, match=r"header asks for"):
        read_projector(written[2], DCI, CLIP, HIDDEN)


def test_safetensors_of_others_count_as_bare(tmp_path):
    tensors = make_tensors()
    path = str(tmp_path / "mm_projector.safetensors")
    save_file({name.replace("mlp.", "model.mm_projector."): value for name, value in tensors.items()}, path)
    assert read_projector(path, DCI, CLIP, HIDDEN)[1] == {}
    with pytest.raises(UserError, match="does not say which connector"):
        read_projector(path, DCI, CLIP, HIDDEN, type_named=False)


def test_a_failed_write_leaves_the_old_files(written, tmp_path, monkeypatch):
    bin_path = pathlib.Path(written[1])
    before = bin_path.read_bytes()

    def fail(content, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_projector(str(tmp_path), make_tensors(), DCI, CLIP)
    assert bin_path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["mm_projector.bin", "mm_projector.safetensors"]
