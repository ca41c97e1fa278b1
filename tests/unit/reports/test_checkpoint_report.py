"""What the report says of every kind of folder, and that no flipped bit escapes it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from dc_megatron.config import ConnectorConfig, VisionConfig
from dc_megatron.errors import UserError
from dc_megatron.reports.checkpoint_report import examine
from dc_megatron.reports.checkpoint_text import as_text
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.durable_files import PartialFolder
from dc_megatron.weights.exporter import export_checkpoint
from dc_megatron.weights.importer import import_checkpoint
from dc_megatron.weights.manifest import MANIFEST
from dc_megatron.weights.projector_files import projector_shapes, write_projector
from dc_megatron.weights.staged_iteration import StagedIteration
from tests.helpers.data_files import sentencepiece_tokenizer
from tests.helpers.tiny_models import tiny_clip, tiny_llama

ROOT = Path(__file__).resolve().parents[3]
POSITION = {
    "plan_hash": "plan",
    "consumed_samples": 16,
    "consumed_tokens": {"processed": 900, "supervised": 300},
    "global_batch_size": 4,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """hf (text model), clip, imported, training (two iterations), export."""
    root = tmp_path_factory.mktemp("made")
    tiny_llama(root / "hf", layers=2)
    sentencepiece_tokenizer(root / "hf")
    tiny_clip(root / "clip")
    import_checkpoint(str(root / "hf"), str(root / "imported"))
    os.makedirs(root / "training")
    for iteration in (4, 8):
        save(root, iteration)
    export_checkpoint(str(root / "imported"), "hf", str(root / "export"))
    return root


def save(root: Path, iteration: int) -> None:
    """An iteration of ``root``/training with the imported tree's tensors."""
    staged = StagedIteration(str(root / "training"), iteration, "a")
    staged.begin()
    shutil.copytree(root / "imported" / "release", staged.path)
    os.remove(os.path.join(staged.path, MANIFEST))
    vision = VisionConfig.from_folder(str(root / "clip"))
    description = checkpoint_folder.CheckpointDescription(
        vision.path, checkpoint_folder.hash_folder_weights(vision.path), "dci", "mlp2x_gelu", -2, "v1", "pad", 128
    )
    checkpoint_folder.write_side_files(str(root / "training"), str(root / "hf"), description)
    staged.publish(POSITION, staged.digests_of_rank(0))


@pytest.fixture
def copy(made, tmp_path):
    """``copy(name)``: a copy of what ``made`` has, to be damaged."""
    return lambda name: shutil.copytree(made / name, tmp_path / name)


def run_tool(capsys, *argv: str) -> tuple[int, str, str]:
    specification = importlib.util.spec_from_file_location(
        "inspect_checkpoint", ROOT / "tools" / "inspect_checkpoint.py"
    )
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    status = tool.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_training_checkpoint(made):
    report = examine(str(made / "training"), check=True)
    assert (report["kind"], report["complete"], report["verified"]) == ("training", True, True)
    assert (report["problems"], report["notes"]) == ([], [])
    assert [entry["name"] for entry in report["checkpoints"]] == ["iter_0000004", "iter_0000008"]
    newest = report["checkpoints"][-1]
    assert (newest["iteration"], newest["consumed_samples"]) == (8, 16)
    assert newest["consumed_tokens"] == {"processed": 900, "supervised": 300}
    model = report["model"]
    assert (model["family"], model["layers"], model["hidden_size"], model["vocabulary"]) == ("llama", 2, 64, 256)
    assert (model["connector"], model["template"], model["model_max_length"]) == ("dci", "v1", 128)
    assert model["vision_tower"]["family"] == "clip"
    shapes = {tensor["name"]: tensor["shape"] for tensor in report["tensors"]}
    # Layers are stacked; the layout that wrote them does not show.
    assert shapes["language_model.decoder.layers.self_attention.linear_proj.weight"] == [2, 64, 64]
    assert model["parameters"] == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert [part["name"] for part in report["parts"]] == ["language_model"]


