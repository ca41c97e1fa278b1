"""Language models: folder -> tensor-parallel shards -> folder, bit for bit, and folders that do not fit."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from dc_megatron.config import LanguageConfig
from dc_megatron.errors import UserError
from dc_megatron.weights.language_loading import LanguageWeights
from dc_megatron.weights.language_tables import find_rule, hugging_face_shapes, language_table
from dc_megatron.weights.rules import to_hugging_face
from tests.helpers.tiny_models import LANGUAGE_MAKERS, as_old_bin, as_safetensors, tiny_llama

# Vocabulary after padding: 1003 words and TP 4 in steps of 128 rows, as Megatron pads.
PADDED = {256: 512, 1003: 1024}
NORM_SPELLINGS = {
    "decoder.layers.1.input_layernorm.weight": "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.1.pre_mlp_layernorm.weight": "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
}


def open_weights(folder, rank=0, size=1):
    language = LanguageConfig.from_folder(folder)
    return LanguageWeights(folder, language, rank, size, PADDED[language.vocab_size])


def change_config(folder, **values):
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({**config, **values}, file)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("maker", LANGUAGE_MAKERS)
def test_shards_go_back_to_the_folder_bit_for_bit(maker, size, tmp_path):
    folder = LANGUAGE_MAKERS[maker](tmp_path)
    language = LanguageConfig.from_folder(folder)
    ranks = [open_weights(folder, rank, size) for rank in range(size)]
    back = {}
    for rule in ranks[0].table:
        for layer in range(language.num_hidden_layers) if rule.layered else (None,):
            name = rule.key.format(layer=layer)
            shards = [rank.shard(name) for rank in ranks]
            back.update(to_hugging_face(rule, layer, shards))
    original = load_file(os.path.join(folder, "model.safetensors"))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)


@pytest.mark.parametrize("maker", LANGUAGE_MAKERS)
def test_table_knows_every_name_and_shape(maker, tmp_path):
    folder = LANGUAGE_MAKERS[maker](tmp_path)
    language = LanguageConfig.from_folder(folder)
    shapes = hugging_face_shapes(language_table(language, 1024), language.num_hidden_layers)
    original = load_file(os.path.join(folder, "model.safetensors"))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in original.items()}


def test_rows_beyond_the_vocabulary_are_zero(tmp_path):
    folder = tiny_llama(tmp_path, vocab=1003, layers=1)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        last = open_weights(folder, 3, 4).shard(name)
        assert last.shape == (256, 64)
        assert last[: 1003 - 768].abs().min(dim=1).values.max() > 0
        assert not last[1003 - 768 :].any()


def test_norms_have_two_spellings(tmp_path):
    weights = open_weights(tiny_llama(tmp_path))
    for local, transformer_engine in NORM_SPELLINGS.items():
        assert torch.equal(weights.shard(local), weights.shard(transformer_engine))
    with pytest.raises(AssertionError, match=r"no row for decoder\.layers\.1\.mlp\.linear_fc1\.bias"):
        weights.shard("decoder.layers.1.mlp.linear_fc1.bias")


def test_only_the_parts_of_this_rank_are_read(tmp_path, monkeypatch):
    weights = open_weights(tiny_llama(tmp_path), 1, 4)
    asked = []
    whole = weights._checkpoint.read

    def read(name, rows=None, columns=None):
        part = whole(name, rows, columns)
        asked.append(part.numel())
        return part

    monkeypatch.setattr(weights._checkpoint, "read", read)
    for rule in weights.table:
        if rule.kind != "copy":
            asked.clear()
            shard = weights.shard(rule.key.format(layer=2))
            assert sum(asked) == shard.numel(), rule.key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_that_of_the_file(dtype, tmp_path):
    source = tiny_llama(tmp_path / "fp32", layers=1)
    tensors = {name: value.to(dtype) for name, value in load_file(os.path.join(source, "model.safetensors")).items()}
    folder = as_safetensors(source, tmp_path / "half", drop=("",), extra=tensors)
    weights = open_weights(folder, 3, 4)
    for rule in weights.table:
        assert weights.shard(rule.key.format(layer=0)).dtype == dtype


@pytest.mark.parametrize("form", ["bin", "sharded_bin", "sharded"])
def test_every_form_of_folder_gives_the_same_shards(form, tmp_path):
    source = tiny_llama(tmp_path / "source")
    target = tmp_path / form
    if form == "sharded":
        folder = as_safetensors(source, target, shards=3)
    else:
        inverse = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(4)}
        folder = as_old_bin(source, target, shards=2 if form == "sharded_bin" else 1, extra=inverse)
    one, other = open_weights(source, 1, 2), open_weights(folder, 1, 2)
    for rule in one.table:
        name = rule.key.format(layer=3)
        assert torch.equal(one.shard(name), other.shard(name))


def test_tied_head_is_the_embedding_on_the_last_stage(tmp_path):
    weights = open_weights(tiny_llama(tmp_path, tied=True), 0, 2)
    assert torch.equal(weights.shard("output_layer.weight"), weights.shard("embedding.word_embeddings.weight"))


def test_a_head_on_file_beside_a_tied_embedding_must_equal_it(tmp_path):
    source = tiny_llama(tmp_path / "tied", tied=True, layers=1)
    embedding = load_file(os.path.join(source, "model.safetensors"))["model.embed_tokens.weight"]
    same = as_safetensors(source, tmp_path / "same", extra={"lm_head.weight": embedding.clone()})
    assert torch.equal(open_weights(same).shard("embedding.word_embeddings.weight")[:256], embedding)
    other = embedding.clone()
    other[200] += 1
    different = as_safetensors(source, tmp_path / "different", extra={"lm_head.weight": other})
    with pytest.raises(UserError, match=r"tie_word_embeddings true, but lm_head\.weight differs"):
        [open_weights(different, rank, 2).shard("embedding.word_embeddings.weight") for rank in range(2)]


def test_an_untied_head_may_not_be_absent(tmp_path):
    folder = as_safetensors(tiny_llama(tmp_path / "a"), tmp_path / "b", drop=("lm_head",))
    with pytest.raises(UserError, match=r"1 weights missing: lm_head\.weight"):
        open_weights(folder)


def test_missing_and_unknown_names_are_listed_and_counted(tmp_path):
    extra = {f"model.layers.0.self_attn.q_proj.bias{i}": torch.ones(2) for i in range(11)}
    folder = as_safetensors(tiny_llama(tmp_path / "a"), tmp_path / "b", drop=("model.layers.1.mlp",), extra=extra)
    with pytest.raises(UserError) as error:
        open_weights(folder)
    message = str(error.value)
    assert "3 weights missing: model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight" in message
    assert "11 weights not known here: model.layers.0.self_attn.q_proj.bias0" in message
    assert message.count("q_proj.bias") == 8
    assert folder in message


def test_layers_that_config_does_not_count_are_refused(tmp_path):
    folder = tiny_llama(tmp_path)
    change_config(folder, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"9 weights not known here: model\.layers\.3\."):
        open_weights(folder)


@pytest.mark.parametrize(
    ("change", "name", "found", "expected"),
    [
        ({"num_key_value_heads": 8}, "model.layers.0.self_attn.k_proj.weight", "[32, 64]", "[64, 64]"),
        ({"intermediate_size": 48}, "model.layers.0.mlp.gate_proj.weight", "[96, 64]", "[48, 64]"),
        ({"vocab_size": 1003}, "model.embed_tokens.weight", "[256, 64]", "[1003, 64]"),
    ],
)
def test_config_and_weights_that_disagree_are_refused_with_both_shapes(change, name, found, expected, tmp_path):
    folder = tiny_llama(tmp_path)
    change_config(folder, **change)
    with pytest.raises(UserError) as error:
        open_weights(folder)
    for part in (name, f"has shape {found}", f"asks for {expected}"):
        assert part in str(error.value)


def test_find_rule_counts_layers_over_the_whole_model(tmp_path):
    table = language_table(LanguageConfig.from_folder(tiny_llama(tmp_path)), 256)
    rule, layer = find_rule(table, "decoder.layers.31.mlp.linear_fc2.weight")
    assert (rule.kind, layer) == ("columns", 31)
    assert find_rule(table, "decoder.final_layernorm.weight")[1] is None
