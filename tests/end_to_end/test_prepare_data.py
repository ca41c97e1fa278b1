"""The commands of docs/prepare_data.md, on miniatures of the published folders and tiny models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dc_megatron.config import ConnectorConfig, VisionConfig
from dc_megatron.weights.projector_files import write_projector
from tests.end_to_end.launch import ROOT, metrics
from tests.helpers.published_layouts import make_published_layouts

SIZES = {"MODEL_MAX_LENGTH": "128", "SEQ_LENGTH": "256", "GLOBAL_BATCH_SIZE": "8", "WORKERS": "1", "GPUS_PER_NODE": "2"}
# The tiny models are compared in fp32 elsewhere; here only the commands count.
SIZES |= {"BF16": "False", "GRADIENT_CHECKPOINTING": "False", "SAVE_STEPS": "1000"}


def commands() -> list[str]:
    """The bash commands of the page, in order."""
    text = (ROOT / "docs" / "prepare_data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", line).strip() for line in lines if line.strip()]


def command(*words: str) -> str:
    found = [one for one in commands() if all(word in one for word in words)]
    assert len(found) == 1, f"{words} should name one command of the page: {found}"
    return found[0]


@pytest.fixture(scope="module")
def place(workspace, tmp_path_factory) -> Path:
    """A folder to stand in: data/, checkpoints/ and nothing else."""
    root = tmp_path_factory.mktemp("published")
    make_published_layouts(root)
    (root / "checkpoints").mkdir()
    (root / "checkpoints" / "vicuna-7b-v1.5").symlink_to(workspace["llama"])
    (root / "checkpoints" / "clip-vit-large-patch14-336").symlink_to(workspace["clip"])
    return root


def run_there(place: Path, line: str) -> str:
    line = line.replace(".venv/bin/python tools/", f"{sys.executable} {ROOT}/tools/")
    line = line.replace("bash examples/", f"bash {ROOT}/examples/")
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DC_DEVICE": "cpu", **SIZES},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def projector(workspace, folder: Path) -> None:
    """What stage 1 leaves, with random numbers in it."""
    vision = VisionConfig.from_folder(workspace["clip"])
    connector = ConnectorConfig("dci")
    with open(os.path.join(workspace["llama"], "config.json"), encoding="utf-8") as file:
        width = json.load(file)["hidden_size"]
    shapes = {"0.weight": (width, connector.input_size(vision)), "0.bias": (width,), "2.weight": (width, width)}
    tensors = {f"mlp.{name}": 0.02 * torch.randn(shape) for name, shape in (shapes | {"2.bias": (width,)}).items()}
    write_projector(str(folder), tensors, connector, vision)


@pytest.mark.long
def test_preflight_and_a_mix_of_both(workspace, place):
    page = run_there(place, command("tools/preflight.py"))
    assert "refused" not in page
    html = (place / "runs" / "vicuna-7b-dci-finetune" / "index" / "preflight.html").read_text(encoding="utf-8")
    assert "CMYK" in html or "cmyk" in html
    projector(workspace, place / "runs" / "vicuna-7b-dci-pretrain")
    log = run_there(place, command("finetune_dc.sh", "mix665k.json:1.0"))
    assert "70 samples of 71 records" in log or "samples of" in log
    assert "packing:" in log
    lines = metrics(place / "runs" / "mix")
    # 19 samples of the first file and half of the second's 52.
    assert sum(line["samples"] for line in lines) >= 19 + 26
    assert sum(line["substituted_images"] for line in lines) == 0


@pytest.mark.long
def test_the_other_commands(place):
    for words in (
        ("pretrain_dc.sh",),
        ("finetune_dc.sh",),
        ("MiniGemini-Pretrain/minigemini_pretrain.json",),
        ("PROJECTOR=runs/mgm-pretrain",),
    ):
        found = [one for one in commands() if all(word in one for word in words)]
        run_there(place, min(found, key=len))
    for name in ("vicuna-7b-dci-pretrain", "vicuna-7b-dci-finetune", "mgm-pretrain", "mgm-finetune"):
        assert metrics(place / "runs" / name)[-1]["loss"] > 0
