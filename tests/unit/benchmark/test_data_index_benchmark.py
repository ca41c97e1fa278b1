"""The benchmark of the data index: its data is what it says, and its limits are judged."""

import json

import pytest

from dc_megatron.benchmark import llava_files
from dc_megatron.benchmark.data_index import as_text, benchmark_index, build, judged
from dc_megatron.benchmark.llava_files import Writer, write_pictures, write_records, write_tokenizer
from dc_megatron.benchmark.llava_lengths import IMAGE_TOKENS, llava_lengths
from dc_megatron.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """tokenizer, images and data.json of 60 records, with a smaller vocabulary than the real one."""
    folder = tmp_path_factory.mktemp("benchmark")
    writer = Writer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llava_files, "VOCABULARY", 4000)
        patch.setattr(llava_files, "_TRAINING_WORDS", 40_000)
        patch.setattr(llava_files, "_SYSTEM_PROMPTS", 200)
        patch.setattr(llava_files, "_PICTURES", 5)
        write_tokenizer(str(folder / "tokenizer"), writer)
        written = write_records(str(folder / "data.json"), 60, 2, writer)
        write_pictures(str(folder / "images"), written["pictures"])
    return folder


def test_records_are_as_long_as_drawn_and_have_their_pictures(place, tmp_path):
    lengths, tiles = llava_lengths(60, 2)
    records = json.loads((place / "data.json").read_text())
    assert [("image" in record) for record in records] == tiles.astype(bool).tolist()
    assert all((place / "images" / record["image"]).is_file() for record in records if "image" in record)
    words = sum(len(message["value"].split()) for record in records for message in record["conversations"])
    text = int((lengths - IMAGE_TOKENS * tiles).sum())
    assert 0.4 < words / text < 0.9
    lines = tmp_path / "text.jsonl"
    write_records(str(lines), 7, 1, Writer(), pictures=False)
    assert [json.loads(line).keys() for line in lines.read_text().splitlines()] == [{"id", "conversations"}] * 7


def test_a_build_is_measured_and_removed(place):
    figures = build(str(place), str(place / "data.json"), 1)
    assert (figures["records"], figures["kept"], figures["workers"]) == (60, 60, 1)
    assert figures["seconds"] > 0
    assert figures["seconds_to_read_a_sample"] > 0
    assert IMAGE_TOKENS < figures["positions_a_sample"] < 2048
    assert not (place / "index").exists()


def figures(workers, records, rate=2000.0, above=0.05, reading=1e-5):
    return {
        "workers": workers,
        "records": records,
        "samples_per_second": rate,
        "builder_peak_gb": 1.0,
        "builder_peak_above_start_gb": above,
        "seconds_to_read_a_sample": reading,
        "seconds": 5.0,
        "cpu_seconds": 6.0,
        "positions_a_sample": 700.0,
    }


def test_limits_hold_or_fail():
    sizes = [figures(2, 20_000), figures(2, 200_000)]
    assert [entry["holds"] for entry in judged([figures(1, 100_000), figures(2, 100_000)], sizes)] == [True] * 3
    # Too few records for a rate.
    assert len(judged([figures(2, 99_999)], sizes)) == 2
    worse = [figures(2, 20_000), figures(2, 200_000, above=0.2)]
    failed = judged([figures(2, 100_000, rate=1499.0, reading=2e-4)], worse)
    assert [entry["holds"] for entry in failed] == [False] * 3
    result = {"data": {"samples": 5, "file_mb": 1.0, "pictures": 4}, "builds": sizes[:1], "text_alone": sizes}
    text = as_text({**result, "limits": failed})
    assert "FAILS: samples a second of two workers, at least 1500: 1499" in text


def test_too_few_samples_are_refused():
    with pytest.raises(UserError, match="--samples 99"):
        benchmark_index(99)
