"""Runs in which the tower learns and parts have rates of their own: metrics, checkpoint, exports, resume, chaining."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dc_megatron.errors import UserError
from dc_megatron.reports.checkpoint_report import examine
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.exporter import export_checkpoint
from dc_megatron.weights.projector_sources import refuse_other_tower
from dc_megatron.weights.tensor_reader import read_tensor
from dc_megatron.weights.torch_dist_tree import TorchDistTree
from dc_megatron.weights.views import PlainTensors
from tests.end_to_end.launch import TRAIN, metrics, torchrun, train_forked
from tests.helpers.workspace import training_flags

STEPS = 8
RATES = {"learning_rate": 1e-3, "mm_projector_lr": 1e-2, "vision_tower_lr": 1e-4}
RECIPE = {
    **RATES,
    "trainable": "connector,llm,vision_tower",
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.2,
    "max_steps": STEPS,
    "save_steps": STEPS // 2,
    "log_images": 0,
    "packing": "best-fit",
    "seq_length": 256,
    "global_batch_size": 2,
    "micro_batch_size": None,
}
# Too large for the gradients of the first steps; the first checkpoint is made before any step was taken.
SCALE = 2**14
HALF = {"fp16": True, "initial-loss-scale": SCALE, "save_steps": 2}


def train(workspace, output: Path, launcher: list[str], **more):
    flags = training_flags(workspace, output, **{**RECIPE, **more})
    return train_forked([*launcher, *TRAIN, *flags], output / "logs")


def stored_tower(folder: Path, iteration: int = STEPS) -> dict[str, torch.Tensor]:
    plain = PlainTensors(TorchDistTree(checkpoint_folder.iteration_folder(str(folder), iteration)))
    return {
        name.removeprefix("vision_tower."): read_tensor(plain, name)
        for name in plain.names()
        if name.startswith("vision_tower.")
    }


@pytest.fixture(scope="module")
def half(workspace, forked, tmp_path_factory) -> Path:
    """In fp16, on one process."""
    output = tmp_path_factory.mktemp("half") / "run"
    words = training_flags(workspace, output, **{**RECIPE, **HALF})
    done = forked.run(words, 1, output / "logs").assert_succeeded()
    assert "learning rates: connector 0.01, vision_tower 0.0001; all else 0.001" in done.output
    return output


@pytest.mark.long
def test_metrics_show_the_rate_of_every_part_and_the_steps_that_an_overflow_cost(half):
    lines = metrics(half)
    assert [line["iteration"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line["lr_connector"] == pytest.approx(10 * line["lr"])
        assert line["lr_vision_tower"] == pytest.approx(0.1 * line["lr"])
    skipped = [line["skipped"] for line in lines]
    scales = [line["loss_scale"] for line in lines]
    assert (scales[0], skipped[:2]) == (SCALE, [True, True])
    assert skipped[-1] is False
    assert scales[-1] < scales[0]
    # The schedule waits as long as the model does.
    assert lines[0]["lr"] == 0
    assert max(line["lr"] for line in lines) <= 1e-3


def test_the_checkpoint_holds_the_tower_that_was_trained(workspace, half):
    stored, published = stored_tower(half), load_file(f"{workspace['clip']}/model.safetensors")
    # Tiny CLIP has 6 layers, of which DCI reads 5.
    unread = {name for name in published if name.startswith(("encoder.layers.5.", "post_layernorm."))}
    assert set(stored) == {name.removeprefix("vision_model.") for name in published} - unread
    largest = max(float((stored[name] - published[name].half()).abs().max()) for name in stored)
    assert 1e-5 < largest < 0.1
    assert all(value.dtype == torch.float16 for value in stored.values())
    report = examine(str(half))
    assert report["model"]["vision_tower"]["trained"] is True


@pytest.mark.parametrize("format", ["llava", "hf-llava"])
def test_exports_carry_it(workspace, half, tmp_path, format):
    export_checkpoint(str(half), format, str(tmp_path / "export"))
    (file,) = (tmp_path / "export").glob("*.safetensors")
    prefix = {"llava": "model.vision_tower.vision_tower.vision_model.", "hf-llava": "vision_tower.vision_model."}[
        format
    ]
    written = {n.removeprefix(prefix): v for n, v in load_file(file).items() if n.startswith(prefix)}
    stored = stored_tower(half)
    assert [name for name, value in stored.items() if not torch.equal(written[name], value)] == []
    # What nobody reads is taken from the tower as it was published.
    published = load_file(f"{workspace['clip']}/model.safetensors")
    rest = written.keys() - stored.keys()
    assert "encoder.layers.5.mlp.fc1.weight" in rest
    assert all(torch.equal(written[name], published[name]) for name in rest)


def test_its_projector_is_of_no_use_without_it(workspace, half):
    with pytest.raises(UserError, match=r"trained together with its vision tower.*--load DIR --finetune"):
        refuse_other_tower(str(half), workspace["clip"])
    refuse_other_tower(str(half), workspace["clip"], trained_here=True)


@pytest.mark.long
@pytest.mark.parametrize("parts", ["connector,llm,vision_tower", "connector,vision_tower"])
def test_two_tensor_ranks_go_on_as_two_stages_and_the_tower_goes_into_the_next_run(workspace, tmp_path, parts):
    """With the language model the optimizer is Megatron's distributed one, without it the plain one."""
    whole, output, more = tmp_path / "whole", tmp_path / "run", {"trainable": parts, "gradient_checkpointing": True}
    train(workspace, whole, torchrun(2), **{"tensor-model-parallel-size": 2, "sequence-parallel": True}, **more)
    for name in ("hf", checkpoint_folder.iteration_folder("", STEPS // 2)):
        shutil.copytree(whole / name, output / name)
    train(workspace, output, torchrun(2), **{"pipeline-model-parallel-size": 2}, **more)
    expected = metrics(whole)[STEPS // 2 :]
    for ours, theirs in zip(metrics(output), expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5), ours["iteration"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), ours["iteration"]
        assert {n: v for n, v in ours.items() if n.startswith("lr")} == {
            n: v for n, v in theirs.items() if n.startswith("lr")
        }
    if "llm" not in parts:
        return
    # Frozen again, it is still the one that was trained, and still stored.
    frozen = {"trainable": "connector,llm", "vision_tower_lr": None, "max_steps": 1, "warmup_ratio": None}
    train(workspace, tmp_path / "next", [sys.executable], load=whole, finetune=True, **frozen)
    kept = stored_tower(tmp_path / "next", 1)
    assert all(torch.equal(kept[name], value) for name, value in stored_tower(whole).items())
    assert metrics(tmp_path / "next")[0]["loss"] < metrics(whole)[0]["loss"]
