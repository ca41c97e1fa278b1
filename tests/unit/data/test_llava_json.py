"""Both file forms, and faults that name file and line."""

import pytest

from dc_megatron.data.faults import RecordFault
from dc_megatron.data.llava_json import parse_record, read_records
from dc_megatron.errors import UserError
from tests.helpers.data_files import conversation, write_records

RECORDS = [
    {"id": "a", "image": "a.jpg", "conversations": conversation("<image>", "x\u2028y")},
    {"id": 7, "image": ["a.jpg", "b.jpg"], "conversations": conversation("<image><image>", "y")},
    {"conversations": conversation("hello", "z")},
]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_list_and_json_lines_hold_the_same_records(tmp_path, name):
    records = read_records(write_records(tmp_path / name, RECORDS))
    assert records == RECORDS
    parsed = [parse_record(record, index) for index, record in enumerate(records)]
    assert [record.images for record in parsed] == [("a.jpg",), ("a.jpg", "b.jpg"), ()]
    assert [record.identifier for record in parsed] == ["a", "7", "2"]


def test_unescaped_line_separators_do_not_split_a_json_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "x\u2028y", "conversations": []}\n\n{"id": "z"}\n', encoding="utf-8")
    assert [record["id"] for record in read_records(str(path))] == ["x\u2028y", "z"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"id": 1}\n{"id": 2}\n{"id": oops}\n', "line 3, column 8: not valid JSON"),
        (b'[\n {"id": 1},\n {"id": 2\n]', "line 4, column 1: not valid JSON"),
        (b'[{"id": 1}', "line 1"),
        (b'{"id": 1}\n{"id": "\xff"}\n', "line 2: not UTF-8"),
        (b"", "holds no record"),
        (b"[]", "holds no record"),
    ],
)
def test_broken_files_stop_with_file_and_line(tmp_path, content, words):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_records(str(path))
    assert str(path) in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"--data_path .* no such file"):
        read_records(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", "a"),
        (7, "7"),
        (1.5, "1.5"),
        (None, "12"),
        ({"a": 1}, "12"),
        ([1], "12"),
        ("x" * 5000, "x" * 200),
        ("\ud800é", "\\ud800é"),
    ],
)
def test_an_identifier_is_a_short_text_that_a_file_can_hold(given, expected):
    assert parse_record({"id": given, "conversations": [1]}, 12).identifier == expected


def test_videos_are_named_as_images_are():
    record = {"conversations": [1], "image": None}
    assert parse_record(record, 0).videos == ()
    assert parse_record({**record, "video": "a.mp4"}, 0).videos == ("a.mp4",)
    assert parse_record({**record, "video": ["a.mp4", "b"]}, 0).videos == ("a.mp4", "b")
    with pytest.raises(RecordFault, match="video is neither a file name nor a list"):
        parse_record({**record, "video": {"a": 1}}, 0)


def test_a_record_that_cannot_be_held_stops_who_wants_all_at_once(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"id": 1}, ' + "[" * 100_000 + "]" * 100_000 + "]")
    with pytest.raises(UserError, match=r"a\.json: record 1: bad structure: nested too deeply"):
        read_records(str(path))


@pytest.mark.parametrize(
    "record",
    [
        "text",
        {"id": 1},
        {"conversations": []},
        {"conversations": [1], "image": 3},
        {"conversations": [1], "image": [""]},
    ],
)
def test_records_of_the_wrong_shape_are_faults(record):
    with pytest.raises(RecordFault) as caught:
        parse_record(record, 0)
    assert caught.value.reason == RecordFault.STRUCTURE
