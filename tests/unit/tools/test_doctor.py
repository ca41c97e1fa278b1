"""doctor: what is found, what is chosen and why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dc_megatron.reports import doctor
from dc_megatron.runtime import installed

ROOT = Path(__file__).resolve().parents[3]
USABLE = {"version": "1", "found": True, "error": None}
ABSENT = {"version": None, "found": False, "error": "not installed"}
BROKEN = {"version": "1", "found": True, "error": "ImportError: undefined symbol"}


def chosen(cuda: bool, engine: dict, apex: dict = ABSENT, dali: dict = ABSENT) -> dict:
    return doctor._backends(cuda, {"transformer-engine": engine, "apex": apex, "dali": dali, "flash-attn": ABSENT})


@pytest.mark.parametrize(
    ("cuda", "engine", "layers", "why"),
    [
        (True, USABLE, "transformer_engine", "there is a GPU"),
        (True, ABSENT, "local", "not installed"),
        (True, BROKEN, "local", "undefined symbol"),
        (False, USABLE, "local", "there is no GPU"),
    ],
)
def test_layers_and_why(cuda, engine, layers, why):
    backend = chosen(cuda, engine)["layers"]
    assert backend["choice"] == layers
    assert why in backend["why"]


def test_optimizer_and_images():
    assert chosen(True, USABLE)["optimizer"]["choice"] == "Transformer Engine FusedAdam"
    assert chosen(True, ABSENT, apex=USABLE)["optimizer"]["choice"] == "apex FusedAdam"
    assert chosen(True, ABSENT)["optimizer"]["choice"] == "torch AdamW"
    assert chosen(False, ABSENT, dali=USABLE)["images"]["choice"] == "dali on the CPU"
    broken = chosen(True, ABSENT, dali=BROKEN)["images"]
    assert broken["choice"] == "pil"
    assert "undefined symbol" in broken["why"]


def test_detection_imports_nothing_and_errors_are_said():
    assert installed.version_of("no-such-distribution") is None
    assert installed.version_of("no-such-distribution", "megatron-core") == "0.19.2"
    assert not installed.has_module("no_such_module")
    assert "no_such_module" in installed.import_error("no_such_module")
    with pytest.raises(AssertionError, match="submodule"):
        installed.has_module("os.path")


def test_transformer_engine_without_its_torch_part_does_not_count(monkeypatch):
    monkeypatch.setattr(installed, "has_module", lambda name: name == "transformer_engine")
    assert not installed.has_transformer_engine()
    monkeypatch.setattr(installed, "has_module", lambda name: True)
    assert installed.has_transformer_engine()


def test_the_command_reports_for_people_and_for_machines():
    environment = os.environ | {"DC_DEVICE": "cpu"}
    command = [sys.executable, str(ROOT / "tools" / "doctor.py")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["versions"]["megatron-core"] == "0.19.2"
    assert report["backends"]["device"] == {"choice": "cpu", "why": "DC_DEVICE=cpu is set"}
    assert report["engine_flags"][:2] == ["--distributed-backend", "gloo"]
    text = doctor.as_text(report)
    for word in ("megatron-core", "0.19.2", "gloo", "DC_DEVICE=cpu is set", "--transformer-impl local"):
        assert word in text


def test_bad_use_exits_with_2():
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "doctor.py"), "--jsn"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--jsn" in done.stderr
