"""tools/preflight.py as a program: exit status, one screen, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.troubled_data import troubled_data

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data")
    return {**troubled_data(root, captions=8), "index": str(root / "index")}


def run(files: dict[str, str], data: str, *more: str) -> subprocess.CompletedProcess:
    words = [sys.executable, str(ROOT / "tools" / "preflight.py"), "--data_path", data]
    words += ["--image-folder", files["images"], "--model_name_or_path", files["model"]]
    words += ["--vision_tower", files["tower"], "--version", "v1", "--index-folder", files["index"], *more]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def test_good_data_exits_with_0_and_a_screen(files):
    done = run(files, files["second"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "fine: 10 samples to train on"
    assert done.stderr == ""
    assert (Path(files["index"]) / "preflight.html").is_file()


def test_troubled_data_exits_with_1_and_lists_all_as_json(files):
    done = run(files, files["main"], "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"] == "refused"
    assert len(report["dropped_records"]) == report["total"]["dropped"] == 8


@pytest.mark.parametrize(
    "more", [["--decode", "some"], ["--version", "v2"], ["--data_path", "nowhere.json"], ["--jsn"]]
)
def test_bad_use_exits_with_2_and_one_line(files, more):
    done = run(files, files["second"], *more)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].count("error: ") == 1
    assert "Traceback" not in done.stderr
