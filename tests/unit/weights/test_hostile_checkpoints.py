"""Crafted checkpoints: nothing in them is executed, and one message names the file.

Every payload would make a marker file; what an ordinary reader would do with it is tried first.
"""

import io
import json
import os
import pickle
import struct
import zipfile
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from dc_megatron.errors import UserError
from dc_megatron.weights import dcp_metadata, safe_pickle, torch_zip, tree_objects
from dc_megatron.weights.safetensors_files import open_checkpoint
from dc_megatron.weights.torch_dist_tree import check_tree
from tests.helpers.dist_trees import archive, small_tree

EMBEDDING = "language_model.embedding.word_embeddings.weight"
EXTRA_STATE = "language_model.decoder.layers.mlp.linear_fc1._extra_state/shard_0_4"


class Payload:
    """Unpickling it runs a command."""

    def __init__(self, marker):
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


class Pair:
    """Hides a payload in the arguments of a call that is allowed."""

    def __init__(self, inner):
        self.inner = inner

    def __reduce__(self):
        return torch.Size, (self.inner,)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "executed"


def test_the_payload_is_real(marker):
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


# Trees. Each of these gets a writer and the marker, and returns the finished folder.


def whole_metadata(writer, marker):
    folder = writer.finish()
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    return folder


def inside_metadata(writer, marker):
    writer.metadata.planner_data = {"a": [Payload(marker)]}
    return writer.finish()


def hidden_in_a_size(writer, marker):
    writer.metadata.planner_data = Pair(Payload(marker))
    return writer.finish()


def attribute_of_an_allowed_class(writer, marker):
    """``torch.Size.__init__.__globals__`` and the like, by a dotted name."""
    folder = writer.finish()
    module, name, command = b"torch", b"serialization.os.system", f"touch {marker}".encode()
    code = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text for text in (module, name)) + b"\x93"
    code += b"\x8c" + bytes([len(command)]) + command
    (folder / ".metadata").write_bytes(code + b"\x85R.")
    return folder


def changed_class(writer, marker):
    """Sets an attribute of a class that Megatron uses: no call, and yet every later object would be another one."""
    folder = writer.finish()
    name = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    (folder / ".metadata").write_bytes(b"\x80\x02" + name + b"N}X\x0b\x00\x00\x00__setattr__" + name + b"s\x86b.")
    return folder


def old_instructions(writer, marker):
    """Protocol 0, which makes objects in other ways."""
    folder = writer.finish()
    (folder / ".metadata").write_bytes(f"(S'touch {marker}'\nios\nsystem\n.".encode())
    return folder


def huge_metadata(writer, marker):
    folder = writer.finish()
    os.truncate(folder / ".metadata", 100 << 30)  # sparse
    return folder


def deep_metadata(writer, marker):
    """A tuple in a tuple in a tuple ..., as a key: hashing it would end the process."""
    folder = writer.finish()
    (folder / ".metadata").write_bytes(b"\x80\x04})" + b"\x85" * 300_000 + b"Ns.")
    return folder


def memory_of_gigabytes(writer, marker):
    """An ordinary reader reserves memory for two thousand million values."""
    folder = writer.finish()
    (folder / ".metadata").write_bytes(b"\x80\x04Nr\xff\xff\xff\x7f.")
    return folder


def in_an_object(key):
    def make(writer, marker):
        return writer.add_object(key, [{"iteration": Payload(marker)}]).finish()

    return make


def object_that_is_no_archive(writer, marker):
    return writer.add_object("rng_state/shard_0_1", data=pickle.dumps(Payload(marker))).finish()


def pickle_in_a_byte_tensor(writer, marker):
    """Transformer Engine keeps its state so, and unpickles it."""
    data = torch.frombuffer(bytearray(pickle.dumps(Payload(marker))), dtype=torch.uint8)
    return writer.add_object(EXTRA_STATE, [data]).finish()


def as_a_chunk(writer, marker):
    return writer.add(
        "language_model.output_layer.weight", torch.zeros(2, 2), stored=lambda *_: Payload(marker)
    ).finish()


