"""Two ranks around one index: the builder's success, failure and death reach the one that waits."""

import json
import multiprocessing
import os
import platform
import time

import pytest

from dc_megatron.data import index_waiting
from dc_megatron.data.index_waiting import build_or_wait
from dc_megatron.errors import UserError
from tests.helpers.data_files import caption_records, data_config, sentencepiece_tokenizer, tiling, write_records


@pytest.fixture(scope="module")
def start():
    """start(function, *arguments) runs it as a rank of one launch and returns (process, its end of a pipe)."""
    # The ranks' common parent is the fork server; it has done the slow imports, and has no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["dc_megatron.data.index_waiting", "transformers.models.auto.tokenization_auto", "sentencepiece"]
    )
    processes = []

    def run(function, *arguments):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=report, args=(sender, function, arguments), daemon=True)
        process.start()
        processes.append(process)
        return process, receiver

    # Starts the server, so that no test counts its imports.
    run(time.time)[1].recv()
    yield run
    for process in processes:
        process.kill()
        process.join()


def report(sender, function, arguments):
    try:
        sender.send(function(*arguments))
    except UserError as error:
        sender.send(f"UserError: {error}")


def rank(local_rank, delay, config, folder):
    """(size of the index, seconds build_or_wait took after ``delay``)."""
    time.sleep(delay)
    started = time.monotonic()
    index = build_or_wait(config, folder, local_rank, start_timeout=20)
    return len(index), time.monotonic() - started


def hang_while_building(config, folder):
    index_waiting.build_index = lambda *_: time.sleep(60)
    build_or_wait(config, folder, 0)


def answer(started, seconds=20):
    _, receiver = started
    assert receiver.poll(seconds), "the rank said nothing in time"
    return receiver.recv()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("waiting")
    records = caption_records(folder / "images", 4)
    tokenizer = sentencepiece_tokenizer(folder / "tokenizer")
    return data_config(folder / "images", write_records(folder / "data.json", records), tokenizer)


def status_file(folder):
    return folder / f"build-{platform.node()}.json"


def test_both_ranks_get_the_same_index(config, tmp_path, start):
    waiting = start(rank, 1, 0.0, config, str(tmp_path))
    building = start(rank, 0, 0.3, config, str(tmp_path))
    assert answer(building)[0] == answer(waiting)[0] == 4
    # A finished index is opened at once by either.
    assert all(answer(start(rank, number, 0.0, config, str(tmp_path)))[1] < 1 for number in (0, 1))


@pytest.mark.parametrize("delay", [0.0, 2.0])
def test_the_builders_error_is_raised_by_the_other_rank(config, tmp_path, start, delay):
    """delay: how much later than the builder the other rank comes (2 s: after it has failed)."""
    broken = data_config(config.image_folder, write_records(tmp_path / "bad.json", [{"id": 1}]), config.tokenizer_path)
    building = start(rank, 0, 0.0, broken, str(tmp_path / "index"))
    waiting = start(rank, 1, delay, broken, str(tmp_path / "index"))
    words = answer(building)
    finished = time.monotonic()
    assert "1 x bad structure" in words
    assert answer(waiting) == words
    assert time.monotonic() - finished < delay + 1


def test_a_failure_of_an_earlier_launch_is_not_ours(config, tmp_path, start):
    status = {"state": "failed", "message": "old", "launch": "1:2:0", "written": time.time() - 5, "pid": 1, "beat": 3}
    status_file(tmp_path).write_text(json.dumps({**status, "done": 0, "total": 0}))
    waiting = start(rank, 1, 0.0, config, str(tmp_path))
    start(rank, 0, 0.5, config, str(tmp_path))
    assert answer(waiting)[0] == 4


def test_a_builder_that_dies_is_noticed(config, tmp_path, start):
    builder, _ = start(hang_while_building, config, str(tmp_path))
    waiting = start(rank, 1, 0.0, config, str(tmp_path))
    while not os.path.exists(status_file(tmp_path)):
        time.sleep(0.05)
    builder.kill()
    killed = time.monotonic()
    assert f"process {builder.pid}) died" in answer(waiting)
    assert time.monotonic() - killed < 1.5


def test_a_builder_that_is_silent_is_given_up(config, tmp_path, monkeypatch):
    monkeypatch.setattr(index_waiting, "_launch", lambda: "this one")
    status = {"state": "building", "launch": "this one", "written": 0, "pid": os.getpid(), "beat": 3}
    status_file(tmp_path).write_text(json.dumps({**status, "done": 5, "total": 9}))
    seen = []
    with pytest.raises(UserError, match="no sign of local rank 0"):
        build_or_wait(config, str(tmp_path), 1, progress=lambda *steps: seen.append(steps), stale_timeout=0.5)
    assert seen[0] == (5, 9)


def test_a_builder_that_never_comes(config, tmp_path):
    with pytest.raises(UserError, match="no sign of local rank 0"):
        build_or_wait(config, str(tmp_path), 1, start_timeout=0.3)


def test_ranks_with_different_settings_are_told(config, tmp_path, start):
    assert answer(start(rank, 0, 0.0, config, str(tmp_path)))[0] == 4
    other = data_config(config.image_folder, config.data_path, config.tokenizer_path, tiling=tiling(9))
    assert "different data index" in answer(start(rank, 1, 0.0, other, str(tmp_path)))
