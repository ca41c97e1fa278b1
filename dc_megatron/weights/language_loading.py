"""Shards of a language model straight from the files of its Hugging Face folder."""

from __future__ import annotations

import torch
from torch import Tensor

from dc_megatron.config import LanguageConfig
from dc_megatron.errors import UserError
from dc_megatron.weights.language_tables import (
    EMBEDDING,
    HEAD,
    IGNORED_NAMES,
    find_rule,
    hugging_face_shapes,
    language_table,
)
from dc_megatron.weights.names import refuse_wrong_names, refuse_wrong_shape
from dc_megatron.weights.rules import pieces, read_shard
from dc_megatron.weights.safetensors_files import Checkpoint, open_checkpoint


class LanguageWeights:
    """The parameters of one tensor-parallel rank.

    Opening checks every name and shape of the folder against ``language`` from the files' headers, so that each rank
    can afford it and all of them fail alike. UserError: names missing or left over, shapes that differ, broken files.
    """

    def __init__(
        self,
        folder: str,
        language: LanguageConfig,
        tp_rank: int,
        tp_size: int,
        padded_vocab_size: int,
        flag: str = "--model_name_or_path",
    ):
        self.table = language_table(language, padded_vocab_size)
        self._language = language
        self._rank, self._size = tp_rank, tp_size
        self._what = f"{flag} {folder}"
        self._checkpoint = open_checkpoint(folder, flag)
        self._has_tied_head = language.tie_word_embeddings and HEAD in self._checkpoint.names()
        check_names(self._checkpoint, self.table, language, self._what)

    def shard(self, megatron_name: str) -> Tensor:
        """This rank's shard of a parameter, in the file's dtype, on the CPU, in memory of its own.

        ``megatron_name`` counts layers over the whole model; both spellings of the norms are known. Rows of the
        embedding and head beyond the vocabulary are zero. UserError where a tied head differs from the embedding.
        """
        rule, layer = find_rule(self.table, megatron_name)
        if self._has_tied_head and rule.sources[0].name == EMBEDDING:
            self._compare_tied_head(rule)
        return read_shard(rule, layer, self._rank, self._size, self._checkpoint.read)

    def _compare_tied_head(self, rule) -> None:
        """A head on file beside a tied embedding is the same tensor twice, or config.json is wrong.

        Each rank compares the rows it reads anyway; together the ranks compare all.
        """
        for piece in pieces(rule, None, self._rank, self._size):
            embedding = self._checkpoint.read(EMBEDDING, piece.rows)
            head = self._checkpoint.read(HEAD, piece.rows)
            if embedding.dtype != head.dtype or not torch.equal(embedding, head):
                raise UserError(
                    f"{self._what}: config.json says tie_word_embeddings true, but {HEAD} differs from {EMBEDDING};"
                    " set tie_word_embeddings to false in config.json, or remove the head"
                )


def check_names(checkpoint: Checkpoint, table: tuple, language: LanguageConfig, what: str) -> None:
    """Refuse a folder whose names or shapes are not those of ``table``; nothing but headers is read."""
    expected = hugging_face_shapes(table, language.num_hidden_layers)
    found = {name for name in checkpoint.names() if not IGNORED_NAMES.fullmatch(name)}
    optional = {HEAD} if language.tie_word_embeddings else set()
    refuse_wrong_names(
        what,
        expected.keys() - found,
        found - expected.keys() - optional,
        "config.json and weights are of different models, or the folder is incomplete",
    )
    if HEAD in found:
        expected = {**expected, HEAD: expected[EMBEDDING]}
    for name, shape in expected.items():
        refuse_wrong_shape(what, name, checkpoint.shape(name), shape)
