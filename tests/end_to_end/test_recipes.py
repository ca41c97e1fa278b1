"""The recipes of examples/ run as they are, on tiny models named through the environment."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dc_megatron.weights import checkpoint_folder
from tests.end_to_end.launch import ROOT, TRAIN, Finished, Launch, last_iteration, metrics, run, torchrun
from tests.helpers.workspace import training_flags

METRICS = {"iteration", "loss", "lr", "grad_norm", "supervised_tokens", "tokens", "images", "substituted_images"}
METRICS |= {"samples", "positions", "dropped_samples", "step_seconds", "data_wait_seconds"}
STEPS = 3


def launch_recipe(name: str, form: str, workspace, output: Path, *flags: str, steps: int = STEPS, **more) -> Launch:
    """``bash NAME`` or ``torchrun NAME``, from a folder that is not the repository."""
    path = str(ROOT / "examples" / name)
    command = ["bash", path] if form == "bash" else [*torchrun(2), path]
    words = {"MODEL": workspace["llama"], "VISION_TOWER": workspace["clip"], "DATA": workspace["data"]}
    words |= {"IMAGE_FOLDER": workspace["images"], "OUTPUT": str(output), "GLOBAL_BATCH_SIZE": "4"}
    words |= {"MODEL_MAX_LENGTH": "128", "SEQ_LENGTH": "256", "WORKERS": "1", "GPUS_PER_NODE": "2", **more}
    return Launch([*command, "--max_steps", str(steps), *flags], output / "logs", output.parent, **words)


def recipe(*what, **more) -> Finished:
    """``launch_recipe`` to its end."""
    with launch_recipe(*what, **more) as launch:
        return launch.finish()


def run_both_stages(forms: tuple[str, str], workspace, folder: Path, *flags: str, **more: str) -> tuple[Path, Path]:
    stage_1, stage_2 = folder / "stage_1", folder / "stage_2"
    first = recipe("pretrain_dc.sh", forms[0], workspace, stage_1, *flags, **more).assert_succeeded()
    assert "trained: connector\n" in first.output
    projector = {"PROJECTOR": str(stage_1 / "mm_projector.safetensors")}
    second = recipe("finetune_dc.sh", forms[1], workspace, stage_2, *flags, **{**more, **projector}).assert_succeeded()
    assert "trained: connector, llm\n" in second.output
    return stage_1, stage_2


def projector_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "mm_projector.safetensors", "pt") as file:
        assert file.metadata()["mm_dense_connector_type"] == "dci"
        assert file.metadata()["vision_family"] == "clip"
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert sorted(tensors) == [f"model.mm_projector.{part}" for part in ("0.bias", "0.weight", "2.bias", "2.weight")]
    stored = torch.load(folder / "mm_projector.bin", weights_only=True)
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    assert stored.keys() == tensors.keys()
    return tensors


def stored_names(folder: Path) -> set[str]:
    """First parts of the names of the tensors in a checkpoint, without the optimizer's."""
    from torch.distributed.checkpoint import FileSystemReader

    iteration = checkpoint_folder.iteration_folder(str(folder), STEPS)
    names = FileSystemReader(iteration).read_metadata().state_dict_metadata
    return {name.split(".")[0] for name in names if not name.startswith("optimizer")}


def check_folder(folder: Path, workspace, trained: str) -> None:
    """What DESIGN.md promises under "In --save DIR"."""
    assert checkpoint_folder.newest_complete(folder) == (STEPS, [])
    assert (folder / checkpoint_folder.TRACKER).read_text().strip() == str(STEPS)
    names = stored_names(folder)
    assert {"language_model", "connector"} <= names
    assert "vision_tower" not in names, "a frozen tower is recorded by its path and hash"
    description = checkpoint_folder.read_description(str(folder))
    assert description.vision_tower == workspace["clip"]
    assert description.vision_tower_hash == checkpoint_folder.hash_folder_weights(workspace["clip"])
    for path in ("config.json", "tokenizer.model", "tokenizer_config.json", "vision_tower/config.json"):
        assert (folder / "hf" / path).is_file(), path
    assert (folder / "hf" / "config.json").read_text() == (Path(workspace["llama"]) / "config.json").read_text()
    lines = metrics(folder)
    assert [line["iteration"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line.keys() == METRICS for line in lines)
    # As in the engine's log line, the rate is that of the next step: at the end the cosine has come down to 0.
    assert lines[0]["lr"] > lines[1]["lr"] > lines[2]["lr"] == 0.0
    resolved = json.loads((folder / "resolved_config.json").read_text())
    assert resolved["settings"]["trainable"] == trained.split(",")
    assert resolved["language"]["hidden_size"] == 64
    assert list(folder.glob("tensorboard/events.out.tfevents.*"))
    assert not list(folder.rglob("*.tmp")), "nothing half written is left"


def test_stage_2_takes_stage_1s_projector_and_both_leave_what_the_design_promises(workspace, tmp_path):
    """One recipe through bash and one through torchrun; the other way round is a long test."""
    stage_1, stage_2 = run_both_stages(("bash", "torchrun"), workspace, tmp_path)
    check_folder(stage_1, workspace, "connector")
    check_folder(stage_2, workspace, "connector,llm")
    learnt, further = projector_of(stage_1), projector_of(stage_2)
    changes = {name: (further[name].float() - learnt[name].float()).abs().max().item() for name in learnt}
    # Stage 2 starts from stage 1's projector: three steps at 2e-5 move no number far.
    assert 0 < max(changes.values()) < 1e-3


@pytest.mark.long
def test_the_recipes_the_other_way_round_and_over_pipeline_stages(workspace, tmp_path):
    parallel = {"TENSOR_PARALLEL": "1", "PIPELINE_PARALLEL": "2", "BF16": "False"}
    off = ("--sequence-parallel", "False")
    stage_1, stage_2 = run_both_stages(("torchrun", "bash"), workspace, tmp_path, *off, **parallel)
    check_folder(stage_1, workspace, "connector")
    check_folder(stage_2, workspace, "connector,llm")


@pytest.mark.long
def test_a_recipe_that_a_cluster_asks_to_stop_saves_and_goes_on_later(workspace, tmp_path):
    """Slurm sends SIGUSR1 to every process, torchrun included."""
    output = tmp_path / "run"
    what = ("pretrain_dc.sh", "bash", workspace, output)
    with launch_recipe(*what, steps=5000) as launch:
        launch.wait_until(lambda: last_iteration(output) >= STEPS, f"step {STEPS}")
        launch.signal_everyone(signal.SIGUSR1)
        launch.finish().assert_succeeded()
    stopped = last_iteration(output)
    assert checkpoint_folder.newest_complete(output) == (stopped, [])
    again = recipe(*what, steps=stopped + 2).assert_succeeded()
    assert f"resuming from iteration {stopped}" in again.output
    assert [line["iteration"] for line in metrics(output)] == list(range(1, stopped + 3))


def test_one_process_needs_no_launcher(workspace, tmp_path):
    words = training_flags(workspace, tmp_path / "run", max_steps=2, report_to="none")
    run([sys.executable, *TRAIN, *words], tmp_path / "logs").assert_succeeded()
    assert checkpoint_folder.newest_complete(tmp_path / "run") == (2, [])
    assert not (tmp_path / "run" / "tensorboard").exists()
