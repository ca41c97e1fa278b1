"""Reading what is there, whole or in part, and one clear message for every kind of broken folder."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from dc_megatron.errors import UserError
from dc_megatron.weights.safetensors_files import open_checkpoint

TENSORS = {
    "a": torch.arange(24.0).reshape(6, 4),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "c": torch.tensor(3.5),
    "d": torch.arange(8, dtype=torch.int64).reshape(2, 2, 2),
}


@pytest.fixture
def folder(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def write_index(folder, name, weight_map):
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


class Touch:
    """Unpickling it writes a file: what a malicious checkpoint could do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def write_bin(folder, **options):
    torch.save(TENSORS, folder / "pytorch_model.bin", **options)


WRITERS = {
    "safetensors": lambda folder: save_file(TENSORS, folder / "model.safetensors"),
    "bin": write_bin,
    # The format before torch 1.6, which cannot be memory-mapped.
    "legacy_bin": lambda folder: write_bin(folder, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("form", WRITERS)
def test_names_shapes_dtypes_and_parts(form, tmp_path):
    WRITERS[form](tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert sorted(checkpoint.names()) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.read(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)
    assert torch.equal(checkpoint.read("a", (2, 5)), TENSORS["a"][2:5])
    assert torch.equal(checkpoint.read("a", (2, 5), (1, 3)), TENSORS["a"][2:5, 1:3])
    assert torch.equal(checkpoint.read("a", None, (1, 3)), TENSORS["a"][:, 1:3])
    assert torch.equal(checkpoint.read("b", (1, 4)), TENSORS["b"][1:4])


def test_safetensors_come_before_bin(folder):
    torch.save({"other": torch.ones(1)}, folder / "pytorch_model.bin")
    assert "a" in open_checkpoint(str(folder)).names()


@pytest.mark.parametrize("cut", [1, 40, 10_000])
def test_truncated_file(folder, cut):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(
        UserError, match=r"--model_name_or_path .*model\.safetensors (has|is truncated).*fetch it again"
    ):
        open_checkpoint(str(folder))


def test_bytes_behind_the_last_tensor(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"xx")
    with pytest.raises(UserError, match=r"has \d+ bytes where its header asks for \d+"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("header", [b"{broken", b"[]", b'{"a": {"dtype": "F32"}}', b'{"a": 3}', b"\xff\xfe"])
def test_corrupt_header(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match=r"model\.safetensors is corrupt|header of .*model\.safetensors is corrupt"):
        open_checkpoint(str(tmp_path))


def test_a_page_saved_instead_of_the_file(tmp_path):
    (tmp_path / "model.safetensors").write_text("<html>" + "not found " * 20 + "</html>")
    with pytest.raises(UserError, match="truncated or no safetensors file"):
        open_checkpoint(str(tmp_path))


def test_missing_shards_are_named(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "model-1.safetensors")
    write_index(
        tmp_path,
        "model.safetensors.index.json",
        {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"},
    )
    with pytest.raises(UserError, match=r"2 of 3 files .* missing: model-2\.safetensors, model-3\.safetensors"):
        open_checkpoint(str(tmp_path))


def test_index_and_shard_disagree(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    write_index(tmp_path, "model.safetensors.index.json", {"a": "one.safetensors", "z": "one.safetensors"})
    with pytest.raises(UserError, match=r"says that z is in one\.safetensors; it is not there"):
        open_checkpoint(str(tmp_path))


def test_one_name_in_two_shards(tmp_path):
    for file in ("one.safetensors", "two.safetensors"):
        save_file({"a": TENSORS["a"], file: TENSORS["b"]}, tmp_path / file)
    weight_map = {file: file for file in ("one.safetensors", "two.safetensors")}
    write_index(tmp_path, "model.safetensors.index.json", weight_map)
    with pytest.raises(UserError, match=r"a is both in .*one\.safetensors and in .*two\.safetensors"):
        open_checkpoint(str(tmp_path))


def test_an_index_does_not_lead_out_of_the_folder(tmp_path):
    save_file(TENSORS, tmp_path / "model-1.safetensors")
    (tmp_path / "inner").mkdir()
    write_index(tmp_path / "inner", "model.safetensors.index.json", {"a": "../model-1.safetensors"})
    with pytest.raises(UserError, match=r"points outside the folder: \.\./model-1\.safetensors"):
        open_checkpoint(str(tmp_path / "inner"))


def test_index_that_is_no_json(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        open_checkpoint(str(tmp_path))


def test_a_pickle_is_never_executed(tmp_path):
    mark = tmp_path / "executed"
    torch.save({"a": Touch(str(mark))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is corrupt or holds more than tensors"):
        open_checkpoint(str(tmp_path))
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04" + b"\0" * 50])
def test_corrupt_bin(tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"pytorch_model\.bin is corrupt"):
        open_checkpoint(str(tmp_path))


def test_bin_that_is_no_table_of_tensors(tmp_path):
    torch.save({"epoch": 3, "a": TENSORS["a"]}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="is not a table of tensors by name"):
        open_checkpoint(str(tmp_path))


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match=r"no such folder"):
        open_checkpoint(os.path.join(tmp_path, "absent"), "--vision_tower")
    with pytest.raises(UserError, match=r"--vision_tower .*: no weights in the folder; looked for model\.safetensors"):
        open_checkpoint(str(tmp_path), "--vision_tower")
