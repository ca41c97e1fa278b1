"""The weights table and the keys of a torch_dist tree against real models of every family and layout."""

from __future__ import annotations

import io

import pytest
import torch

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig, padded_vocab_size
from dc_megatron.model.language_model import Layout
from dc_megatron.weights.language_tables import find_rule, language_table
from dc_megatron.weights.projector_files import projector_shapes
from dc_megatron.weights.rules import shard_shape
from dc_megatron.weights.tree_tables import empty_extra_state, extra_state_keys, tree_entries
from tests.helpers.tiny_models import LANGUAGE_MAKERS, tiny_clip, tiny_llama

WORKER = "tests.multirank.tree_worker"
LAYOUTS = {
    "TP1": (1, Layout()),
    "TP2": (2, Layout(2)),
    "TP2+SP": (2, Layout(2, sequence_parallel=True)),
    "PP2": (2, Layout(1, 2)),
    "PP2xVPP2": (2, Layout(1, 2, 2)),
    "TP4": (4, Layout(4)),
    "TP2xPP2": (4, Layout(2, 2)),
    "TP2xPP2xVPP2": (4, Layout(2, 2, 2)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {name: make(root / name) for name, make in LANGUAGE_MAKERS.items()}
    # Padded to 1152 rows at TP 1, 1280 at TP 2 and 1536 at TP 4.
    made["another vocabulary at every size"] = tiny_llama(root / "padded", vocab=1150)
    return made


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("tower") / "clip")


def fitting(folders, layout: Layout) -> dict[str, LanguageConfig]:
    """The models whose layers the (virtual) stages divide."""
    stages = layout.pipeline_model_parallel_size * (layout.virtual_pipeline_model_parallel_size or 1)
    languages = {name: LanguageConfig.from_folder(folder) for name, folder in folders.items()}
    return {name: language for name, language in languages.items() if language.num_hidden_layers % stages == 0}


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_real_models_hold_and_save_what_the_table_says(workers, folders, vision, layout_name):
    world_size, layout = LAYOUTS[layout_name]
    languages = fitting(folders, layout)
    assert len(languages) >= 7
    paths = [language.path for language in languages.values()]
    ranks = workers.run(f"{WORKER}:describe", world_size, paths, vision, layout)
    for name, language, *described in zip(languages, languages.values(), *ranks, strict=True):
        check_parameters(name, language, layout, described)
        check_tree(name, language, vision, layout, described)


def check_parameters(name: str, language: LanguageConfig, layout: Layout, ranks: list[dict]) -> None:
    """Every parameter has a row, every row of every layer a parameter, and shapes are those of the table's shards."""
    tensor = layout.tensor_model_parallel_size
    table = language_table(language, padded_vocab_size(language.vocab_size, tensor))
    seen = set()
    for rank in ranks:
        for parameter, shape in rank["parameters"].items():
            rule, layer = find_rule(table, parameter)
            assert shape == shard_shape(rule, tensor), f"{name}: {parameter}"
            seen.add((rule.key, layer))
    layers = range(language.num_hidden_layers)
    assert seen == {(rule.key, layer) for rule in table for layer in (layers if rule.layered else [None])}, name


def check_tree(name: str, language: LanguageConfig, vision: str, layout: Layout, ranks: list[dict]) -> None:
    """The ranks together save exactly the entries, in the table's shapes, and objects that are empty."""
    connector = projector_shapes(ConnectorConfig("dci"), VisionConfig.from_folder(vision), language.hidden_size)
    rows = padded_vocab_size(language.vocab_size, layout.tensor_model_parallel_size)
    expected = {entry.key: entry.shape for entry in tree_entries(language, rows, connector)}
    saved, objects = {}, {}
    for rank in ranks:
        for key, shape in rank["tensors"].items():
            assert saved.setdefault(key, shape) == shape, f"{name}: ranks disagree about {key}"
        objects |= rank["objects"]
        assert rank["others"] == 0, name
    assert saved == expected, name
    assert objects == dict.fromkeys(extra_state_keys(language)), name
    vocabulary = {key for key, shape in expected.items() if shape[0] == rows}
    assert set().union(*(rank["any number of rows"] for rank in ranks)) == vocabulary, name
    assert len(vocabulary) == (1 if language.tie_word_embeddings else 3 if language.linear_bias else 2), name


def test_entries_name_their_layers_and_rows(folders):
    language = LanguageConfig.from_folder(folders["qwen2"])
    entries = {entry.key: entry for entry in tree_entries(language, 256, {"mlp.0.bias": (8,)})}
    bias = entries["language_model.decoder.layers.self_attention.linear_qkv.bias"]
    assert (bias.layers, bias.shape, bias.rule.kind) == (4, (4, 128), "qkv")
    assert bias.layer_key(3) == "language_model.decoder.layers.3.self_attention.linear_qkv.bias"
    assert "language_model.decoder.layers.mlp.linear_fc1.layer_norm_weight" in entries
    head = entries["language_model.output_layer.weight"]
    assert (head.layers, head.shape) == (0, (256, 64))
    assert entries["connector.mlp.0.bias"].rule is None


def test_an_empty_extra_state_is_a_list_with_one_none():
    assert torch.load(io.BytesIO(empty_extra_state()), weights_only=True) == [None]
