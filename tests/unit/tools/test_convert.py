"""Flags of tools/convert.py, its messages and exit statuses; what it does is in tests/unit/weights."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex

import pytest

from tests.helpers.tiny_models import tiny_llama

_PATH = os.path.join(os.path.dirname(__file__), "..", "..", "..", "tools", "convert.py")


@pytest.fixture(scope="module")
def convert():
    spec = importlib.util.spec_from_file_location("convert_tool", _PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("models") / "a llama", layers=2)


def test_there_and_back_and_what_it_advises(convert, llama, tmp_path, capsys):
    tree, out = str(tmp_path / "tree"), str(tmp_path / "out")
    assert convert.main(["import", "--hf", llama, "--save", tree]) == 0
    assert f"train with --model_name_or_path {tree}/hf --load {tree}\n" in capsys.readouterr().out
    assert convert.main(["export", "--load", tree, "--format", "hf", "--save", out, "--dtype", "bf16"]) == 0
    advice = capsys.readouterr().out.strip().partition("compare with: tools/convert.py ")[2]
    assert convert.main(shlex.split(advice)) == 0
    capsys.readouterr()
    assert convert.main(["verify", llama, out, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["equal"] is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vision-tower-name", "x"], "--vision-tower-name: --format llava and peft alone have a place for it"),
        (["--with_modeling_code"], "--with-modeling-code: --format hf-llava alone"),
        (["--version", "v1"], "--version: --format hf-llava alone"),
        (["--load", "nowhere"], "--load nowhere: no such folder"),
    ],
)
def test_bad_use_is_one_line_and_status_2(convert, llama, tmp_path, capsys, flags, message):
    words = ["export", "--load", llama, "--format", "hf", "--save", str(tmp_path / "out"), *flags]
    assert convert.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt, 130, "interrupted; the same command goes on where it stopped\n"),
        (OSError("no"), 2, "error: no; when that is mended, the same command goes on where it stopped\n"),
    ],
)
def test_what_ends_it_is_said(convert, llama, tmp_path, capsys, monkeypatch, error, status, message):
    def fail(options):
        raise error

    monkeypatch.setattr(convert, "run_import", fail)
    assert convert.main(["import", "--hf", llama, "--save", str(tmp_path / "out")]) == status
    assert capsys.readouterr().err == message
