"""Megatron's trees: what they hold is read exactly, byte by byte once, and what does not fit together is refused."""

import json
import os
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from dc_megatron.errors import UserError
from dc_megatron.weights import torch_dist_tree
from dc_megatron.weights.torch_dist_tree import TorchDistTree, check_tree
from tests.helpers.dist_trees import STACKED, TreeWriter, cut, grid, small_tensors, small_tree

PREFIX = "language_model.decoder.layers."


@pytest.fixture
def tree(tmp_path):
    return TorchDistTree(str(small_tree(tmp_path / "tree").finish()))


def keys_and_values(tensors):
    """(key with {layer}, layer, value) of everything a converter asks for."""
    for key, value in tensors.items():
        if key.startswith(PREFIX):
            yield from ((key.replace(PREFIX, PREFIX + "{layer}."), layer, part) for layer, part in enumerate(value))
        else:
            yield key, None, value


def read(tree, key, layer, start=0, end=None):
    shape = tree.shape(key, layer)
    end = shape[0] if end is None else end
    out = torch.full((end - start, *shape[1:]), -1, dtype=tree.dtype(key))
    tree.read_rows(key, layer, start, end, out)
    return out


def test_every_range_of_rows(tree):
    for key, layer, value in keys_and_values(small_tensors()):
        assert tree.has(key)
        assert tree.shape(key, layer) == tuple(value.shape)
        for start in range(value.shape[0] + 1):
            for end in range(start, value.shape[0] + 1):
                assert torch.equal(read(tree, key, layer, start, end), value[start:end]), (key, layer, start, end)


def test_what_it_says_of_itself(tree):
    assert tree.num_layers(STACKED) == 4
    assert tree.num_bytes == sum(value.numel() * 4 for value in small_tensors().values())
    assert not tree.has("language_model.output_layer.weight")
    assert not tree.has(STACKED.replace("fc2", "fc3"))
    assert tree.dtype(STACKED) == torch.float32
    assert {type(part) for part in tree.position(STACKED, 2)} == {int}
    assert tree.common_state() == {"iteration": 7, "checkpoint_version": 3.0}
    tree.check()


def test_layers_under_keys_of_their_own(tmp_path):
    writer = TreeWriter(tmp_path / "tree")
    layers = torch.arange(3 * 4 * 6.0).reshape(3, 4, 6)
    for layer, value in enumerate(layers):
        writer.add(STACKED.format(layer=layer), value, grid((4, 6), (1, 2)))
    tree = TorchDistTree(str(writer.finish()))
    assert tree.num_layers(STACKED) == 3
    assert tree.has(STACKED)
    for layer, value in enumerate(layers):
        assert torch.equal(read(tree, STACKED, layer, 1, 3), value[1:3])


@pytest.mark.parametrize("parts", [(1, 1, 1), (2, 1, 1), (4, 2, 3), (2, 3, 2)])
def test_any_division_of_a_stacked_tensor(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_dist_tree, "_BLOCK_BYTES", 32)
    value = torch.arange(4 * 6 * 12).reshape(4, 6, 12).to(torch.bfloat16)
    key = STACKED.replace("{layer}.", "")
    folder = TreeWriter(tmp_path / "tree").add(key, value, grid((4, 6, 12), parts)).finish()
    tree = TorchDistTree(str(folder))
    for layer in range(4):
        assert torch.equal(read(tree, STACKED, layer, 1, 5), value[layer, 1:5])


def test_divisions_that_are_no_grid(tmp_path):
    value = torch.arange(24.0).reshape(4, 6)
    boxes = [((0, 0), (3, 2)), ((3, 0), (1, 4)), ((0, 2), (3, 4)), ((3, 4), (1, 2))]
    tree = TorchDistTree(str(TreeWriter(tmp_path / "tree").add("a", value, boxes).finish()))
    assert torch.equal(read(tree, "a", None), value)


def test_chunks_that_are_not_contiguous(tmp_path):
    value = torch.arange(24.0).reshape(4, 6)
    writer = TreeWriter(tmp_path / "tree")
    writer.add("a", value, grid((4, 6), (2, 2)), lambda tensor, box: cut(tensor.t(), tuple(b[::-1] for b in box)).t())
    tree = TorchDistTree(str(writer.finish()))
    assert torch.equal(read(tree, "a", None, 1, 4), value[1:4])