def legacy_common(writer, marker):
    folder = writer.finish()
    torch.save({"iteration": Payload(marker)}, folder / "common.pt")
    return folder


def older_legacy_common(writer, marker):
    folder = writer.finish()
    torch.save({"iteration": Payload(marker)}, folder / "common.pt", _use_new_zipfile_serialization=False)
    return folder


def path(name):
    def make(writer, marker):
        outside = writer.folder.parent / "outside.distcp"
        outside.write_bytes((writer.folder / "__0_0.distcp").read_bytes())
        info = next(info for info in writer.metadata.storage_data.values() if info.relative_path == "__0_0.distcp")
        info.relative_path = name.format(folder=writer.folder.parent)
        return writer.finish()

    return make


def link(name):
    def make(writer, marker):
        folder = writer.finish()
        os.rename(folder / name, folder.parent / "outside")
        os.symlink(folder.parent / "outside", folder / name)
        return folder

    return make


def place(**fields):
    def make(writer, marker):
        index = next(index for index in writer.metadata.storage_data if index.fqn == EMBEDDING)
        vars(writer.metadata.storage_data[index]).update(fields)
        return writer.finish()

    return make


def repacked(data, change, compression=zipfile.ZIP_STORED):
    """An archive with its entries changed."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return target.getvalue()


def chunk_archive(edit):
    """The archive of one chunk replaced by ``edit(archive)``."""

    def make(writer, marker):
        value = torch.arange(64.0).reshape(8, 8)
        writer.add("language_model.output_layer.weight", value)
        index = next(i for i in writer.metadata.storage_data if "output_layer" in i.fqn)
        writer.metadata.storage_data[index] = writer.append(edit(archive(value)))
        return writer.finish()

    return make


def same(name, data):
    return data


TREES = {
    "a pickle for .metadata": (whole_metadata, r"\.metadata is refused: .*(posix|os)\.system"),
    "a payload inside .metadata": (inside_metadata, r"\.metadata is refused: .*system"),
    "a payload as an argument": (hidden_in_a_size, r"\.metadata is refused: .*system"),
    "an attribute of a module": (attribute_of_an_allowed_class, r"\.metadata is refused: .*torch\.serialization"),
    "a changed class": (changed_class, r"\.metadata is refused: its pickle sets the state of a Constructor"),
    "old instructions": (old_instructions, r"\.metadata is refused: its pickle is broken"),
    ".metadata of 100 GB": (huge_metadata, r"\.metadata is refused: it has 107374182400 bytes"),
    ".metadata without end of depth": (deep_metadata, r"\.metadata is refused: .*nested tuple"),
    ".metadata that ask for memory": (memory_of_gigabytes, r"\.metadata is refused: .*counts beyond its length"),
    "common state": (in_an_object("common_state/shard_0_1"), r"__\d_0\.distcp at byte \d+: common_state.*system"),
    "extra state": (in_an_object(EXTRA_STATE), r"__\d_0\.distcp at byte \d+: .*_extra_state.*system"),
    "random state": (in_an_object("rng_state/shard_0_1"), r"__\d_0\.distcp at byte \d+: rng_state.*system"),
    "an object that is no archive": (object_that_is_no_archive, r"__\d_0\.distcp at byte \d+: rng_state.* no archive"),
    "a pickle in a byte tensor": (pickle_in_a_byte_tensor, r"__\d_0\.distcp at byte \d+: .*byte tensor: .*system"),
    "a payload as a chunk": (as_a_chunk, r"__\d_0\.distcp at byte \d+: .*output_layer.*system"),
    "legacy common.pt": (legacy_common, r"common\.pt is refused: .*system"),
    "older legacy common.pt": (older_legacy_common, r"common\.pt is truncated or no archive"),
    "a path upwards": (path("../outside.distcp"), r"\.metadata is refused: .*'\.\./outside\.distcp'"),
    "an absolute path": (path("{folder}/outside.distcp"), r"\.metadata is refused: .*outside\.distcp'"),
    "a path of two dots": (path(".."), r"\.metadata is refused: .*'\.\.'"),
    "a link that leads out": (link("__0_0.distcp"), r"__0_0\.distcp is a link to .*outside"),
    ".metadata that lead out": (link(".metadata"), r"\.metadata is a link to .*outside"),
    "an offset beyond the file": (place(offset=1 << 50), r"__0_0\.distcp has \d+ bytes"),
    "a negative offset": (place(offset=-4096), r"\.metadata is refused: .*offset -4096"),
    "a length of exabytes": (place(length=1 << 60), r"\.metadata is refused: .* twice"),
    "an offset into another chunk": (
        place(offset=64),
        r"\.metadata is refused: it names byte \d+ of __0_0\.distcp twice",
    ),
    "a compressed chunk": (
        chunk_archive(lambda data: repacked(data, same, zipfile.ZIP_DEFLATED)),
        r"__\d_0\.distcp at byte \d+: .*output_layer.*compressed",
    ),
    "a truncated chunk": (
        chunk_archive(lambda data: data[:-30]),
        r"__\d_0\.distcp at byte \d+: .*output_layer.*truncated",
    ),
    "a chunk larger than its storage": (
        chunk_archive(lambda data: repacked(data, lambda n, d: b"1234" if n.endswith("data/0") else d)),
        r"__\d_0\.distcp at byte \d+: .*output_layer.*asks for 256 bytes",
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_trees(name, tmp_path, marker):
    make, message = TREES[name]
    folder = make(small_tree(tmp_path / "tree"), marker)
    with pytest.raises(UserError, match=message) as caught:
        check_tree(str(folder))
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


# Hugging Face folders.


def write_bin(edit):
    def make(folder, marker):
        torch.save({"a": torch.arange(64.0)}, folder / "pytorch_model.bin")
        data = (folder / "pytorch_model.bin").read_bytes()
        (folder / "pytorch_model.bin").write_bytes(edit(data, marker))

    return make


def bin_payload(folder, marker):
    torch.save({"a": torch.ones(2), "b": Payload(marker)}, folder / "pytorch_model.bin")


def old_bin_payload(folder, marker):
    content = {"a": torch.ones(2), "b": Payload(marker)}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def plain_pickle_as_bin(folder, marker):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))


def header_of_gigabytes(folder, marker):
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 60 << 30))
        file.truncate(61 << 30)


def header_beyond_the_file(folder, marker):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", (1 << 64) - 1) + b"{}")


def overlapping_tensors(folder, marker):
    part = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    header = json.dumps({"a": part, "b": part}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")


def index_upwards(folder, marker):
    save_file({"a": torch.ones(2)}, folder.parent / "outside.safetensors")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_absolute(folder, marker):
    index = {"weight_map": {"a": str(folder.parent / "outside.safetensors")}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_without_end(folder, marker):
    (folder / "model.safetensors.index.json").write_text("[" * 200_000)


def deflated(data, marker):
    return repacked(data, same, zipfile.ZIP_DEFLATED)


def directory_of_gigabytes(data, marker):
    """The zip's end says that its directory has 3 GB."""
    end = data[-22:]
    return data[:-22] + end[:12] + struct.pack("<2L", 3 << 30, 0) + end[20:]


