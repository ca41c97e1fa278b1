"""The two sides of the table as readers: what one puts together the other takes apart."""

from __future__ import annotations

import pytest
import torch

from dc_megatron.config import LanguageConfig, padded_vocab_size
from dc_megatron.errors import UserError
from dc_megatron.weights.language_tables import language_table
from dc_megatron.weights.rules import read_shard, shard_shape
from dc_megatron.weights.safetensors_files import open_checkpoint
from dc_megatron.weights.tensor_reader import InMemory, read_tensor
from dc_megatron.weights.views import AsHuggingFace, AsMegatron
from tests.helpers.tiny_models import LANGUAGE_MAKERS


class Dictionary:
    """A tree in memory: (key, layer) -> tensor."""

    def __init__(self, tensors):
        self.tensors = tensors

    def has(self, key):
        return any(key == known for known, _ in self.tensors)

    def shape(self, key, layer):
        return tuple(self.tensors[key, layer].shape)

    def dtype(self, key):
        return next(tensor.dtype for (known, _), tensor in self.tensors.items() if known == key)

    def position(self, key, layer):
        return (0 if layer is None else layer,)

    def read_rows(self, key, layer, start, end, out):
        out.copy_(self.tensors[key, layer][start:end])


def layers_of(rule, language):
    return range(language.num_hidden_layers) if rule.layered else (None,)


@pytest.fixture(params=LANGUAGE_MAKERS)
def model(request, tmp_path):
    folder = LANGUAGE_MAKERS[request.param](tmp_path / "m")
    language = LanguageConfig.from_folder(folder)
    return open_checkpoint(folder), language, language_table(language, padded_vocab_size(language.vocab_size, 1))


def full_tensors(checkpoint, language, table, step):
    """Every full Megatron tensor, read ``step`` rows at a time."""
    full, tensors = AsMegatron(checkpoint), {}
    for rule in table:
        for layer in layers_of(rule, language):
            tensor = torch.full(shard_shape(rule, 1), float("nan"))
            for start in range(0, tensor.shape[0], step):
                end = min(start + step, tensor.shape[0])
                full.read_rows(rule, layer, start, end, tensor[start:end])
            tensors[rule.key, layer] = tensor
    return tensors


@pytest.mark.parametrize("step", [7, 64, 10_000])
def test_rows_of_megatron_are_those_of_the_whole_shard(model, step):
    checkpoint, language, table = model
    tensors = full_tensors(checkpoint, language, table, step)
    for rule in table:
        for layer in layers_of(rule, language):
            assert torch.equal(tensors[rule.key, layer], read_shard(rule, layer, 0, 1, checkpoint.read)), rule.key


@pytest.mark.parametrize("step", [5, 10_000])
def test_and_back(model, step):
    checkpoint, language, table = model
    tree = Dictionary(full_tensors(checkpoint, language, table, 10_000))
    back = AsHuggingFace(tree, table, language.num_hidden_layers, "", "test")
    assert set(checkpoint.names()) - set(back.names()) <= {"lm_head.weight"}
    for name in back.names():
        tensor = torch.empty(back.shape(name))
        for start in range(0, tensor.shape[0], step):
            end = min(start + step, tensor.shape[0])
            back.read_rows(name, start, end, tensor[start:end])
        assert torch.equal(tensor, read_tensor(checkpoint, name)), name


def test_names_come_layer_by_layer(tmp_path):
    folder = LANGUAGE_MAKERS["llama_gqa"](tmp_path / "m")
    language = LanguageConfig.from_folder(folder)
    table = language_table(language, 256)
    tree = Dictionary(full_tensors(open_checkpoint(folder), language, table, 10_000))
    names = AsHuggingFace(tree, table, language.num_hidden_layers, "", "test").names()
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    assert (names[0], names[-1]) == ("model.embed_tokens.weight", "lm_head.weight")


def test_a_tree_without_a_tensor_or_of_another_model_is_refused(tmp_path):
    folder = LANGUAGE_MAKERS["llama_gqa"](tmp_path / "m")
    language = LanguageConfig.from_folder(folder)
    table = language_table(language, 256)
    tree = Dictionary(full_tensors(open_checkpoint(folder), language, table, 10_000))
    norm = tree.tensors.pop(("decoder.final_layernorm.weight", None))
    with pytest.raises(UserError, match=r"holds no decoder.final_layernorm.weight"):
        AsHuggingFace(tree, table, language.num_hidden_layers, "", "test")
    tree.tensors["decoder.final_layernorm.weight", None] = norm[:-1]
    with pytest.raises(UserError, match=r"has shape \[63\], but hf/config.json asks for \[64\]"):
        AsHuggingFace(tree, table, language.num_hidden_layers, "", "test")


def test_fused_tensors_want_one_dtype(tmp_path):
    language = LanguageConfig.from_folder(LANGUAGE_MAKERS["llama_gqa"](tmp_path / "m"))
    rule = next(rule for rule in language_table(language, 256) if rule.kind == "rows")
    gate, up = rule.source_shapes(0)
    parts = InMemory({gate: torch.zeros(96, 64), up: torch.zeros(96, 64, dtype=torch.bfloat16)})
    with pytest.raises(UserError, match=r"gate_proj.weight float32, .*up_proj.weight bfloat16"):
        AsMegatron(parts).dtype(rule, 0)
