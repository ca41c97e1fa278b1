"""Building, reopening and refusing indexes."""

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest

from dc_megatron.data import index_build, json_stream
from dc_megatron.data.faults import RecordFault
from dc_megatron.data.index import build_index, index_key, open_index, sample_from_record
from dc_megatron.data.picture import Picture, make_picture
from dc_megatron.data.tokenization import load_tokenizer
from dc_megatron.errors import UserError
from tests.helpers.data_files import (
    caption_records,
    conversation,
    data_config,
    photo,
    sentencepiece_tokenizer,
    tiling,
    write_records,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return sentencepiece_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make(tmp_path, tokenizer):
    def config(records, **overrides):
        (tmp_path / "images").mkdir(exist_ok=True)
        return data_config(tmp_path / "images", write_records(tmp_path / "data.json", records), tokenizer, **overrides)

    return config


def test_an_index_holds_what_was_tokenised(make, tmp_path):
    records = caption_records(tmp_path / "images", 5)
    records.append({"id": "text", "conversations": conversation("hello", "the quick brown fox")})
    photo(tmp_path / "images" / "b.jpg", seed=9)
    two = {"id": "two", "image": ["0000.jpg", "b.jpg"], "conversations": conversation("<image> or <image>?", "a")}
    config = make([*records, two])
    seen = []
    summary = build_index(config, str(tmp_path / "index"), lambda done, total: seen.append((done, total)))
    index = open_index(str(tmp_path / "index"))
    assert (summary.records, summary.kept, len(index), summary.images) == (7, 7, 7, 7)
    assert summary == index.summary
    assert seen[-1] == (7, 7)
    assert index[6].images == (Picture("0000.jpg", 40, 32, 4), Picture("b.jpg", 80, 64, 4))
    assert [index[n].identifier for n in (0, 5, 6)] == ["caption-0", "text", "two"]
    assert [index[n].record for n in range(7)] == list(range(7))
    assert summary.tokens == sum(index[n].length for n in range(7))
    assert summary.supervised_tokens == sum(index[n].supervised_tokens for n in range(7))
    assert index[0].input_ids.dtype == np.int32
    with pytest.raises(IndexError):
        index[7]


def test_many_batches(make, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "RECORDS_PER_CHUNK", 3)
    build_index(make(caption_records(tmp_path / "images", 8)), str(tmp_path / "index"))
    index = open_index(str(tmp_path / "index"))
    assert [index[n].identifier for n in range(8)] == [f"caption-{n}" for n in range(8)]


def files_of(summary):
    return ["faults.jsonl", f"index-{summary.key}.arrow", "index.json", "notes.jsonl"]


def test_a_second_build_returns_at_once_and_a_changed_one_does_not(make, tmp_path, monkeypatch):
    folder = str(tmp_path / "index")
    config = make(caption_records(tmp_path / "images", 3))
    first = build_index(config, folder)
    monkeypatch.setattr(index_build, "json_chunks", lambda *_: pytest.fail("read the data again"))
    assert build_index(config, folder) == first
    monkeypatch.undo()
    old = open_index(folder)
    changed = build_index(make(caption_records(tmp_path / "images", 2)), folder)
    assert (changed.kept, changed.key != first.key) == (2, True)
    # A process that still maps the old file is not hurt, and only the new one is left.
    assert old[2].identifier == "caption-2"
    assert sorted(os.listdir(folder)) == files_of(changed)


def test_a_node_that_comes_second_on_a_shared_disk_leaves_the_first_ones_file(make, tmp_path, monkeypatch):
    config, folder = make(caption_records(tmp_path / "images", 3)), str(tmp_path / "index")
    arrow = os.path.join(folder, f"index-{index_key(config)}.arrow")
    first = []

    def other_node_finishes(done, total):
        if not first:
            with monkeypatch.context() as patch:
                patch.setattr(index_build.platform, "node", lambda: "other-node")
                first.append(None)
                first[0] = build_index(config, folder)
            first.append(os.stat(arrow).st_ino)

    assert build_index(config, folder, other_node_finishes) == first[0]
    assert os.stat(arrow).st_ino == first[1]
    assert sorted(os.listdir(folder)) == files_of(first[0])


def test_the_summary_tells_which_records_were_kept(make, tmp_path):
    """Under one key: the pictures are not part of it."""
    config = make(caption_records(tmp_path / "images", 3), max_bad_sample_rate=0.9)
    whole = build_index(config, str(tmp_path / "a"))
    assert build_index(config, str(tmp_path / "again")).kept_hash == whole.kept_hash
    found = {whole.kept_hash}
    for number in (0, 1):
        picture = tmp_path / "images" / f"{number:04}.jpg"
        picture.rename(tmp_path / "aside.jpg")
        less = build_index(config, str(tmp_path / f"without-{number}"))
        (tmp_path / "aside.jpg").rename(picture)
        assert (less.key, less.kept) == (whole.key, 2)
        found.add(less.kept_hash)
    assert len(found) == 3


def test_ids_beyond_the_vocabulary_are_refused(make, tmp_path, tokenizer):
    records, folder = caption_records(tmp_path / "images", 3), str(tmp_path / "index")
    config = make(records)
    summary = build_index(config, folder)
    largest = max(int(open_index(folder)[n].input_ids.max()) for n in range(3))
    assert summary.largest_id == largest
    assert build_index(replace(config, vocab_size=largest + 1), folder) == summary
    too_small = replace(config, vocab_size=largest)
    words = rf"--data_path .*data\.json: .*{tokenizer} makes token id {largest}.*vocab_size {largest}, .*resize"
    for place in (folder, str(tmp_path / "new")):  # one that is finished, and one to build
        with pytest.raises(UserError, match=words):
            build_index(too_small, place)
    assert os.listdir(tmp_path / "new") == []


def test_the_key_follows_what_decides_the_content(make, tmp_path):
    records = caption_records(tmp_path / "images", 2)
    base = index_key(make(records))
    assert index_key(make(records, seed=7, image_aspect_ratio="square", seq_length=500, vocab_size=9999)) == base
    assert index_key(make(records, tiling=tiling(5))) != base
    assert index_key(make(records, version="plain")) != base
    assert index_key(make(records, model_max_length=100)) != base
    assert index_key(make(records[:1])) != base


def faulty_records(folder):
    """One good record and one of every fault."""
    records = caption_records(folder, 1)
    (folder / "bad.jpg").write_bytes(b"nothing")
    answer = conversation("<image> what?", "a dog")
    return records, {
        RecordFault.IMAGE_COUNT: {"id": 1, "conversations": answer},
        RecordFault.MISSING_IMAGE: {"id": 2, "image": "none.jpg", "conversations": answer},
        RecordFault.CORRUPT_IMAGE: {"id": 3, "image": "bad.jpg", "conversations": answer},
        RecordFault.NO_TARGET: {"id": 4, "conversations": conversation("long " * 300, "cut off")},
        RecordFault.STRUCTURE: {"id": 5, "conversations": "text"},
    }


def test_faulty_records_are_dropped_and_counted(make, tmp_path):
    good, faulty = faulty_records(tmp_path / "images")
    config = make([*faulty.values(), *good], max_bad_sample_rate=0.9)
    summary = build_index(config, str(tmp_path / "index"))
    assert summary.dropped == dict.fromkeys(faulty, 1)
    assert summary.dropped_samples == 5
    assert open_index(str(tmp_path / "index"))[0].record == 5
    assert "none.jpg" in summary.examples[RecordFault.MISSING_IMAGE][0]
    assert "record 0" in summary.examples[RecordFault.IMAGE_COUNT][0]


def test_too_many_faults_stop_the_run(make, tmp_path):
    good, faulty = faulty_records(tmp_path / "images")
    missing = faulty[RecordFault.MISSING_IMAGE]
    with pytest.raises(UserError) as caught:
        build_index(make([*good, missing]), str(tmp_path / "index"))
    for words in ("1 of 2 records", "1 x missing image", "none.jpg", "--max-bad-sample-rate", "--data_path"):
        assert words in str(caught.value)
    assert os.listdir(tmp_path / "index") == []
    with pytest.raises(UserError, match="nothing is left"):
        build_index(make([missing], max_bad_sample_rate=1.0), str(tmp_path / "index"))


def test_a_hopeless_data_set_is_not_read_to_its_end(make, tmp_path):
    with pytest.raises(UserError, match=r"512 of 512 records.*512 x bad structure"):
        build_index(make([{"id": number} for number in range(5000)]), str(tmp_path / "index"))


def test_a_stricter_limit_holds_for_a_finished_index_too(make, tmp_path):
    good, faulty = faulty_records(tmp_path / "images")
    records = [*good, faulty[RecordFault.STRUCTURE]]
    build_index(make(records, max_bad_sample_rate=0.5), str(tmp_path / "index"))
    with pytest.raises(UserError, match="1 of 2 records"):
        build_index(make(records), str(tmp_path / "index"))


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_fault_and_odd_picture_is_listed(make, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "RECORDS_PER_CHUNK", 2)
    good, faulty = faulty_records(tmp_path / "images")
    photo(tmp_path / "images" / "odd.jpg", mode="CMYK")
    odd = {"id": "odd", "image": "odd.jpg", "conversations": conversation("<image>", "x")}
    again = {"id": "odd again", "image": ["odd.jpg"], "conversations": conversation("no mark", "x")}
    config = make([*faulty.values(), *good, odd, again], max_bad_sample_rate=0.9)
    summary = build_index(config, str(tmp_path / "index"))
    faults = lines_of(tmp_path / "index" / "faults.jsonl")
    assert [(line["source"], line["record"], line["id"]) for line in faults] == [
        *((0, number, str(number + 1)) for number in range(5)),
        (0, 7, "odd again"),
    ]
    assert [line["reason"] for line in faults] == [*faulty, RecordFault.IMAGE_COUNT]
    assert "none.jpg" in faults[1]["detail"]
    # Pictures are odd whether their record was kept or not.
    assert lines_of(tmp_path / "index" / "notes.jsonl") == [
        {"source": 0, "record": number, "name": "odd.jpg", "kind": "cmyk"} for number in (6, 7)
    ]
    assert summary.notes == {"cmyk": 2}


def test_several_sources(make, tmp_path, tokenizer):
    first = caption_records(tmp_path / "images", 3)
    second = [{"conversations": conversation("hello", f"the {number} dogs")} for number in range(4)]
    second[1] = {"id": "broken"}
    files = [write_records(tmp_path / "a.json", first), write_records(tmp_path / "b.jsonl", second)]
    for number in range(2):
        photo(tmp_path / "other" / f"{number:04}.jpg", 50, 40)
    config = data_config(tmp_path / "images", [*files, files[0]], tokenizer, max_bad_sample_rate=0.5)
    sources = list(config.sources)
    sources[2] = replace(sources[2], image_folder=str(tmp_path / "other"))
    config = replace(config, sources=tuple(sources))
    summary = build_index(config, str(tmp_path / "index"))
    index = open_index(str(tmp_path / "index"))
    assert [(one.records, one.kept, one.images, one.text_only) for one in summary.sources] == [
        (3, 3, 3, 0),
        (4, 3, 0, 3),
        (3, 2, 2, 0),
    ]
    assert [one.dropped for one in summary.sources] == [{}, {"bad structure": 1}, {"missing image": 1}]
    assert summary.dropped == {"bad structure": 1, "missing image": 1}
    assert (summary.records, summary.kept) == (10, 8)
    assert summary.examples["bad structure"] == [
        f"{files[1]} record 1: conversations is not a list with messages in it"
    ]
    # Record numbers count within the source.
    assert [(sample.source, sample.record) for sample in (index[n] for n in range(8))] == [
        *((0, number) for number in range(3)),
        *((1, number) for number in (0, 2, 3)),
        *((2, number) for number in range(2)),
    ]
    assert index.sources.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [index[n].images[0].width for n in (0, 6)] == [40, 50]
    assert [index[n].images[0].source for n in (0, 6)] == [0, 2]
    assert [line["source"] for line in lines_of(tmp_path / "index" / "faults.jsonl")] == [1, 2]


def test_a_source_of_which_nothing_is_left_is_refused(make, tmp_path, tokenizer):
    good = [{"conversations": conversation("hello", "a dog")}] * 50
    files = [write_records(tmp_path / "good.json", good), write_records(tmp_path / "bad.json", [{"id": 1}])]
    (tmp_path / "images").mkdir()
    config = data_config(tmp_path / "images", files, tokenizer, max_bad_sample_rate=0.5)
    with pytest.raises(UserError, match=rf"1 of 51 records.*nothing is left of {files[1]} to train on"):
        build_index(config, str(tmp_path / "index"))
    config = replace(config, sources=(*config.sources, replace(config.sources[0], data_path=str(tmp_path / "none"))))
    with pytest.raises(UserError, match=r"--data_path .*none: no such file"):
        build_index(config, str(tmp_path / "index"))


def test_weights_packing_and_order_leave_the_key_and_sources_change_it(make, tmp_path, tokenizer):
    record = [{"conversations": conversation("hello", "a dog")}]
    files = [write_records(tmp_path / name, record) for name in ("a.json", "b.json")]
    config = data_config(tmp_path, files, tokenizer)
    base, (first, second) = index_key(config), config.sources
    for same in (
        replace(config, packing="best-fit", group_by_modality_length=True, order="sequential"),
        replace(config, sources=(replace(first, weight=0.5), second)),
    ):
        assert index_key(same) == base
    for other in (
        replace(config, sources=(second, first)),
        replace(config, sources=(first,)),
        replace(config, sources=(first, replace(second, image_folder=str(tmp_path / "x")))),
        replace(config, video_frames=4),
        replace(config, tiling=replace(config.tiling, pinpoints=((56, 56),))),
    ):
        assert index_key(other) != base


def test_arrays_are_those_of_the_samples(make, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "RECORDS_PER_CHUNK", 2)
    records = caption_records(tmp_path / "images", 3, size=(80, 30))
    photo(tmp_path / "images" / "tall.jpg", 20, 90)
    records.append({"image": ["tall.jpg", "0000.jpg"], "conversations": conversation("<image><image>", "b")})
    records.append({"conversations": conversation("hello", "a dog")})
    grid = tiling(pinpoints=((28, 56), (56, 28), (56, 56)), merge="spatial_unpad")
    build_index(make(records, tiling=grid), str(tmp_path / "index"))
    index = open_index(str(tmp_path / "index"))
    samples = [index[number] for number in range(len(index))]
    assert index.lengths.tolist() == [sample.length for sample in samples]
    assert (
        index.tiles.tolist() == [sum(image.tiles for image in sample.images) for sample in samples] == [3, 3, 3, 6, 0]
    )
    assert (index.lengths.dtype, index.tiles.dtype, index.sources.dtype) == (np.int32, np.int32, np.int16)
    assert samples[3].images == (make_picture(grid, "tall.jpg", 20, 90), make_picture(grid, "0000.jpg", 80, 30))


def test_samples_are_those_of_single_records(make, tmp_path, tokenizer):
    """What streaming, columns and shared encodings of the system prompt do must not show."""
    records = caption_records(tmp_path / "images", 6)
    records += [{"id": n, "conversations": conversation("  why? ", "é" * n, f"{n}\n", "🙂 x")} for n in range(1, 6)]
    config = make(records)
    build_index(config, str(tmp_path / "index"))
    index = open_index(str(tmp_path / "index"))
    for number, record in enumerate(records):
        expected = sample_from_record(config, load_tokenizer(tokenizer), record, number)
        found = index[number]
        assert np.array_equal(found.input_ids, expected.input_ids)
        assert np.array_equal(found.labels, expected.labels)
        for name in ("images", "length", "identifier", "record", "source"):
            assert getattr(found, name) == getattr(expected, name)


def test_progress_ends_with_the_number_of_records_and_not_before(make, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "RECORDS_PER_CHUNK", 3)
    seen = []
    build_index(make(caption_records(tmp_path / "images", 10)), str(tmp_path / "i"), lambda *two: seen.append(two))
    assert [done for done, _ in seen] == [3, 6, 9, 10, 10]
    assert seen[-1] == (10, 10)
    assert all(done < total < 20 for done, total in seen[:-1])


def test_an_index_without_checks_holds_what_there_is(make, tmp_path):
    good, faulty = faulty_records(tmp_path / "images")
    config = make([*faulty.values(), *good], vocab_size=1)
    summary = build_index(config, str(tmp_path / "index"), check=False)
    assert (summary.kept, summary.dropped_samples, len(open_index(str(tmp_path / "index")))) == (1, 5, 1)
    with pytest.raises(UserError, match="5 of 6 records"):
        build_index(config, str(tmp_path / "index"))
    empty = build_index(make([{"id": 1}]), str(tmp_path / "empty"), check=False)
    index = open_index(str(tmp_path / "empty"))
    assert (empty.kept, len(index), index.lengths.tolist()) == (0, 0, [])


def test_records_too_few_to_hurt_do_not_stop_early(make, tmp_path, monkeypatch):
    """Faults at the beginning: what follows decides whether they are too many."""
    monkeypatch.setattr(index_build, "_EARLY_STOP", 2)
    monkeypatch.setattr(json_stream, "RECORDS_PER_CHUNK", 4)
    good = {"conversations": conversation("hello", "a dog")}
    config = make([{"id": 1}] * 8 + [good] * 80, max_bad_sample_rate=0.1)
    assert build_index(config, str(tmp_path / "index")).dropped_samples == 8


def test_a_full_disk_is_named(make, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(index_build, "_write_lines", fail)
    with pytest.raises(UserError, match=r"index: the data index cannot be built there: .*No space left"):
        build_index(make(caption_records(tmp_path / "images", 2)), str(tmp_path / "index"))
    assert os.listdir(tmp_path / "index") == []


def test_a_folder_without_an_index(tmp_path):
    with pytest.raises(UserError, match="no finished data index"):
        open_index(str(tmp_path))
    (tmp_path / "index.json").write_text(json.dumps({"key": "gone"}))
    with pytest.raises(UserError, match="no finished data index"):
        open_index(str(tmp_path))
