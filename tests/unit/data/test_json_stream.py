"""Files cut into records equal json's own reading of them, for any size of block; what json refuses is refused."""

import json
import math
import random

import pytest

from dc_megatron.data import json_stream
from dc_megatron.data.faults import RecordFault
from dc_megatron.data.json_stream import json_chunks, parse_chunk
from dc_megatron.errors import UserError

PIECES = ["{", "}", "[", "]", ",", ":", '"', "\\", '\\"', "\\\\", "\n", " ", "é", "\u2028", "🙂", "null", "-1.5e3", "x"]


def records_of(path):
    return [record for chunk in json_chunks(str(path)) for _, record in parse_chunk(chunk)]


def random_value(rng, depth=0):
    kind = rng.randrange(7 if depth < 3 else 4)
    if kind < 2:
        return "".join(rng.choices(PIECES, k=rng.randrange(12)))
    if kind < 4:
        return rng.choice([None, True, 0, -7, 1.5, 10**30, ""])
    if kind == 4:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {f"k{number}\\": random_value(rng, depth + 1) for number in range(rng.randrange(4))}


def any_list(rng):
    """A JSON list as text, as compact or as spread out as json can write it."""
    values = [random_value(rng) for _ in range(rng.randrange(1, 8))]
    return values, json.dumps(values, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, None, 0, 2]))


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
def test_lists_are_cut_as_json_reads_them(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_stream, "BLOCK_BYTES", block)
    monkeypatch.setattr(json_stream, "RECORDS_PER_CHUNK", 3)
    rng = random.Random(block)
    for _ in range(60):
        values, text = any_list(rng)
        path = tmp_path / "a.json"
        path.write_text(rng.choice(["", "\ufeff", " \n\t"]) + text + rng.choice(["", "\n", " \r\n "]), encoding="utf-8")
        assert records_of(path) == values, text
        path.write_text("\n".join(json.dumps(value) for value in [{"first": 1}, *values]), encoding="utf-8")
        assert records_of(path) == [{"first": 1}, *values]


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_what_json_refuses_is_refused_and_nothing_else(tmp_path, monkeypatch, block):
    """Texts with a few characters changed: an error exactly where json has one."""
    monkeypatch.setattr(json_stream, "BLOCK_BYTES", block)
    rng = random.Random(1)
    refused = 0
    for _ in range(300):
        text = list(any_list(rng)[1])
        for _ in range(rng.randrange(1, 3)):
            place = rng.randrange(1, len(text))
            text[place : place + rng.randrange(2)] = rng.choice(PIECES)
        text = "".join(text)
        path = tmp_path / "a.json"
        path.write_text(text, encoding="utf-8")
        try:
            expected = json.loads(text)
        except ValueError:
            expected = None
        if expected:
            assert records_of(path) == expected, text
        else:
            refused += 1
            with pytest.raises(UserError, match=r"a\.json: "):
                records_of(path)
    assert refused > 100


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2", "line 1, column 6: not valid JSON: the list has no end"),
        ('[1, "é\n', "line 1, column 7: not valid JSON"),
        ("[1, 2]]", "line 1, column 7: not valid JSON: Extra data"),
        ("[1, 2]\n\n {", "line 3, column 2: not valid JSON: Extra data"),
        ("[1,\n]", "line 2, column 1: not valid JSON"),
        ("[,1]", "line 1, column 2: not valid JSON"),
        ('[{"a": 1}\n {"é": é}]', "line 2, column 2: not valid JSON"),
        ("[1}", "line 1, column 3: not valid JSON: Expecting ',' delimiter"),
        ("[1]\\", "line 1, column 4: not valid JSON: Extra data"),
        ("[1, \\", "line 1, column 5: not valid JSON"),
        ("[ \n ]", "holds no record"),
        (" \n\n", "holds no record"),
        ('{"é": 1}\n{"é": é}', "line 2, column 7: not valid JSON"),
    ],
)
def test_the_place_of_an_error(tmp_path, content, words):
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        records_of(path)


def test_chunks_know_their_place(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "RECORDS_PER_CHUNK", 4)
    for name, content in (("a.json", json.dumps([{"n": n} for n in range(10)])), ("a.jsonl", '{"n": 0}\n\n' * 10)):
        path = tmp_path / name
        path.write_text(content)
        chunks = list(json_chunks(str(path)))
        assert sum(chunk.records for chunk in chunks) == 10
        assert [number for chunk in chunks for number, _ in parse_chunk(chunk)] == list(range(10))
        for chunk in chunks:
            assert content[chunk.start :].startswith(chunk.text.decode())
        assert len(content) - 1 <= chunks[-1].next_start <= len(content) + 1


def test_json_that_python_cannot_hold_is_a_fault_of_its_record(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1, " + "[" * 100_000 + "]" * 100_000 + ", 1" + "0" * 5000 + ", NaN, 2]")
    records = records_of(path)
    assert (len(records), records[0], math.isnan(records[3]), records[4]) == (5, 1, True, 2)
    deep, large = records[1:3]
    assert isinstance(deep, RecordFault)
    assert "nested too deeply" in deep.detail
    assert "digits" in large.detail


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_record_without_an_end_does_not_fill_the_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(json_stream, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(json_stream, "MOST_RECORD_BYTES", 5000)
    path = tmp_path / name
    good = [json.dumps({"text": "x" * 100}) for _ in range(50)]
    text = ["[" + ",\n".join(good), "\n".join(good)][name.endswith("l")]
    separator = [",\n", "\n"][name.endswith("l")]
    path.write_text(text + separator + '{"text": "' + "y" * 20_000)
    with pytest.raises(UserError, match=r"line 51, column [01]: a record of more than .* MB begins here"):
        records_of(path)
