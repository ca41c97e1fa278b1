"""Reading what is there, whole or in part, and one clear message for every kind of broken folder."""

import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from dc_megatron.errors import UserError
from dc_megatron.weights import safetensors_files
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


def craft(folder, entries, data=b"", raw=None):
    """A safetensors file with a header of one's own."""
    header = json.dumps(entries).encode() if raw is None else raw
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(shape, begin, end, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"a": entry([4], 0, 4), "b": entry([4], 2, 6)}, "overlap or leave a hole"),
        ({"a": entry([4], 0, 4), "b": entry([2], 6, 8)}, "overlap or leave a hole"),
        ({"a": entry([4], 4, 8)}, "overlap or leave a hole"),
        ({"a": entry([4], -4, 0)}, "shape or offsets of a are no sizes"),
        ({"a": entry([-4], 0, 4)}, "shape or offsets of a are no sizes"),
        ({"a": entry([2.0], 0, 2)}, "shape or offsets of a are no sizes"),
        ({"a": entry([True], 0, 1)}, "shape or offsets of a are no sizes"),
        ({"a": entry([4], 4, 0)}, "a has -4 bytes"),
        ({"a": entry([3], 0, 4)}, "a has 4 bytes, not those of its shape"),
        ({"a": entry([4], 0, 4, "F32")}, "a has 4 bytes, not those of its shape"),
        ({"a": entry([1 << 50, 1 << 50], 0, 4)}, "a has 4 bytes, not those of its shape"),
        ({"a": entry([4], 0, 4, "Q4")}, "unknown dtype Q4"),
        ({"a": entry([4], 0, 4, ["F32"])}, ""),
        ({"a": {**entry([4], 0, 4), "more": 1}}, "shape or offsets of a are no sizes"),
        ({"__metadata__": {"format": 3}}, "its metadata are no strings"),
        ({"__metadata__": []}, ""),
    ],
)
def test_headers_that_do_not_hold_together(entries, reason, tmp_path):
    craft(tmp_path, entries, bytes(8))
    with pytest.raises(UserError, match=rf"the header of .*model\.safetensors is corrupt.*{reason}.*fetch it again"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}',
        b"[" * 100_000,
    ],
    ids=["a name twice", "a field twice", "nested without end"],
)
def test_headers_that_readers_could_take_differently(raw, tmp_path):
    craft(tmp_path, None, b"x", raw)
    with pytest.raises(UserError, match=r"the header of .*model\.safetensors is corrupt"):
        open_checkpoint(str(tmp_path))


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 3 << 30))
        file.truncate(4 << 30)  # sparse
    with pytest.raises(UserError, match=r"model\.safetensors has a header of 3221225472 bytes"):
        open_checkpoint(str(tmp_path))


def test_every_dtype_of_safetensors(tmp_path):
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    kinds += (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    tensors = {str(kind): torch.ones(4, 3).to(kind) for kind in (*kinds, torch.bool)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    for name, tensor in tensors.items():
        assert checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(checkpoint.read(name, (1, 3), (0, 2)).double(), tensor[1:3, :2].double())


@pytest.mark.parametrize("form", WRITERS)
def test_rows_into_the_callers_memory(form, tmp_path):
    WRITERS[form](tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    for name in ("a", "b", "d"):
        tensor = TENSORS[name]
        out = torch.empty(2, *tensor.shape[1:], dtype=tensor.dtype)
        checkpoint.read_rows(name, 0, 2, out)
        assert torch.equal(out, tensor[:2])
    assert len({checkpoint.position(name) for name in TENSORS}) == len(TENSORS)


def test_rows_beyond_the_tensor_are_a_fault_of_the_caller(folder):
    with pytest.raises(AssertionError, match="rows 5 to 7 of 6"):
        open_checkpoint(str(folder)).read_rows("a", 5, 7, torch.empty(2, 4))


def test_columns_are_read_in_blocks_of_rows(folder, monkeypatch):
    monkeypatch.setattr(safetensors_files, "_BLOCK_BYTES", 2 * 4 * 4)  # two rows of "a"
    assert torch.equal(open_checkpoint(str(folder)).read("a", (1, 6), (1, 3)), TENSORS["a"][1:6, 1:3])


def test_a_file_that_shrinks_while_it_is_used(folder):
    checkpoint = open_checkpoint(str(folder))
    os.truncate(folder / "model.safetensors", 16)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read .* ends at byte"):
        checkpoint.read("a")


def test_many_files_share_few_descriptors(tmp_path):
    weight_map = {}
    for number in range(100):
        save_file({f"t{number}": torch.tensor([float(number)])}, tmp_path / f"{number}.safetensors")
        weight_map[f"t{number}"] = f"{number}.safetensors"
    write_index(tmp_path, "model.safetensors.index.json", weight_map)
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = open_checkpoint(str(tmp_path))
    for _ in range(2):
        assert [checkpoint.read(f"t{number}").item() for number in range(100)] == list(range(100))
    assert len(os.listdir("/proc/self/fd")) <= before + 64
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: checkpoint.read(f"t{n % 100}").item(), range(1000))) == list(range(100)) * 10


@pytest.mark.parametrize("place", ["..", ".", "", "/etc/passwd", 3, None, ["a"]])
def test_an_index_names_plain_files(place, tmp_path):
    write_index(tmp_path, "model.safetensors.index.json", {"a": place})
    with pytest.raises(UserError, match=r"points outside the folder|does not name files"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("form", ["safetensors", "bin", "bin before torch 1.6"])
@pytest.mark.parametrize("part", [(None, None), ((0, 2), None), ((0, 2), (1, 3))])
def test_what_is_read_is_the_readers_own_and_contiguous(tmp_path, form, part):
    """Shards are used as they are read: changing one changes neither the next one nor the file."""
    tensor = torch.arange(12.0).view(4, 3)
    if form == "safetensors":
        save_file({"a": tensor}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    else:
        new = form == "bin"
        torch.save({"a": tensor}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    checkpoint = open_checkpoint(str(tmp_path))
    first = checkpoint.read("a", *part)
    assert first.is_contiguous()
    expected = first.clone()
    first.zero_()
    assert torch.equal(checkpoint.read("a", *part), expected)
    assert expected.sum() > 0
