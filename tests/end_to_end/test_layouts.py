"""Work divided over pipeline stages in other ways trains alike: layers by estimate, the head alone, images by all."""

from __future__ import annotations

import sys

import pytest

from tests.end_to_end.launch import TRAIN, metrics, torchrun, train_forked
from tests.helpers.workspace import training_flags

pytestmark = pytest.mark.long
RECIPE = {
    "packing": "best-fit",
    "seq_length": 256,
    "micro_batch_size": None,
    "global_batch_size": 2,
    "max_steps": 3,
    "save_strategy": "no",
    "log_images": 0,
}
STAGES = {"pipeline-model-parallel-size": 2}


def losses(workspace, output, launcher: list[str], **more) -> list[float]:
    words = training_flags(workspace, output, **RECIPE, **more)
    train_forked([*launcher, *TRAIN, *words], output / "logs")
    return [line["loss"] for line in metrics(output)]


def test_two_stages_train_as_one(workspace, tmp_path):
    expected = losses(workspace, tmp_path / "one", [sys.executable])
    by_estimate = losses(workspace, tmp_path / "auto", torchrun(2), **STAGES, **{"pipeline-split": "auto"})
    head_alone = losses(
        workspace, tmp_path / "head", torchrun(2), **STAGES, **{"pipeline-model-parallel-layout": "Etttt|L"}
    )
    all_encode = losses(workspace, tmp_path / "all", torchrun(2), **STAGES, **{"vision-tower-stages": "all"})
    assert all_encode == pytest.approx(expected, rel=1e-6)
    assert by_estimate == pytest.approx(expected, rel=1e-6)
    assert head_alone == pytest.approx(expected, rel=1e-6)
