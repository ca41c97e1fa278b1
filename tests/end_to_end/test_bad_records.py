"""Faults of single records: replaced or dropped, counted, and too many of them stop the run on all ranks."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.end_to_end.launch import TRAIN, metrics, run, torchrun, train_forked
from tests.helpers.workspace import training_flags

RECORDS, STEPS = 24, 6
MISSING, CORRUPT = "1.jpg", "2.jpg"


@pytest.fixture
def damaged(workspace, tmp_path) -> dict[str, str]:
    """The workspace with one picture gone and the body of another overwritten; its header still tells its size."""
    images = Path(shutil.copytree(workspace["images"], tmp_path / "images"))
    (images / MISSING).unlink()
    body = bytearray((images / CORRUPT).read_bytes())
    start = body.index(b"\xff\xda")  # start of scan: header and tables are left as they are
    body[start:] = b"\0" * (len(body) - start)
    (images / CORRUPT).write_bytes(bytes(body))
    return {**workspace, "images": str(images)}


def command(workspace, folder: Path, **more) -> list[str]:
    """One epoch of the 24 records on two tensor-parallel ranks, each of which decodes half of the pictures."""
    more = {"tensor-model-parallel-size": 2, "max_steps": STEPS, "report_to": "none", **more}
    return [*torchrun(2), *TRAIN, *training_flags(workspace, folder / "run", **more)]


def test_a_missing_picture_is_dropped_and_a_corrupt_one_replaced_and_both_are_counted(damaged, tmp_path):
    done = train_forked(command(damaged, tmp_path, **{"max-bad-sample-rate": 0.2}), tmp_path / "logs")
    assert f"{RECORDS - 1} samples of {RECORDS} records (dropped: 1 missing image)" in done.output
    assert CORRUPT in done.everything, "a warning names the picture that was replaced"
    lines = metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines] == list(range(1, STEPS + 1))
    assert {line["dropped_samples"] for line in lines} == {1}
    # 23 samples in six steps of four: the first of the second epoch is there as well.
    assert sum(line["substituted_images"] for line in lines) in (1, 2)
    assert sum(line["images"] for line in lines) in (15, 16)
    assert all(line["loss"] > 0 for line in lines)


@pytest.mark.long
def test_more_corrupt_pictures_than_allowed_stop_the_run_on_all_ranks(damaged, tmp_path):
    """Only one rank meets the picture; all must stop, with one message."""
    records = [record for record in json.loads(Path(damaged["data"]).read_text()) if record.get("image") != MISSING]
    damaged["data"] = str(tmp_path / "data.json")
    Path(damaged["data"]).write_text(json.dumps(records))
    done = run(command(damaged, tmp_path, max_steps=1000), tmp_path / "logs").assert_refused(
        "--max-bad-sample-rate 0.001", "1 of ", "could not be decoded"
    )
    assert CORRUPT in done.everything
    assert len(metrics(tmp_path / "run")) < STEPS


def test_more_missing_pictures_than_allowed_stop_the_run_before_it_begins(damaged, tmp_path):
    """The index finds them; test_bad_input shows how other ranks hear of what local rank 0 found in the data."""
    words = training_flags(damaged, tmp_path / "run")
    done = run([sys.executable, *TRAIN, *words], tmp_path / "logs")
    done.assert_refused("--data_path", f"1 of {RECORDS} records", "missing image", MISSING, "--max-bad-sample-rate")