def test_scalars_do_no_harm(tmp_path):
    tree = TorchDistTree(str(TreeWriter(tmp_path / "tree").add("step", torch.tensor(3.0)).finish()))
    tree.check()
    assert tree.shape("step") == ()


def test_every_byte_is_read_once(tree, monkeypatch):
    tree.check()  # headers
    places = []
    original = os.preadv

    def recording(descriptor, buffers, offset):
        count = original(descriptor, buffers, offset)
        places.append((os.readlink(f"/proc/self/fd/{descriptor}"), offset, offset + count))
        return count

    monkeypatch.setattr(os, "preadv", recording)
    for key, layer, _ in keys_and_values(small_tensors()):
        rows = tree.shape(key, layer)[0]
        read(tree, key, layer, 0, rows // 2)
        read(tree, key, layer, rows // 2, rows)
    assert sum(end - start for _, start, end in places) == tree.num_bytes
    places.sort()
    assert all(one[0] != other[0] or one[2] <= other[1] for one, other in pairwise(places))


def test_a_tree_that_torch_wrote(tmp_path):
    """torch's own writer, planner and metadata, instead of the tests' imitation."""
    value = torch.arange(12.0).reshape(3, 4)
    dcp.save({"language_model.a": value, "_extra_state/shard_0_1": [None]}, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    tree = TorchDistTree(str(tmp_path))
    tree.check()
    assert torch.equal(read(tree, "language_model.a", None), value)
    assert "_extra_state/shard_0_1" in str(tree.objects)


def damaged(folder: Path, change) -> str:
    """A small tree whose .metadata were changed by ``change(metadata)`` before they were written."""
    writer = small_tree(folder)
    change(writer.metadata)
    return str(writer.finish())


def first(metadata, word):
    return next((index, info) for index, info in metadata.storage_data.items() if word in index.fqn)


def set_info(word, **fields):
    def change(metadata):
        vars(first(metadata, word)[1]).update(fields)

    return change


def set_chunk(word, **fields):
    def change(metadata):
        key = next(key for key in metadata.state_dict_metadata if word in key)
        vars(metadata.state_dict_metadata[key].chunks[0]).update(fields)

    return change


def without_storage(metadata):
    del metadata.storage_data[first(metadata, "embedding")[0]]


def without_entry(metadata):
    metadata.state_dict_metadata.pop("language_model.decoder.final_layernorm.weight")


def smaller_shape(metadata):
    entry = metadata.state_dict_metadata["language_model.embedding.word_embeddings.weight"]
    entry.size = torch.Size((24, 6))


def other_dtype(metadata):
    entry = metadata.state_dict_metadata["language_model.embedding.word_embeddings.weight"]
    entry.properties.dtype = torch.bfloat16


FAULTS = {
    "a chunk outside the tensor": (set_chunk("embedding", sizes=torch.Size((6, 7))), "lies outside its shape"),
    "a chunk of too few dimensions": (set_chunk("embedding", sizes=torch.Size((6,))), "number of dimensions"),
    "a chunk over another": (set_chunk("embedding", sizes=torch.Size((12, 6))), "the chunks of .* hold 108 elements"),
    "a hole": (set_chunk("embedding", sizes=torch.Size((5, 6))), "the chunks of .* hold 66 elements"),
    "a chunk without bytes": (without_storage, "stored nowhere"),
    "bytes without a tensor": (without_entry, "of which it knows nothing else"),
    "another shape": (smaller_shape, "hold 72 elements"),
    "a place beyond the file": (set_info("embedding", offset=1 << 40), r"__0_0\.distcp has \d+ bytes, .*truncated"),
    "a place before the file": (set_info("embedding", offset=-1), "at offset -1"),
    "a length of another kind": (set_info("embedding", length=3.5), r"in 3\.5 bytes"),
    "two tensors in one place": (set_info("final_layernorm", offset=0, relative_path="__0_0.distcp"), "twice"),
    "a file that is not there": (set_info("embedding", relative_path="__9_0.distcp"), r"__9_0\.distcp is missing"),
    "a transformed stream": (set_info("embedding", transform_descriptors=["stream.zstd"]), "compressed or transformed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_metadata_that_do_not_hold_together(fault, tmp_path):
    change, reason = FAULTS[fault]
    folder = damaged(tmp_path / "tree", change)
    with pytest.raises(UserError, match=rf"--load .*tree: .*{reason}"):
        TorchDistTree(folder)


def test_chunks_over_each_other_with_the_right_volume(tmp_path):
    writer = TreeWriter(tmp_path / "tree")
    writer.add("a", torch.zeros(4, 4), [((0, 0), (2, 4)), ((1, 0), (2, 4))])
    with pytest.raises(UserError, match="chunks of a overlap"):
        TorchDistTree(str(writer.finish()))


def test_a_chunk_of_another_dtype_than_announced(tmp_path):
    folder = damaged(tmp_path / "tree", other_dtype)
    with pytest.raises(UserError, match=r"__0_0\.distcp at byte \d+: .*embedding.* is not what was announced"):
        check_tree(folder)


def test_a_chunk_of_another_shape_than_announced(tmp_path):
    writer = TreeWriter(tmp_path / "tree")
    writer.add("a", torch.zeros(4, 4), stored=lambda tensor, box: torch.zeros(2, 8))
    with pytest.raises(UserError, match=r"holds \[2, 8\] .* says \[4, 4\]"):
        check_tree(str(writer.finish()))


def test_a_truncated_file(tmp_path):
    folder = small_tree(tmp_path / "tree").finish()
    os.truncate(folder / "__1_0.distcp", 5000)
    with pytest.raises(UserError, match=r"__1_0\.distcp has 5000 bytes, .* truncated"):
        check_tree(str(folder))


def remove(name):
    return lambda folder: os.remove(folder / name)


def backend(name):
    return lambda folder: (folder / "metadata.json").write_text(json.dumps({"sharded_backend": name}))


KINDS = {
    "legacy": (lambda folder: (folder / "mp_rank_00").mkdir(), "legacy Megatron checkpoint .*--ckpt-format torch_dist"),
    "fsdp_dtensor": (remove("metadata.json"), "fsdp_dtensor.*--ckpt-format torch_dist"),
    "zarr": (backend("zarr"), r"metadata\.json says sharded_backend 'zarr'.*--ckpt-format torch_dist"),
    "no metadata": (remove(".metadata"), r"\.metadata is missing"),
    "a broken metadata.json": (
        lambda folder: (folder / "metadata.json").write_text("[" * 100_000),
        r"metadata\.json is broken",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_by_name(kind, tmp_path):
    make, reason = KINDS[kind]
    folder = small_tree(tmp_path / "tree").finish()
    make(folder)
    with pytest.raises(UserError, match=reason):
        TorchDistTree(str(folder))


def test_a_legacy_checkpoint_has_nothing_else(tmp_path):
    (tmp_path / "mp_rank_00_001").mkdir()
    (tmp_path / "mp_rank_00_001" / "model_optim_rng.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match=r"legacy Megatron checkpoint \(mp_rank_XX"):
        check_tree(str(tmp_path), "--load")


@pytest.mark.parametrize("kind", [torch.uint8, torch.float8_e4m3fn])
def test_fp8_weights_are_refused_by_name(kind, tmp_path):
    writer = TreeWriter(tmp_path / "tree").add("language_model.output_layer.weight", torch.ones(4, 4).to(kind))
    with pytest.raises(UserError, match="FP8 primary weights"):
        TorchDistTree(str(writer.finish()))


def test_common_state_of_older_trees(tmp_path):
    folder = small_tree(tmp_path / "tree").finish()
    torch.save({"iteration": 9, "args": {"a": 1}}, folder / "common.pt")
    tree = TorchDistTree(str(folder))
    tree.check()
    assert tree.common_state()["iteration"] == 9


def test_names_allowed_are_those_megatron_registers():
    from megatron.core.safe_globals import SAFE_GLOBALS, SafeUnpickler

    from dc_megatron.weights import tree_objects

    registered = {(item.__module__, item.__qualname__) for item in SAFE_GLOBALS}
    assert registered <= tree_objects.OBJECT_NAMES.keys()
    assert tree_objects._EXTRA_STATE_NAMES.keys() >= SafeUnpickler._SAFE_CLASSES