def test_one_iteration_by_its_own_folder(made):
    report = examine(str(made / "training" / "iter_0000004"), check=True)
    assert (report["kind"], report["verified"], report["problems"]) == ("tree", True, [])
    assert report["checkpoints"][0]["iteration"] == 4
    assert report["model"]["connector"] == "dci"


def test_a_converted_model(made):
    report = examine(str(made / "imported"), check=True)
    assert (report["kind"], report["verified"], report["problems"], report["notes"]) == ("import", True, [], [])
    assert report["checkpoints"][0]["source"] == "hf"
    assert report["model"]["connector"] is None
    assert "a language model alone" in as_text(report)


def test_an_export(made):
    report = examine(str(made / "export"), check=True)
    assert (report["kind"], report["verified"], report["problems"]) == ("hf", True, [])
    assert "exported by tools/convert.py" in report["title"]
    assert report["model"]["layers"] == 2


def test_folders_of_others(made):
    report = examine(str(made / "hf"), check=True)
    assert (report["kind"], report["complete"], report["verified"]) == ("hf", True, None)
    assert "no hashes to compare with" in report["notes"][0]
    assert report["model"]["vocabulary"] == 256
    tower = examine(str(made / "clip"))
    assert tower["kind"] == "vision tower"
    assert tower["model"]["vision_tower"]["family"] == "clip"


@pytest.mark.parametrize("name", ["mm_projector.safetensors", "mm_projector.bin"])
def test_a_projector_file(made, tmp_path, name):
    vision, connector = VisionConfig.from_folder(str(made / "clip")), ConnectorConfig("sci")
    tensors = {key: torch.zeros(shape) for key, shape in projector_shapes(connector, vision, 64).items()}
    write_projector(str(tmp_path), tensors, connector, vision)
    report = examine(str(tmp_path / name))
    assert (report["kind"], report["complete"], len(report["tensors"])) == ("projector", True, 4)
    if name.endswith(".safetensors"):
        assert report["model"]["connector"] == "sci"
    else:
        assert "does not say" in report["notes"][0]
    # The folder of stage 1 as LLaVA leaves it.
    assert examine(str(tmp_path))["kind"] == "projector"


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["iter_0000005/mp_rank_00/model_optim_rng.pt"], "mp_rank"),
        (["iter_0000005/.metadata", "iter_0000005/__0_0.distcp"], "fsdp_dtensor"),
        (["release/mp_rank_00/model_optim_rng.pt"], "mp_rank"),
    ],
)
def test_trees_of_other_programs(tmp_path, files, kind):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("x")
    for path in (tmp_path, (tmp_path / files[0]).parents[0 if kind == "fsdp_dtensor" else 1]):
        report = examine(str(path))
        assert (report["kind"], report["complete"]) == (kind, None)
        assert "tools/convert.py import --hf DIR --save DIR" in report["notes"][0]


def test_a_torch_dist_tree_of_plain_megatron(copy):
    folder = copy("training")
    shutil.rmtree(folder / "hf")
    for iteration in (4, 8):
        (folder / f"iter_{iteration:07d}" / MANIFEST).unlink()
    for path in (folder, folder / "iter_0000008"):
        report = examine(str(path))
        assert report["kind"] == "torch_dist"
        assert report["tensors"]
        assert "tools/convert.py import" in report["notes"][0]


def test_a_save_and_a_conversion_that_did_not_end(copy, tmp_path):
    folder = copy("training")
    (folder / ".saving-iter_0000012.1f2e" / "iter_0000012").mkdir(parents=True)
    report = examine(str(folder), check=True)
    assert (report["verified"], report["problems"]) == (True, [])
    assert ".saving-iter_0000012.1f2e: a save that is going on or was cut off" in report["notes"][0]
    assert examine(str(folder / ".saving-iter_0000012.1f2e"))["complete"] is False
    with PartialFolder(str(tmp_path / "out"), "plan") as partial:
        partial.write("one", b"1" * 2_000_000)
    unfinished = examine(str(tmp_path / "out.partial"))
    assert unfinished["kind"] == "partial"
    assert "1 files with 0.00 GB are finished; the same command goes on" in unfinished["problems"][0]


