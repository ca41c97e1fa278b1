"""The planner's memory against real runs on the CPU: what autograd keeps of a layer, and how far a process grows."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig
from dc_megatron.planner.memory import Numbers, Run, stage_memory
from tests.helpers.measured import run_measured
from tests.helpers.workspace import make_workspace, training_flags

ROOT = Path(__file__).resolve().parents[3]
TOLERANCE = 0.2


@dataclass(frozen=True)
class Size:
    hidden: int
    inner: int
    layers: int
    row: int


# Mostly weights and optimizer; as much of activations; mostly activations. The first is what the others grow from.
SMALLEST = Size(64, 96, 1, 256)
SIZES = [Size(768, 2048, 8, 256), Size(512, 1376, 8, 1024), Size(256, 688, 4, 4096)]


def predicted(workspace: dict[str, str], size: Size) -> float:
    """Bytes of a run in fp32 without the program itself; ``FIXED`` is a GPU's."""
    run = Run(
        language=LanguageConfig.from_folder(workspace["llama"]),
        vision=VisionConfig.from_folder(workspace["clip"]),
        connector=ConnectorConfig("dci"),
        trainable=("connector", "llm"),
        numbers=Numbers(4, 4, 8, shards_optimizer=True),
        positions=size.row,
        images=size.row / 30,
        stages=((size.layers,),),
        local_layers=True,
    )
    return stage_memory(run, 0).allocated


def measured(workspace: dict[str, str], size: Size, folder: Path) -> int:
    """Largest resident size of a training process of two steps, bytes."""
    more = {"packing": "best-fit", "seq_length": size.row, "model_max_length": 128, "global_batch_size": 1}
    more |= {"micro_batch_size": 1, "max_steps": 2, "save_strategy": "no", "report_to": "none", "log_images": 0}
    more |= {"output_dir": None, "index_folder": str(folder / "index")}
    flags = training_flags(workspace, folder, **more)
    environment = {**os.environ, "DC_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "1"}
    done = run_measured([sys.executable, "-m", "dc_megatron.pretrain", *flags], folder, ROOT, environment)
    assert done.status == 0, done.output[-3000:]
    return done.resident


def grown(root: Path, size: Size) -> tuple[float, int]:
    root.mkdir()
    shape = {"hidden": size.hidden, "intermediate": size.inner, "layers": size.layers}
    workspace = make_workspace(root, records=300, **shape)
    return predicted(workspace, size), measured(workspace, size, root)


@pytest.mark.long
def test_a_process_grows_as_predicted(tmp_path):
    planned, peak = grown(tmp_path / "smallest", SMALLEST)
    found = {}
    for size in SIZES:
        more_planned, more_peak = grown(tmp_path / f"{size.hidden}", size)
        found[size] = ((more_planned - planned) / 1e9, (more_peak - peak) / 1e9)
    report = json.dumps({str(size): pair for size, pair in found.items()}, indent=1)
    print(report)
    for ours, theirs in found.values():
        assert ours == pytest.approx(theirs, rel=TOLERANCE), report
