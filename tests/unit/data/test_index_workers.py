"""Worker processes: the same index for any number of them, and no end that leaves one behind or waits for ever."""

import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from dataclasses import replace

import pytest

from dc_megatron.data import index_workers, json_stream
from dc_megatron.data.image_store import FolderStore
from dc_megatron.data.index import build_index, open_index
from dc_megatron.data.index_workers import sample_makers, worker_count
from dc_megatron.data.retrying import StoreFailure
from dc_megatron.data.tokenization import load_tokenizer
from dc_megatron.errors import UserError
from tests.helpers.data_files import (
    caption_records,
    conversation,
    data_config,
    llama_3_tokenizer,
    sentencepiece_tokenizer,
    write_records,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def config(folder):
    """Two sources, of which the second has a record without an answer and one without its picture."""
    captions = caption_records(folder / "images", 20)
    texts = [{"id": number, "conversations": conversation("why?", f"for {number} reasons")} for number in range(30)]
    texts[7] = {"id": "bad", "conversations": conversation("why?", "")}
    texts[11] = {**captions[0], "image": "none.jpg"}
    files = [write_records(folder / "a.json", captions), write_records(folder / "b.jsonl", texts)]
    return data_config(folder / "images", files, sentencepiece_tokenizer(folder / "tokenizer"), max_bad_sample_rate=0.1)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(json_stream, "RECORDS_PER_CHUNK", 3)


def contents(folder):
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def test_the_same_bytes_for_any_number_of_workers(config, tmp_path, small_chunks):
    for workers in (1, 2, 3):
        build_index(config, str(tmp_path / str(workers)), workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert open_index(str(tmp_path / "2")).summary.dropped_samples == 2


def test_other_kinds_of_tokenizers_reach_the_workers(config, folder, tmp_path, small_chunks):
    for tokenizer, version in (
        (llama_3_tokenizer(folder / "llama_3"), "llama_3"),
        (sentencepiece_tokenizer(folder / "json", model_file=False), "v1"),
    ):
        other = data_config(folder / "images", config.sources[0].data_path, tokenizer, version=version)
        build_index(other, str(tmp_path / version / "1"), workers=1)
        build_index(other, str(tmp_path / version / "2"), workers=2)
        assert contents(tmp_path / version / "1") == contents(tmp_path / version / "2")


def test_pictures_in_shards_give_the_same_samples(config, tmp_path, small_chunks):
    images, shards = config.sources[0].image_folder, tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        with tarfile.open(shards / f"{number}.tar", "w") as shard:
            for name in sorted(os.listdir(images))[number::2]:
                shard.add(os.path.join(images, name), arcname=name)
    sources = tuple(replace(source, image_folder=str(shards / "{0..1}.tar")) for source in config.sources)
    summaries = [
        build_index(replace(config, sources=sources), str(tmp_path / "tars"), workers=2),
        build_index(config, str(tmp_path / "folder"), workers=1),
    ]
    assert summaries[0].kept_hash == summaries[1].kept_hash
    assert open_index(str(tmp_path / "tars"))[3].images == open_index(str(tmp_path / "folder"))[3].images
    # The list of the shards' members is there for the run.
    assert [name for name in os.listdir(tmp_path / "tars") if name.startswith("tar-members-")]


def test_a_store_that_fails_stops_the_build(config, tmp_path, monkeypatch):
    def fail(*_):
        raise StoreFailure("bucket/a.jpg: failed 5 times")

    monkeypatch.setattr(FolderStore, "open", fail)
    with pytest.raises(UserError, match=r"--image_folder .*images: bucket/a.jpg: failed 5 times"):
        build_index(config, str(tmp_path / "index"), workers=1)
    assert os.listdir(tmp_path / "index") == []


def test_small_data_sets_start_no_process(monkeypatch):
    assert worker_count(None, 1000) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(7))
    assert worker_count(None, 1 << 30) == 7
    assert worker_count(3, 10) == 3


def test_workers_import_neither_torch_nor_transformers():
    check = """
        import sys
        import dc_megatron.data.index_samples, sentencepiece, tokenizers
        print([name for name in ("torch", "transformers", "av") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(check)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_a_worker_finds_wrong_with_a_file_is_said_as_ever(config, tmp_path, small_chunks):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([{"id": 1}] * 20)[:-1] + ", oops]")
    broken = data_config(config.sources[0].image_folder, path, config.tokenizer_path, max_bad_sample_rate=1.0)
    with pytest.raises(UserError, match=r"bad\.json: line 1, column 222: not valid JSON"):
        build_index(broken, str(tmp_path / "index"), workers=2)
    assert os.listdir(tmp_path / "index") == []


@pytest.fixture
def started(monkeypatch):
    """The processes of all workers that the test starts."""
    processes = []
    start = index_workers.subprocess.Popen

    def remember(command, **options):
        processes.append(start(command, **options))
        return processes[-1]

    monkeypatch.setattr(index_workers.subprocess, "Popen", remember)
    return processes


def endless(source, chunk):
    while True:
        yield source, chunk


def test_a_worker_that_is_killed_ends_the_build(config, started):
    chunk = next(json_stream.json_chunks(config.sources[0].data_path))
    with sample_makers(config, load_tokenizer(config.tokenizer_path), None, 2) as makers:
        results = makers.map(endless(0, chunk))
        next(results)
        started[1].kill()
        with pytest.raises(UserError, match=r"died \(signal 9\) while it worked on records 0 to 19 of .*a\.json"):
            for _ in results:
                pass
    assert [process.poll() is not None for process in started] == [True, True]


def test_an_error_of_the_program_shows_its_traceback(config, started):
    with sample_makers(config, load_tokenizer(config.tokenizer_path), None, 2) as makers:
        chunk = next(json_stream.json_chunks(config.sources[0].data_path))
        with pytest.raises(RuntimeError, match=r"(?s)records 0 to 19.*Traceback.*IndexError"):
            list(makers.map([(5, chunk)]))
    assert all(process.poll() is not None for process in started)


def test_leaving_early_ends_the_workers(config, started):
    chunk = next(json_stream.json_chunks(config.sources[0].data_path))
    with pytest.raises(KeyboardInterrupt):
        interrupted(config, chunk)
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def interrupted(config, chunk):
    with sample_makers(config, load_tokenizer(config.tokenizer_path), None, 2) as makers:
        next(makers.map(endless(0, chunk)))
        raise KeyboardInterrupt


_BUILD = """
import pickle, signal, sys
from dc_megatron.data import index_build, json_stream
from dc_megatron.data.index import build_index

# Shells start what runs in the background with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
config, tokenizer, folder = pickle.load(open(sys.argv[1], "rb"))
chunk = next(json_stream.json_chunks(config.sources[0].data_path))
def endless(config):
    while True:
        yield 0, chunk
index_build._chunks = endless
# transformers takes seconds to import.
index_build.load_tokenizer = lambda *_: tokenizer
# No guard of __main__ here, either: workers do not run this file again.
build_index(config, folder, lambda *_: print("working", flush=True), workers=2)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_builder(config, tmp_path, number):
    tokenizer = load_tokenizer(config.tokenizer_path)
    tokenizer.hugging_face = None
    (tmp_path / "pickled").write_bytes(pickle.dumps((config, tokenizer, str(tmp_path))))
    words = [sys.executable, "-c", _BUILD, str(tmp_path / "pickled")]
    builder = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert builder.stdout.readline() == "working\n"
    with open(f"/proc/{builder.pid}/task/{builder.pid}/children", encoding="utf-8") as file:
        workers = [int(word) for word in file.read().split()]
    assert len(workers) == 2
    builder.send_signal(number)
    builder.wait(timeout=20)
    builder.stdout.close()
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, workers))


def is_running(pid):
    """Whether the process lives; one whose end nobody has collected yet does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