FOLDERS = {
    "a payload in .bin": (bin_payload, r"pytorch_model\.bin is corrupt or holds more than tensors .*system"),
    "a payload in an old .bin": (old_bin_payload, r"pytorch_model\.bin is corrupt or holds more than tensors"),
    "a plain pickle as .bin": (plain_pickle_as_bin, r"pytorch_model\.bin is corrupt or holds more than tensors"),
    "a compressed .bin": (write_bin(deflated), r"pytorch_model\.bin .*compressed"),
    "a truncated .bin": (write_bin(lambda data, marker: data[:-100]), r"pytorch_model\.bin .*truncated"),
    "a zip directory of 3 GB": (write_bin(directory_of_gigabytes), r"pytorch_model\.bin .*damaged|directory of"),
    "a header of 60 GB": (header_of_gigabytes, r"model\.safetensors has a header of 64424509440 bytes"),
    "a header beyond the file": (header_beyond_the_file, r"model\.safetensors is truncated"),
    "overlapping tensors": (overlapping_tensors, r"header of .*model\.safetensors is corrupt .*overlap"),
    "an index that leads upwards": (index_upwards, r"index\.json points outside the folder"),
    "an index with an absolute path": (index_absolute, r"index\.json points outside the folder"),
    "an index without end": (index_without_end, r"index\.json is not valid JSON"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name, tmp_path, marker):
    make, message = FOLDERS[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder, marker)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(str(folder))
    assert not marker.exists()
    assert "\n" not in str(caught.value)


# The readers in front of Megatron, and what stands behind them.


def test_inference_looks_before_megatron_does(tmp_path, marker):
    from dc_megatron.inference.assemble import load_checkpoint

    folder = inside_metadata(small_tree(tmp_path / "tree"), marker)
    with pytest.raises(UserError, match=r"--load .*\.metadata is refused"):
        load_checkpoint(None, str(folder))
    assert not marker.exists()


def test_training_looks_before_megatron_does(tmp_path, marker):
    from dc_megatron.training.engine import _check_weights

    folder = inside_metadata(small_tree(tmp_path / "tree"), marker)
    start = SimpleNamespace(loads=True, tree=str(folder))
    with pytest.raises(UserError, match=r"\.metadata is refused"):
        _check_weights(SimpleNamespace(settings=None, language=None, start=start))
    assert not marker.exists()


def test_torch_executes_nothing_once_megatron_is_patched(tmp_path, marker, monkeypatch):
    from dc_megatron.runtime import patches

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    patches.apply()
    try:
        torch.save(Payload(marker), tmp_path / "file")
        with pytest.raises(pickle.UnpicklingError, match="system"):
            torch.load(tmp_path / "file", weights_only=False)
        assert not marker.exists()
    finally:
        patches.undo()


def test_megatron_executes_nothing_on_roads_of_its_own(tmp_path, marker):
    from torch.distributed.checkpoint import FileSystemReader

    from dc_megatron.runtime import patches

    folder = small_tree(tmp_path / "tree").finish()
    patches.apply()
    try:
        assert EMBEDDING in FileSystemReader(folder).read_metadata().state_dict_metadata
        inside_metadata(small_tree(tmp_path / "hostile"), marker)
        with pytest.raises(pickle.UnpicklingError, match="system, which is not allowed"):
            FileSystemReader(tmp_path / "hostile").read_metadata()
        assert not marker.exists()
    finally:
        patches.undo()


def test_random_damage_of_metadata_is_refused_or_harmless(tmp_path):
    """Bytes of a real .metadata changed at random: an error of the reader's own, never another exception."""
    data = (small_tree(tmp_path / "tree").finish() / ".metadata").read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(500):
        changed = bytearray(data)
        for position in torch.randint(len(data), (3,), generator=generator).tolist():
            changed[position] = int(torch.randint(256, (1,), generator=generator))
        try:
            dcp_metadata.parse_metadata(bytes(changed))
        except safe_pickle.RefusedPickle:
            refused += 1
    assert refused > 300


def test_a_pickle_of_ever_more_containers(monkeypatch):
    """One byte each in the file, two hundred in memory."""
    monkeypatch.setattr(safe_pickle, "_MOST_CONTAINERS", 10_000)
    with pytest.raises(safe_pickle.RefusedPickle, match="more than 10000 containers"):
        safe_pickle.load(b"\x80\x04(" + b"\x8f" * 20_000 + b"t.", {})


def test_stand_ins_are_no_functions():
    """What a pickle can name is a stand-in or a dtype: there is nothing to call but stand-ins' constructors."""
    for table in (dcp_metadata._NAMES, tree_objects.OBJECT_NAMES, torch_zip.TENSOR_NAMES):
        assert {type(value) for value in table.values()} <= {safe_pickle.Constructor, torch.dtype}
