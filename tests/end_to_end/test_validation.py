"""A run that evaluates itself trains as one that does not, and its eval_loss is what tools/score.py says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.end_to_end.launch import TRAIN, metrics, run, torchrun, train_forked
from tests.helpers.workspace import training_flags

STEPS = 4
TIMES = ("step_seconds", "data_wait_seconds")
# (processes, flags); five held-out samples are no multiple of any batch.
LAYOUTS = {
    "DP2": (2, {"micro_batch_size": 1}),
    "TP2-SP": (2, {"tensor-model-parallel-size": 2, "sequence-parallel": True}),
    "PP2": (2, {"pipeline-model-parallel-size": 2, "micro_batch_size": 1}),
    "PP2-VPP2": (
        2,
        {
            "pipeline-model-parallel-size": 2,
            "num-virtual-stages-per-pipeline-rank": 2,
            "micro_batch_size": 1,
            # Not available with virtual stages.
            "log_images": 0,
        },
    ),
    "packed": (1, {"packing": "best-fit", "seq_length": 256, "global_batch_size": 2, "micro_batch_size": None}),
    "microbatch": (1, {"loss-reduction": "microbatch"}),
}


@pytest.fixture(scope="module")
def held_out(workspace, tmp_path_factory) -> str:
    records = json.loads(Path(workspace["data"]).read_text())[:5]
    for record in records:
        record["conversations"][1]["value"] += " It was held out."
    path = tmp_path_factory.mktemp("held-out") / "held_out.json"
    path.write_text(json.dumps(records))
    return str(path)


def train(workspace, output: Path, layout: str, **more) -> Path:
    processes, flags = LAYOUTS[layout]
    start = torchrun(processes) if processes > 1 else [sys.executable]
    recipe = {"max_steps": STEPS, "save_steps": STEPS, "log_images": 2, **flags, **more}
    train_forked([*start, *TRAIN, *training_flags(workspace, output, **recipe)], output / "logs")
    return output


def steps_and_evaluations(folder: Path) -> tuple[list[dict], list[dict]]:
    lines = metrics(folder)
    steps = [{k: v for k, v in line.items() if k not in TIMES} for line in lines if "loss" in line]
    return steps, [line for line in lines if "eval_loss" in line]


def scored(folder: Path, held_out: str, images: str, logs: Path) -> dict:
    words = ["--load", str(folder), "--data_path", held_out, "--image_folder", images, "--json"]
    done = run([sys.executable, "tools/score.py", *words], logs).assert_succeeded()
    return json.loads(done.output.splitlines()[-1])


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_leaves_training_alone_and_tells_the_score(workspace, held_out, tmp_path, layout):
    without = train(workspace, tmp_path / "without", layout)
    evaluated = {"eval_data_path": held_out, "eval_steps": 2}
    with_it = train(workspace, tmp_path / "with", layout, **evaluated)
    expected, none = steps_and_evaluations(without)
    steps, evaluations = steps_and_evaluations(with_it)
    assert (len(expected), none) == (STEPS, [])
    # To the last bit.
    assert steps == expected
    assert [line["iteration"] for line in evaluations] == [2, 4]
    assert all(line["eval_samples"] == 5 and line["eval_images"] == 3 for line in evaluations)
    total = scored(with_it, held_out, workspace["images"], tmp_path / "score")
    last = evaluations[-1]
    assert last["eval_supervised_tokens"] == total["supervised_tokens"]
    # Sums of fp32 in another order.
    assert last["eval_loss"] == pytest.approx(total["loss"], rel=2e-5)
    assert evaluations[0]["eval_loss"] != last["eval_loss"]


@pytest.mark.long
def test_a_resumed_run_evaluates_the_same_rows(workspace, held_out, tmp_path):
    evaluated = {"eval_data_path": held_out, "eval_steps": 2, "lr_scheduler_type": "constant", "save_steps": 2}
    whole = train(workspace, tmp_path / "whole", "DP2", **evaluated)
    train(workspace, tmp_path / "parts", "DP2", **evaluated, max_steps=2)
    parts = train(workspace, tmp_path / "parts", "DP2", **evaluated)
    losses = [[(e["iteration"], e["eval_loss"]) for e in steps_and_evaluations(f)[1]] for f in (whole, parts)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_evaluation_during_training(workspace, held_out, forked, tmp_path):
    """Of the long comparisons the one that every change should pass: an evaluation's loss, pictures and all."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {"eval_data_path": held_out, "eval_steps": 2, "eval-iters": 1, "max_steps": 2, "save_strategy": "no"}
    folder = tmp_path / "run"
    words = training_flags(workspace, folder, **{**LAYOUTS["DP2"][1], "log_images": 2, **flags})
    forked.run(words, 2, tmp_path / "logs").assert_succeeded()
    steps, evaluations = steps_and_evaluations(folder)
    assert [step["samples"] for step in steps] == [4, 4]
    (line,) = evaluations
    assert (line["iteration"], line["eval_samples"], line["eval_substituted_images"]) == (2, 4, 0)
    # Two steps from random weights: still close to the loss of a guess among all tokens.
    assert 4 < line["eval_loss"] < 8
    curves = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert next(event.step for event in curves.Scalars("lm loss validation")) == 2
    assert [event.step for event in curves.Images("samples/0")] == [2]