def test_an_odd_tracker_is_noted_and_changes_nothing(copy):
    folder = copy("training")
    (folder / checkpoint_folder.TRACKER).write_bytes(b"\xff\0")
    report = examine(str(folder))
    assert report["problems"] == []
    assert "the newest complete tree is iter_0000008" in report["notes"][0]


@pytest.mark.parametrize(
    ("name", "tree"), [("training", "iter_0000008"), ("imported", "release"), ("export", "")], ids=str
)
def test_one_flipped_bit_in_any_file_is_reported_with_its_name(copy, name, tree, capsys):
    folder = copy(name)
    files = [path for path in (folder / tree).rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert MANIFEST in names
    assert tree == "" or {".metadata", "metadata.json", "__0_0.distcp"} <= names
    for path in files:
        size = path.stat().st_size
        for bit in {0, 8 * size // 2 + 3, 8 * size - 1}:
            flip(path, bit)
            report = examine(str(folder), check=True)
            named = [problem for problem in report["problems"] if str(path.relative_to(folder)) in problem]
            named += [problem for problem in report["problems"] if f"{tree}: {path.name}" in problem]
            assert named, (path, bit, report["problems"])
            assert not report["verified"]
            flip(path, bit)
    # Nothing is left of it, and the exit status tells.
    assert run_tool(capsys, folder, "--check")[0] == 0
    flip(files[-1], 5)
    status, out, _ = run_tool(capsys, folder, "--check")
    assert status == 1
    assert f"{files[-1].name}" in out


def test_a_tower_that_the_folder_carries_is_compared_with_its_recorded_hash(copy, made):
    folder = copy("imported")
    (folder / "hf" / "vision_tower").mkdir(exist_ok=True)
    weights = shutil.copy(made / "clip" / "model.safetensors", folder / "hf" / "vision_tower")
    description = folder / "hf" / checkpoint_folder.DESCRIPTION
    recorded = {"vision_tower_hash": checkpoint_folder.hash_folder_weights(str(made / "clip"))}
    description.write_text(json.dumps({**json.loads(description.read_text()), **recorded}))
    assert examine(str(folder), check=True)["problems"] == []
    flip(Path(weights), 8 * 3000)
    problems = examine(str(folder), check=True)["problems"]
    assert problems == ["hf/vision_tower: its weights are not those that were written"]


def test_a_lost_file_and_a_cut_one_need_no_check(copy):
    folder = copy("training")
    os.truncate(folder / "iter_0000004" / "__0_0.distcp", 100)
    (folder / "iter_0000008" / "metadata.json").unlink()
    report = examine(str(folder))
    assert report["complete"] is False
    first, second = report["problems"]
    assert first.startswith("iter_0000004: __0_0.distcp has 100 bytes instead of")
    assert second == "iter_0000008: metadata.json is missing"


def test_the_tool_prints_lines_or_one_object(made, capsys):
    status, out, err = run_tool(capsys, made / "training", "--check")
    assert (status, err) == (0, "")
    assert "iter_0000008: complete" in out
    assert "900 tokens (300 supervised)" in out
    assert out.rstrip().endswith("complete; every file is as it was written")
    assert "linear_proj" not in out
    assert "linear_proj" in run_tool(capsys, made / "training", "--tensors")[1]
    report = json.loads(run_tool(capsys, made / "training", "--json")[1])
    assert report["kind"] == "training"
    assert "tensors" not in report
    assert json.loads(run_tool(capsys, made / "training", "--json", "--tensors")[1])["tensors"]


def test_bad_use_ends_with_status_2_and_one_line(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "notes.txt"):
        status, out, err = run_tool(capsys, path)
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_what_is_known_to_be_nothing_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint, model or projector that is known here"):
        examine(str(tmp_path))
