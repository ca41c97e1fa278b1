"""--use-megatron-fsdp divides the weights over data-parallel ranks and changes nothing else: steps, trees, tools.

Losses are compared to 1e-5: gradients are added up in another order than by ``--use-distributed-optimizer``.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.torch_dist_tree import TorchDistTree
from tests.end_to_end.launch import TRAIN, metrics, torchrun, train_forked
from tests.helpers.workspace import training_flags

STEPS, SAVED = 6, 3
# Rows of one record in the order of the file, so that in most steps one rank has a picture and the other none.
RECIPE = {
    "max_steps": STEPS,
    "save_steps": SAVED,
    "log_images": 0,
    "micro_batch_size": 1,
    "global_batch_size": 2,
    "data_order": "sequential",
}
# Overlapped as on GPUs; small buckets and nothing gathered ahead, as it comes out for a large model.
FSDP = {
    "use-megatron-fsdp": True,
    "overlap-grad-reduce": True,
    "overlap-param-gather": True,
    "ddp-bucket-size": 1000,
    "suggested-communication-unit-size": 1,
}


def train(workspace, output: Path, processes: int = 2, **more) -> str:
    words = training_flags(workspace, output, **{**RECIPE, **more})
    return train_forked([*torchrun(processes), *TRAIN, *words], output / "logs").output


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in metrics(output)]


def tensors(output: Path, iteration: int) -> dict[str, torch.Tensor]:
    folder = checkpoint_folder.iteration_folder(output, iteration)
    stored = TorchDistTree(str(folder)).tensors
    read = {name: torch.empty(about.shape, dtype=about.dtype) for name, about in stored.items()}
    dcp.load(read, checkpoint_id=str(folder), no_dist=True)
    return read


def assert_same_trees(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, at=name: at + text)


def as_of_step(run: Path, output: Path) -> Path:
    """A copy of a finished run as it stood at its first checkpoint."""
    shutil.copytree(run, output)
    shutil.rmtree(checkpoint_folder.iteration_folder(output, STEPS))
    (output / "metrics.jsonl").unlink()
    return output


@pytest.fixture(scope="module")
def plain(workspace, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("plain") / "run"
    train(workspace, output)
    return output


@pytest.fixture(scope="module")
def divided(workspace, tmp_path_factory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("divided") / "run"
    return output, train(workspace, output, **FSDP)


def test_trains_and_saves_as_without(plain, divided):
    output, words = divided
    assert losses(output) == pytest.approx(losses(plain), rel=1e-5)
    assert_same_trees(tensors(output, STEPS), tensors(plain, STEPS))
    ours, theirs = (torch.load(run / "mm_projector.bin", weights_only=True) for run in (output, plain))
    assert_same_trees(ours, theirs)
    kept, whole = (int(number.replace(",", "")) for number in re.search(r"keeps ([\d,]+) of ([\d,]+)", words).groups())
    assert 0.45 < kept / whole < 0.55


def test_each_rank_writes_its_half_of_weights_and_moments(divided):
    output, _ = divided
    stored = TorchDistTree(str(checkpoint_folder.iteration_folder(output, STEPS))).tensors
    for kind in ("", "optimizer.state.param.", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."):
        written: dict[str, int] = {}
        for name, tensor in stored.items():
            if name.startswith(f"{kind}language_model."):
                for chunk in tensor.chunks:
                    count = written.get(chunk.region.file, 0)
                    written[chunk.region.file] = count + torch.Size(chunk.sizes).numel()
        assert len(written) == 2
        assert min(written.values()) / sum(written.values()) > 0.45
    # Not whole tensors dealt out: the rows of one are in two files.
    assert len({chunk.region.file for chunk in stored["language_model.output_layer.weight"].chunks}) == 2


def test_goes_on_where_it_was(workspace, divided, tmp_path):
    output = as_of_step(divided[0], tmp_path / "run")
    train(workspace, output, **FSDP)
    assert losses(output) == losses(divided[0])[SAVED:]


@pytest.mark.long
def test_goes_on_where_a_run_without_it_was_and_the_other_way_round(workspace, plain, divided, tmp_path):
    for name, first, flags in (("begins", plain, FSDP), ("ends", divided[0], {})):
        output = as_of_step(first, tmp_path / name)
        train(workspace, output, **flags)
        assert losses(output) == pytest.approx(losses(plain)[SAVED:], rel=1e-5)


CASES = {
    "stage 1": {"trainable": "connector"},
    "the tower learns": {"trainable": "connector,llm,vision_tower"},
    "packed rows, recomputed, several micro-batches": {
        "packing": "best-fit",
        "seq_length": 256,
        "micro_batch_size": None,
        "global_batch_size": 8,
        "gradient_checkpointing": "True",
    },
    "mean of means": {"loss_reduction": "microbatch", "global_batch_size": 4},
    "evaluated on the way": {"eval_data_path": "data", "eval_image_folder": "images", "eval_steps": 2},
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_other_runs_train_as_without(workspace, tmp_path, case):
    more = {name: workspace.get(value, value) if name in _PATHS else value for name, value in CASES[case].items()}
    for name, flags in (("plain", {}), ("divided", FSDP)):
        train(workspace, tmp_path / name, save_strategy="no", **more, **flags)
    for measured in ("loss", "grad_norm", "eval_loss"):
        found, expected = (
            [line[measured] for line in metrics(tmp_path / name) if measured in line] for name in ("divided", "plain")
        )
        assert found == pytest.approx(expected, rel=1e-5), measured


_PATHS = ("eval_data_path", "eval_image_folder")


@pytest.mark.long
def test_bf16_rounds_as_without_and_resumes(workspace, tmp_path):
    """Weights are rounded to bf16 in either run, and sums that differ in fp32 are rounded apart now and then."""
    more = {"bf16": "True"}
    train(workspace, tmp_path / "plain", **more)
    train(workspace, tmp_path / "divided", **more, **FSDP)
    assert losses(tmp_path / "divided") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
    found, expected = (tensors(tmp_path / name, SAVED) for name in ("divided", "plain"))
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in expected.items()}
    again = as_of_step(tmp_path / "divided", tmp_path / "again")
    train(workspace, again, **more, **FSDP)
    assert losses(again) == losses(tmp_path / "divided")[SAVED:]


@pytest.mark.long
def test_three_ranks_keep_uneven_rows(workspace, tmp_path):
    for name, flags in (("plain", {}), ("divided", FSDP)):
        train(workspace, tmp_path / name, 3, global_batch_size=6, **flags)
    assert losses(tmp_path / "divided") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert_same_trees(tensors(tmp_path / "divided", STEPS), tensors(tmp_path / "plain", STEPS))


@pytest.mark.long
def test_beside_tensor_parallelism(workspace, tmp_path):
    more = {"tensor-model-parallel-size": 2, "sequence-parallel": True}
    for name, flags in (("plain", {}), ("divided", FSDP)):
        train(workspace, tmp_path / name, 4, **more, **flags)
    assert losses(tmp_path / "divided") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert_same_trees(tensors(tmp_path / "divided", STEPS), tensors(tmp_path / "plain", STEPS))


@pytest.mark.long
def test_anyres_saved_behind_the_training(workspace, tmp_path):
    """image_newline is a parameter of the model itself; --async-save copies the rows that ranks keep."""
    more = {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": "[(28, 56), (56, 28), (56, 56)]",
        "model_max_length": 256,
    }
    train(workspace, tmp_path / "plain", **more)
    train(workspace, tmp_path / "divided", **more, **FSDP, **{"async-save": True})
    assert losses(tmp_path / "divided") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    for iteration in (SAVED, STEPS):
        assert_same_trees(tensors(tmp_path / "divided", iteration), tensors(tmp_path / "plain", iteration))
    ours, theirs = (torch.load(tmp_path / run / "mm_projector.bin", weights_only=True) for run in ("divided", "plain"))
    assert "model.image_newline" in ours
    assert_same_trees(ours, theirs)
