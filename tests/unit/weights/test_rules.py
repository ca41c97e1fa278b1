"""Layouts of shards against arrays worked out by hand, and the derived inverse."""

import pytest
import torch

from dc_megatron.weights.rules import Rule, Source, read_shard, shard_shape, to_hugging_face

QKV = Rule("qkv", "qkv", (Source("q", (4, 2)), Source("k", (2, 2)), Source("v", (2, 2))), groups=2)
QKV_BIAS = Rule("bias", "qkv", (Source("q1", (4,)), Source("k1", (2,)), Source("v1", (2,))), groups=2)
GATE_UP = Rule("fc1", "rows", (Source("gate", (4, 2)), Source("up", (4, 2))))
VOCAB = Rule("words", "vocab", (Source("embed", (5, 2)),), padded_rows=8)
COLUMNS = Rule("fc2", "columns", (Source("down", (2, 4)),))
NORM = Rule("layers.{layer}.norm", "copy", (Source("model.{layer}.norm", (3,)),))


def rows(*first_entries):
    """One row an entry: [x, x + 0.5]."""
    return torch.tensor([[float(x), x + 0.5] for x in first_entries])


FILES = {
    "q": rows(0, 1, 2, 3),
    "k": rows(10, 11),
    "v": rows(20, 21),
    "q1": torch.tensor([0.0, 1, 2, 3]),
    "k1": torch.tensor([10.0, 11]),
    "v1": torch.tensor([20.0, 21]),
    "gate": rows(0, 1, 2, 3),
    "up": rows(10, 11, 12, 13),
    "embed": rows(1, 2, 3, 4, 5),
    "down": torch.arange(8.0).reshape(2, 4),
    "model.7.norm": torch.tensor([1.0, 2.0, 3.0]),
}


def read(name, row_range, column_range):
    part = FILES[name] if row_range is None else FILES[name][slice(*row_range)]
    return part if column_range is None else part[:, slice(*column_range)]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # Two groups of two heads (of one row each): q, q, k, v of the first group, then of the second.
        (QKV, [rows(0, 1, 10, 20, 2, 3, 11, 21)]),
        (QKV, [rows(0, 1, 10, 20), rows(2, 3, 11, 21)]),
        (QKV_BIAS, [torch.tensor([0.0, 1, 10, 20, 2, 3, 11, 21])]),
        (QKV_BIAS, [torch.tensor([0.0, 1, 10, 20]), torch.tensor([2.0, 3, 11, 21])]),
        (GATE_UP, [rows(0, 1, 2, 3, 10, 11, 12, 13)]),
        # Not the halves of [gate; up]: each rank has its own part of both.
        (GATE_UP, [rows(0, 1, 10, 11), rows(2, 3, 12, 13)]),
        (GATE_UP, [rows(0, 10), rows(1, 11), rows(2, 12), rows(3, 13)]),
        (VOCAB, [torch.cat([rows(1, 2, 3, 4), torch.tensor([[5.0, 5.5], [0, 0], [0, 0], [0, 0]])])]),
        (VOCAB, [rows(1, 2, 3, 4), torch.tensor([[5.0, 5.5], [0, 0], [0, 0], [0, 0]])]),
        # The last rank holds nothing but padding.
        (VOCAB, [rows(1, 2), rows(3, 4), torch.tensor([[5.0, 5.5], [0, 0]]), torch.zeros(2, 2)]),
        (COLUMNS, [torch.tensor([[0.0, 1], [4, 5]]), torch.tensor([[2.0, 3], [6, 7]])]),
        (NORM, [torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 2, 3])]),
    ],
)
def test_shards_are_those_worked_out_by_hand_and_go_back(rule, expected):
    layer = 7 if rule.layered else None
    shards = [read_shard(rule, layer, rank, len(expected), read) for rank in range(len(expected))]
    for shard, wanted in zip(shards, expected, strict=True):
        assert torch.equal(shard, wanted)
        assert tuple(shard.shape) == shard_shape(rule, len(expected))
    back = to_hugging_face(rule, layer, shards)
    assert back.keys() == {source.name.format(layer=layer) for source in rule.sources}
    assert all(torch.equal(value, FILES[name]) for name, value in back.items())


def test_a_size_that_does_not_divide_is_no_silent_truncation():
    with pytest.raises(AssertionError, match=r"fc2: 4 does not divide by 3"):
        read_shard(COLUMNS, None, 0, 3, read)


def test_a_shard_of_another_shape_is_not_exported():
    with pytest.raises(AssertionError, match=r"fc2: shard is \(2, 4\), not \(2, 2\)"):
        to_hugging_face(COLUMNS, None, [FILES["down"]] * 2)
