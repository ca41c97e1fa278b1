"""tools/evaluate.py before any model is built, and its words about what came out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from dc_megatron.reports.benchmark_text import summary_lines

ROOT = Path(__file__).resolve().parents[3]
WORDS = ["--benchmark", "gqa", "--question_file", "q.jsonl", "--output_dir", "out"]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--benchmark"),
        (["--benchmark", "vqa9", *WORDS[2:]], "invalid choice: 'vqa9'"),
        ([*WORDS, "--batch-size", "0"], "--batch_size 0: at least 1"),
        ([*WORDS, "--max_new_tokens", "x"], "invalid int value"),
    ],
)
def test_bad_use_ends_with_status_2(tool, capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        tool.main(words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (WORDS, "--model_name_or_path is missing: give --load DIR"),
        ([*WORDS, "--load", "absent"], "absent"),
    ],
)
def test_a_user_error_is_one_line_and_status_2(tool, capsys, monkeypatch, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)
    assert tool.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "out").exists()


def summary(**more):
    base = {"benchmark": "pope", "questions": 9, "answered_before": 0, "faults": {}, "metrics": None}
    return {**base, "why_no_metrics": "no annotations", "files": ["out/answers.jsonl"], **more}


def test_what_was_not_asked_is_said():
    lines = summary_lines(summary(faults={"missing image": 2, "corrupt image": 1}, answered_before=4))
    assert lines[0] == "pope: 9 questions, 4 answered before"
    assert lines[1].startswith("not asked, and counted as wrong: 3 (corrupt image: 1, missing image: 2)")
    assert lines[2:] == ["no metric: no annotations", "out/answers.jsonl"]


def test_metrics_are_listed_with_their_parts():
    lines = summary_lines(summary(metrics={"mean_f1": 58.333, "random": {"f1": 50.0}, "not_asked": 3}))
    assert lines[1:-1] == ["mean_f1: 58.33", "random:", "  f1: 50.00", "not_asked: 3"]
