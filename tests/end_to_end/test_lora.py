"""Adapters through the engine: a killed run goes on, at another layout too, and the tools take the checkpoint."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.exporter import export_checkpoint
from tests.end_to_end.launch import ROOT, TRAIN, Launch, last_iteration, metrics, run, torchrun, train_forked
from tests.end_to_end.test_resume import assert_same_steps
from tests.helpers.workspace import training_flags

STEPS, SAVE_STEPS = 16, 4
# The schedule is constant, so that steps do not depend on how many there will be.
RECIPE = {
    "packing": "best-fit",
    "seq_length": 256,
    "micro_batch_size": None,
    "global_batch_size": 2,
    "trainable": None,
    "lora_enable": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "lr_scheduler_type": "constant",
    "learning_rate": 2e-3,
    "save_steps": SAVE_STEPS,
    "log_images": 0,
}
TP2, PP2 = {"tensor-model-parallel-size": 2}, {"pipeline-model-parallel-size": 2}


def command(workspace, output: Path, **more) -> list[str]:
    return [*torchrun(2), *TRAIN, *training_flags(workspace, output, **{**RECIPE, "max_steps": STEPS, **more})]


def copy_of_an_early_save(source: Path, target: Path) -> None:
    """What ``source`` would have left, had it been killed soon after its first checkpoint."""
    for name in ("hf", checkpoint_folder.iteration_folder("", SAVE_STEPS)):
        shutil.copytree(source / name, target / name)
    shutil.copy(source / "metrics.jsonl", target)


@pytest.fixture(scope="module")
def killed(workspace, tmp_path_factory) -> Path:
    """A run with dropout that a SIGKILL ended after its 16th step."""
    output = tmp_path_factory.mktemp("lora") / "run"
    with Launch(command(workspace, output, **TP2, max_steps=5000), output / "logs") as launch:
        launch.wait_until(lambda: last_iteration(output) >= STEPS, f"step {STEPS}")
        launch.kill()
    return output


@pytest.mark.long
def test_a_killed_run_goes_on_bit_for_bit(workspace, killed, tmp_path):
    output = tmp_path / "run"
    copy_of_an_early_save(killed, output)
    resumed = train_forked(command(workspace, output, **TP2), output / "logs")
    assert f"resuming from iteration {SAVE_STEPS} of {output}" in resumed.output
    assert "trained: connector, lora" in resumed.output
    assert_same_steps(output, killed, SAVE_STEPS, STEPS)
    found = metrics(output)
    assert found[0]["loss"] - found[-1]["loss"] > 0.3
    tree = Path(checkpoint_folder.iteration_folder(output, STEPS))
    base = Path(workspace["llama"]) / "model.safetensors"
    described = checkpoint_folder.read_description(str(output))
    assert described.language_model == workspace["llama"]
    assert set(described.language_model_files) == {base.name}
    # Adapters, connector and both moments of Adam, with the names of their tensors: the language model is not there.
    numbers = sum(value.numel() for value in load_file(output / "mm_projector.safetensors").values()) + 14848
    assert sum(path.stat().st_size for path in tree.glob("*.distcp")) < 4 * 3 * numbers + 2_000_000


@pytest.mark.long
def test_what_it_was_trained_on_and_with_is_refused_if_it_changed(workspace, killed, tmp_path):
    output = tmp_path / "run"
    copy_of_an_early_save(killed, output)
    words = training_flags(workspace, output, **{**RECIPE, "max_steps": STEPS, "lora_alpha": 16})
    refused = run([sys.executable, *TRAIN, *words], tmp_path / "alpha")
    refused.assert_refused("--lora_r 4 --lora_alpha 16", "was trained with --lora_r 4 --lora_alpha 8")
    base = shutil.copytree(workspace["llama"], tmp_path / "llama")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    words = training_flags(workspace, output, **{**RECIPE, "max_steps": STEPS, "model_name_or_path": str(base)})
    refused = run([sys.executable, *TRAIN, *words], tmp_path / "base")
    refused.assert_refused(f"--model_name_or_path {base}", "not those that the adapters in", "model.safetensors")
    assert checkpoint_folder.newest_complete(output) == (SAVE_STEPS, [])


@pytest.mark.long
def test_two_tensor_ranks_go_on_as_two_stages(workspace, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "run"
    more = {"lora_dropout": 0.0}  # masks are drawn for a layout
    train_forked(command(workspace, whole, **TP2, **more), whole / "logs")
    copy_of_an_early_save(whole, output)
    train_forked(command(workspace, output, **PP2, **more), output / "logs")
    for ours, theirs in zip(metrics(output), metrics(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5), ours["iteration"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5), ours["iteration"]


@pytest.mark.long
def test_scores_of_the_checkpoint_and_of_the_merged_model_agree(workspace, killed, tmp_path):
    def score(name: str, *words: str, launcher=(sys.executable,)) -> float:
        data = ["--data_path", workspace["data"], "--image_folder", workspace["images"], "--json"]
        done = run([*launcher, "tools/score.py", *data, *words], tmp_path / name, cwd=ROOT).assert_succeeded()
        return json.loads(done.output.splitlines()[-1])["loss"]

    unmerged = score("one", "--load", str(killed))
    two = score("two", "--load", str(killed), "--tensor_model_parallel_size", "2", launcher=torchrun(2))
    merged, peft = tmp_path / "merged", tmp_path / "peft"
    export_checkpoint(str(killed), "hf", str(merged))
    export_checkpoint(str(killed), "peft", str(peft))
    parts = ["--vision_tower", workspace["clip"], "--mm_dense_connector_type", "dci", "--version", "v1"]
    parts += ["--pretrain_mm_mlp_adapter", str(peft / "non_lora_trainables.bin")]
    assert unmerged == pytest.approx(two, abs=1e-5)
    assert unmerged == pytest.approx(score("merged", "--model_name_or_path", str(merged), *parts), abs=1e-5)
