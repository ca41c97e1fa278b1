"""Trees of runs in FP8: beside the weights lie scales, pickled into byte tensors."""

from __future__ import annotations

import io
import os
import pickle

import pytest
import torch

from dc_megatron.errors import UserError
from dc_megatron.weights.torch_dist_tree import TorchDistTree, check_tree
from tests.helpers.dist_trees import small_tree
from tests.helpers.fp8_states import delayed_state

KEY = "language_model.decoder.layers.mlp.linear_fc1._extra_state/shard_0_4"


def tree(folder, data: bytes, kept=lambda tensor: tensor):
    """As Megatron writes it: the object of a shard, a list with the byte tensor."""
    state = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return small_tree(folder).add_object(KEY, [kept(state)]).finish()


def test_a_tree_with_scales_is_read(tmp_path, monkeypatch):
    folder = str(tree(tmp_path / "tree", delayed_state(monkeypatch)))
    check_tree(folder)
    (place,) = TorchDistTree(folder).read_object(KEY)
    assert place.dtype == torch.uint8


class Payload:
    def __init__(self, marker):
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


class Storage:
    """A tensor's inner pickle, made by hand."""

    def __init__(self, data: bytes):
        self.data = data

    def __reduce__(self):
        from megatron.core.safe_globals import safe_load_from_bytes

        return safe_load_from_bytes, (self.data,)


def as_recipe(marker) -> bytes:
    return pickle.dumps({"recipe": Payload(marker), "extra_fp8_variables": {}})


def old_protocol(marker) -> bytes:
    return pickle.dumps({"recipe": Payload(marker)}, protocol=0)


@pytest.mark.parametrize("make", [as_recipe, old_protocol])
def test_a_command_among_scales_is_refused(make, tmp_path):
    marker = tmp_path / "executed"
    folder = tree(tmp_path / "tree", make(marker))
    with pytest.raises(UserError, match=r"linear_fc1\._extra_state/shard_0_4 is refused: the pickle in"):
        check_tree(str(folder))
    assert not marker.exists()


def test_bytes_that_are_not_in_one_piece_are_refused(tmp_path, monkeypatch):
    folder = tree(tmp_path / "tree", delayed_state(monkeypatch), kept=lambda state: state[::2])
    with pytest.raises(UserError, match="no extra state"):
        check_tree(str(folder))


def test_a_command_inside_a_tensor_is_not_executed_by_megatron(tmp_path):
    """Our check reads no pickle in a pickle in a pickle; the function that would read it knows data only."""
    from dc_megatron.runtime.fp8_states import _loads

    marker = tmp_path / "executed"
    inner = io.BytesIO()
    torch.save(Payload(marker), inner, _use_new_zipfile_serialization=False)
    data = pickle.dumps({"scale_fwd": Storage(inner.getvalue())})
    check_tree(str(tree(tmp_path / "tree", data)))
    with pytest.raises(pickle.UnpicklingError):
        _loads(data)
    assert not marker.exists()
