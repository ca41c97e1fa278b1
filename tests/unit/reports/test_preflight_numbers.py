"""The preflight's columns, duplicates, cut shares and packing against the slow and obvious way."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from dc_megatron.config import DataSource
from dc_megatron.data.faults import RecordFault
from dc_megatron.data.image_store import open_stores
from dc_megatron.data.index import build_index, open_index
from dc_megatron.data.index_summary import arrow_path
from dc_megatron.data.tokenization import load_tokenizer
from dc_megatron.reports.preflight_columns import read_columns
from dc_megatron.reports.preflight_duplicates import MOST_PLACES, same_content, same_id
from dc_megatron.reports.preflight_packing import (
    cut_shares,
    packing_table,
    suggested_length,
    suggested_maximum,
)
from dc_megatron.reports.preflight_records import Marks, read_records
from dc_megatron.reports.preflight_samples import chosen_samples, pieces
from tests.helpers.data_files import (
    caption_records,
    chatml_tokenizer,
    conversation,
    data_config,
    llama_3_tokenizer,
    sentencepiece_tokenizer,
    write_records,
)

LIMIT = 100


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return sentencepiece_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def mixed_records(folder) -> list[dict]:
    """Text alone, one picture, several, some that LIMIT cuts in text, at a picture, and before any target."""
    records = caption_records(folder, 6)
    fox = "the quick brown fox "
    records += [{"id": f"t{n}", "conversations": conversation("hello", fox * (n + 1))} for n in range(12)]
    many = [f"{n:04}.jpg" for n in range(6)]
    records += [
        {"id": "many", "image": many, "conversations": conversation("<image>" * 6, fox)},
        {"id": "no room", "conversations": conversation(fox * 20, "dog")},
        {"id": "blank", "conversations": conversation("hello", " ")},
    ]
    return records


@pytest.fixture
def made(tmp_path, tokenizer):
    """(config, folder of a finished index, columns)."""
    data = write_records(tmp_path / "a.json", mixed_records(tmp_path / "images"))
    config = data_config(tmp_path / "images", data, tokenizer, model_max_length=LIMIT, seq_length=LIMIT)
    folder = str(tmp_path / "index")
    summary = build_index(config, folder, check=False)
    return config, folder, read_columns(arrow_path(folder, summary.key))


def test_columns_are_what_the_index_says(made):
    _, folder, columns = made
    index = open_index(folder)
    samples = [index[n] for n in range(len(index))]
    assert columns.length.tolist() == [sample.length for sample in samples]
    assert columns.record.tolist() == [sample.record for sample in samples]
    assert columns.supervised.tolist() == [sample.supervised_tokens for sample in samples]
    assert columns.pictures.tolist() == [len(sample.images) for sample in samples]
    assert columns.text.tolist() == [len(sample.input_ids) - len(sample.images) for sample in samples]
    pictures = [picture for sample in samples for picture in sample.images]
    assert columns.width.tolist() == [picture.width for picture in pictures]
    assert [pictures[n].name for n in columns.different_pictures] == list(dict.fromkeys(p.name for p in pictures))
    assert columns.owner.tolist() == [n for n, sample in enumerate(samples) for _ in sample.images]


def test_shares_that_other_limits_would_cut(made):
    config, folder, columns = made
    index = open_index(folder)
    tokenizer = load_tokenizer(config.tokenizer_path)
    without = [(0, 19), (0, 20)]
    found = read_records(config, columns, without, tokenizer, open_stores(config.sources))
    endless = replace(config, model_max_length=10_000, seq_length=10_000)
    build_index(endless, f"{folder}-endless", check=False)
    true = read_columns(arrow_path(f"{folder}-endless", open_index(f"{folder}-endless").summary.key))
    # All have a target once nothing is cut, but the blank one.
    assert len(true.length) == 20
    shares = cut_shares(columns.length[found.whole], found.doubtful, found.doubtful_samples, LIMIT)
    for one in shares:
        assert one["share"] == pytest.approx((true.length > one["model_max_length"]).mean())
    shorter = cut_shares(columns.length[found.whole], found.doubtful, found.doubtful_samples, 80)
    assert shorter[0]["share"] == pytest.approx((true.length > 80).mean())
    assert index.summary.truncated == int((~found.whole & (columns.length <= LIMIT)).sum())


def test_without_target_is_what_the_faults_say(made):
    _, folder, _ = made
    assert open_index(folder).summary.dropped == {RecordFault.NO_TARGET: 2}


def grouped(keys, values=None) -> dict:
    groups: dict = {}
    for number, key in enumerate(keys):
        if key:
            groups.setdefault(key, []).append(number if values is None else values[number])
    return groups


def test_duplicates_are_the_obvious_ones():
    state = np.random.RandomState(0)
    content = state.randint(0, 60, 200).astype(np.uint64)
    ids = state.randint(0, 80, 200).astype(np.uint64)
    found = same_content(content, lambda number: (0, number))
    groups = [group for group in grouped(content.tolist()).values() if len(group) > 1]
    assert (found["groups"], found["extra"]) == (len(groups), sum(len(group) - 1 for group in groups))
    assert [one["places"] for one in found["examples"]] == [[(0, n) for n in group[:MOST_PLACES]] for group in groups]
    of_ids = grouped([i if c else 0 for i, c in zip(ids.tolist(), content.tolist(), strict=True)], content.tolist())
    assert same_id(ids, content, lambda number: (0, number))["ids"] == sum(len(set(c)) > 1 for c in of_ids.values())


@pytest.mark.parametrize("size", [0, 1])
def test_few_records_have_no_duplicates(size):
    nothing = np.ones(size, dtype=np.uint64)
    assert same_content(nothing, lambda number: (0, number)) == {"groups": 0, "extra": 0, "examples": []}
    assert same_id(nothing, nothing, lambda number: (0, number)) == {"ids": 0, "examples": []}


def table_of(lengths, config, **more) -> dict:
    lengths = np.asarray(lengths, dtype=np.int32)
    tiles, sources = np.ones(len(lengths), np.int32), np.zeros(len(lengths), np.int16)
    return packing_table(lengths, tiles, sources, config, **{"samples_per_step": 16, **more})


@pytest.fixture
def config(tmp_path):
    return data_config(tmp_path, tmp_path / "a.json", tmp_path, model_max_length=2048, seq_length=4096)


def test_the_packing_table(config):
    lengths = np.random.RandomState(0).randint(200, 900, 2000)
    table = table_of(lengths, config)
    assert [row["seq_length"] for row in table["rows"]] == [1024, 2048, 4096, 8192, 16384]
    for row in table["rows"]:
        assert row["fill"] == pytest.approx(lengths.sum() / (row["rows"] * row["seq_length"]))
        assert row["steps"] == -(-row["rows"] // row["rows_per_step"])
    assert table["padded"]["steps"] == 125
    value, why = suggested_length(table)
    fills = {row["seq_length"]: row["fill"] for row in table["rows"]}
    assert value == min(length for length, fill in fills.items() if fill >= 0.98)
    assert "shortest rows" in why


def test_padded_rows_are_as_long_as_the_longest_of_16(config):
    table = table_of([100] * 16 + [300, 100], replace(config, order="sequential"))
    assert table["padded"]["fill"] == pytest.approx((17 * 100 + 300) / (16 * 100 + 2 * 300))


def test_weights_count_and_large_epochs_are_estimated(config, monkeypatch):
    weighted = replace(config, sources=(DataSource("a", "", 2.0),))
    assert table_of([500] * 40, weighted)["samples"] == 80
    monkeypatch.setattr("dc_megatron.reports.preflight_packing.MOST_PACKED", 1000)
    lengths = np.random.RandomState(0).randint(200, 900, 4000)
    part, whole = table_of(lengths, config), None
    monkeypatch.undo()
    whole = table_of(lengths, config)
    assert (part["estimated"], whole["estimated"]) == (True, False)
    assert part["rows"][2]["rows"] == pytest.approx(whole["rows"][2]["rows"], rel=0.03)


def test_samples_longer_than_any_usual_row(config):
    table = table_of([20_000, 100], replace(config, model_max_length=20_480, seq_length=20_480))
    assert [row["seq_length"] for row in table["rows"]] == [20_480]


@pytest.mark.parametrize(
    ("limit", "shares", "seq_length", "positions", "expected"),
    [
        (2048, {1024: 0.2, 2048: 0.005, 4096: 0}, 4096, 4096, 2048),  # enough as it is
        (1024, {1024: 0.2, 2048: 0.005, 4096: 0}, 4096, 4096, 2048),  # the next that cuts little
        (1024, {1024: 0.2, 2048: 0.1, 4096: 0}, 4096, 2048, 2048),  # the model has no more positions
        (1024, {1024: 0.2, 2048: 0.1}, 4096, 1024, 1024),
        (4096, {1024: 0.0, 4096: 0}, 1024, 4096, 1024),  # rows are shorter than that
        (1024, {1024: 1.0, 2048: 0.005}, None, None, 2048),
    ],
)
def test_the_maximum_that_is_advised(limit, shares, seq_length, positions, expected):
    entries = [{"model_max_length": length, "share": share} for length, share in shares.items()]
    value, why = suggested_maximum(entries, limit, 1500, seq_length, positions)
    assert value == expected
    assert "1,500" in why


def test_marks_are_found_and_plain_text_has_none(tmp_path, tokenizer):
    vicuna = Marks(load_tokenizer(tokenizer))
    llama = Marks(load_tokenizer(llama_3_tokenizer(tmp_path / "llama", reserved=3)))
    texts = {
        "USER: x ASSISTANT: y": ["USER:", "ASSISTANT:"],
        "a <s>struck</s> word": ["<s>", "</s>"],
        "<|eot_id|> and <|reserved_special_token_1|>": ["<|eot_id|>", "<|reserved_special_token_1|>"],
        "###   Human : hi": ["### Human :"],
        "[INST] <<SYS>>": ["[INST]", "<<SYS>>"],
        "<image> is no mark; nor are ### Heading, a user: x, [list], a < b, <b>bold</b>": [],
    }
    for text, expected in texts.items():
        assert [mark for mark, _ in vicuna.find(text)] == expected
    # <s> is no token of Llama 3.
    assert [mark for mark, _ in llama.find("a <s>struck</s> word")] == ["</s>"]


def test_thousands_of_different_marks_are_counted_together(tmp_path, tokenizer):
    records = [{"id": str(n), "conversations": conversation("hello", f"<|m{n}|>")} for n in range(60)]
    config = data_config(tmp_path, write_records(tmp_path / "a.json", records), tokenizer)
    summary = build_index(config, str(tmp_path / "index"))
    columns = read_columns(arrow_path(str(tmp_path / "index"), summary.key))
    found = read_records(config, columns, [], load_tokenizer(tokenizer), open_stores(config.sources))
    assert found.marks["others"].records == 10
    assert found.marked[0] == 60


def random_value(state: random.Random, depth: int = 0):
    """JSON that may be anything, often with the keys that records have."""
    kind = state.randrange(4 if depth > 3 else 7)
    if kind < 4:
        leaves = (None, True, state.random() * 1e300, "", "<image>" * 3, "a/0000.jpg", "</s>\ud800\0", "USER: " * 50)
        return state.choice(leaves)
    if kind == 4:
        return [random_value(state, depth + 1) for _ in range(state.randrange(4))]
    keys = ("id", "image", "video", "conversations", "from", "value")
    return {key: random_value(state, depth + 1) for key in keys if state.random() < 0.7}


def test_any_json_is_read(tmp_path, tokenizer):
    state = random.Random(3)
    records = [random_value(state) for _ in range(600)] + caption_records(tmp_path / "images", 2)
    for record in records[:300]:
        if isinstance(record, dict):
            record["conversations"] = conversation("<image>", random_value(state), "b", "a")
    config = data_config(tmp_path / "images", write_records(tmp_path / "a.json", records), tokenizer)
    summary = build_index(config, str(tmp_path / "index"), check=False)
    columns = read_columns(arrow_path(str(tmp_path / "index"), summary.key))
    found = read_records(config, columns, [], load_tokenizer(tokenizer), open_stores(config.sources))
    assert len(found.content) == len(found.ids) == summary.records == len(records)
    assert found.marked[0] > 0


@pytest.mark.parametrize("kind", ["v1", "llama_3", "chatml_direct", "plain"])
def test_pieces_are_the_whole_text_with_its_targets(tmp_path, tokenizer, kind):
    maker = {"llama_3": llama_3_tokenizer, "chatml_direct": chatml_tokenizer}.get(kind)
    folder = maker(tmp_path / "tokenizer") if maker else tokenizer
    records = caption_records(tmp_path / "images", 2)
    records[1]["conversations"] = conversation("<image>\nWer?", "Ein Bär 🐻 – größer!\nJa.")
    config = data_config(
        tmp_path / "images", write_records(tmp_path / "a.json", records), folder, version=kind, seq_length=400
    )
    config = replace(config, model_max_length=400)
    build_index(config, str(tmp_path / "index"))
    index, loaded = open_index(str(tmp_path / "index")), load_tokenizer(folder)
    for number, answer in ((0, "A red circle and 0 green triangles."), (1, "Ein Bär 🐻 – größer!\nJa.")):
        found = pieces(index[number], loaded)
        assert sum(piece.picture is not None for piece in found) == 1
        targets = "".join(piece.text for piece in found if piece.target)
        end = {"v1": "</s>", "llama_3": "<|eot_id|>", "chatml_direct": "<|im_end|>", "plain": "\n"}[kind]
        assert targets.lstrip(" ") == answer + end
        assert "\ufffd" not in "".join(piece.text for piece in found)


def test_shown_samples_cover_sources_and_numbers_of_pictures(made):
    _, _, columns = made
    chosen = chosen_samples(columns, seed=1)
    assert len(chosen) == 8
    assert set(np.minimum(columns.pictures[chosen], 2)) == {0, 1, 2}
    assert chosen == sorted(set(chosen)) == chosen_samples(columns, seed=1)
