"""The weights table as the keys of Megatron's torch_dist tree: what a converter writes and a reader expects there.

In a tree a parameter that every layer has is one tensor, stacked over the layers, whatever the layout that wrote it;
without Transformer Engine and with it the norms go by Transformer Engine's names. A multi-rank test compares these
entries with ``sharded_state_dict()`` of real models.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dc_megatron.config import LanguageConfig
from dc_megatron.weights.language_tables import language_table
from dc_megatron.weights.rules import Rule, shard_shape

LANGUAGE_PREFIX = "language_model."
CONNECTOR_PREFIX = "connector."
# There where the tower was trained: under vision_tower. the tree then has all that is read of it.
TOWER_KEY = "vision_tower.embeddings.patch_embedding.weight"
_LAYERS = "decoder.layers."
# The linears of a layer; each keeps a state for FP8 beside its weight, empty otherwise.
_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass(frozen=True)
class TreeEntry:
    """One tensor of the tree.

    ``shape`` is that of the whole tensor; with ``layers`` > 0 its first dimension counts the layers of the model, and
    ``shape[1:]`` is the full (TP 1) parameter of ``rule``. ``rule`` is None for the connector, stored as it is.
    """

    key: str
    rule: Rule | None
    shape: tuple[int, ...]
    layers: int = 0

    def layer_key(self, layer: int) -> str:
        """The key of one layer's tensor, [shape[1:]], in trees that do not stack (megatron-core can write both)."""
        assert 0 <= layer < self.layers, f"{self.key} has {self.layers} layers, not a layer {layer}"
        before, after = self.key.split(_LAYERS)
        return f"{before}{_LAYERS}{layer}.{after}"


def tree_entries(
    language: LanguageConfig, padded_vocab_size: int, connector_shapes: Mapping[str, tuple[int, ...]]
) -> list[TreeEntry]:
    """Every tensor of the model in a tree, in the order of the weights table.

    ``padded_vocab_size``: rows of the embedding and of an untied head in the tree. Megatron pads to a multiple of
    128 x TP, but loads any number of rows (it marks both ``allow_shape_mismatch``: rows that the tree has not are
    zero, rows that the model has not stay unread). So a converter may write any number from vocab_size on; write
    ``padded_vocab_size(vocab_size, 1)``, as a run at TP 1 does. ``connector_shapes``: projector_files.projector_shapes,
    or nothing where there is no connector. A tied head has no entry: the embedding is stored once.
    """
    entries = [_entry(rule, language.num_hidden_layers) for rule in language_table(language, padded_vocab_size)]
    entries += [TreeEntry(CONNECTOR_PREFIX + name, None, tuple(shape)) for name, shape in connector_shapes.items()]
    return entries


def _entry(rule: Rule, num_layers: int) -> TreeEntry:
    shape = shard_shape(rule, 1)
    if not rule.layered:
        return TreeEntry(LANGUAGE_PREFIX + rule.key, rule, shape)
    # The other spelling of a layer's parameter is Transformer Engine's, which trees use.
    spelling = rule.other_keys[0] if rule.other_keys else rule.key
    return TreeEntry(LANGUAGE_PREFIX + spelling.replace("{layer}.", ""), rule, (num_layers, *shape), num_layers)


def extra_state_keys(language: LanguageConfig) -> list[str]:
    """Keys of the objects that Megatron asks for beside the tensors, one a linear and layer.

    The same with and without Transformer Engine: megatron-core stores neither the head's nor the attention's, and the
    model here (model/multimodal_model.py) not that of Transformer Engine's final norm, which never holds anything. A
    key more than the model asks for would be refused under ``--dist-ckpt-strictness raise_all``.
    """
    layers = language.num_hidden_layers
    return [
        f"{LANGUAGE_PREFIX}{_LAYERS}{linear}._extra_state/shard_{layer}_{layers}"
        for layer in range(layers)
        for linear in _LINEARS
    ]


def empty_extra_state() -> bytes:
    """What a tree holds under each of ``extra_state_keys`` where no FP8 is used: a list with one None, by torch.save.

    Modules of Transformer Engine write a list with one empty uint8 tensor and take None for the same.
    """
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return buffer.getvalue()
