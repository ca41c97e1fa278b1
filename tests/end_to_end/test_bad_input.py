"""What a user can get wrong is refused with one message and a status that is not 0, in seconds and on all ranks."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dc_megatron.config import ConnectorConfig, VisionConfig
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.durable_files import Digest
from dc_megatron.weights.manifest import write_manifest
from dc_megatron.weights.projector_files import projector_shapes, write_projector
from tests.end_to_end.launch import TRAIN, Finished, run, torchrun
from tests.helpers.tiny_models import tiny_siglip
from tests.helpers.workspace import training_flags

# Far above what a refusal takes on a free machine, and far below Gloo's time-out of ten minutes.
AT_ONCE, SECONDS = 20, 90


def plain(workspace, folder: Path, world_size: int = 1, **more) -> Finished:
    """``python -m dc_megatron.pretrain`` without torchrun; ``world_size`` only tells it what torchrun would."""
    words = training_flags(workspace, folder / "run", **more)
    told = {"WORLD_SIZE": str(world_size)} if world_size > 1 else {}
    return run([sys.executable, *TRAIN, *words], folder / "logs", SECONDS, **told)


def on_two_ranks(workspace, folder: Path, **more) -> Finished:
    more = {"tensor-model-parallel-size": 2, **more}
    words = training_flags(workspace, folder / "run", **more)
    return run([*torchrun(2), *TRAIN, *words], folder / "logs", SECONDS)


# What flags and small files tell: refused before torch is imported.

TYPED = {
    "a missing model folder": ({"model_name_or_path": "nowhere"}, ["--model_name_or_path nowhere", "no such folder"]),
    "a missing tower folder": ({"vision_tower": "nowhere"}, ["--vision_tower nowhere", "no such folder"]),
    "a missing data file": ({"data_path": "nowhere.json"}, ["--data_path nowhere.json", "no such file"]),
    "a missing image folder": ({"image_folder": "nowhere"}, ["--image_folder nowhere", "no such folder"]),
    "a missing projector": (
        {"pretrain_mm_mlp_adapter": "nowhere.bin"},
        ["--pretrain_mm_mlp_adapter nowhere.bin", "no such file"],
    ),
    "an unknown template": ({"version": "vicuna_v2"}, ["--version vicuna_v2", "unknown", "v1", "llama_3_chat"]),
    "an unknown connector": (
        {"mm_dense_connector_type": "dcj"},
        ["--mm_dense_connector_type dcj", "did you mean 'dci'", "sti, sci, dci, none"],
    ),
    "an unknown flag": ({"lerning_rate": 1}, ["--lerning_rate", "did you mean '--learning_rate'"]),
    "ranks that divide neither heads nor groups": (
        {"tensor-model-parallel-size": 3},
        ["--tensor-model-parallel-size 3", "8 attention heads", "4 key-value heads", "values that do: 1, 2, 4"],
    ),
    "ranks that divide heads but not groups": (
        {"tensor-model-parallel-size": 8},
        ["--tensor-model-parallel-size 8", "values that do: 1, 2, 4"],
    ),
    "stages that do not divide the layers": (
        {"pipeline-model-parallel-size": 3},
        ["--pipeline-model-parallel-size 3", "4 layers", "values that do: 1, 2, 4", "--decoder-first-pipeline"],
    ),
    "a layout that does not divide the processes": (
        {"tensor-model-parallel-size": 4},
        ["2 processes", "--tensor-model-parallel-size 4"],
    ),
    "two batch sizes": (
        {"global_batch_size": 6, "per_device_train_batch_size": 2},
        ["--global-batch-size 6 contradicts", "--per_device_train_batch_size 2", "= 4"],
    ),
    "a batch that its parts do not divide": (
        {"global_batch_size": 6, "micro_batch_size": 2},
        ["--global-batch-size 6", "not divisible", "micro batch sizes that do: 1, 3"],
    ),
    "two precisions": ({"bf16": True, "fp16": True}, ["--bf16", "--fp16"]),
    "two opinions on what learns": (
        {"trainable": "connector,llm", "tune_mm_mlp_adapter": True},
        ["--trainable connector,llm contradicts --tune_mm_mlp_adapter"],
    ),
    "a flag of a later version": ({"bits": 4}, ["--bits 4", "not available yet"]),
    "adapters and the whole model": ({"lora_enable": True}, ["--trainable connector,llm contradicts --lora_enable"]),
    "a missing checkpoint folder": ({"load": "nowhere"}, ["--load nowhere", "no such folder"]),
}


@pytest.mark.parametrize("case", TYPED)
def test_a_wrong_flag_is_refused_at_once(case, workspace, tmp_path):
    more, words = TYPED[case]
    done = plain(workspace, tmp_path, world_size=2, **more)
    done.assert_refused(*words)
    assert done.status == 2
    assert done.seconds < AT_ONCE
    assert not (tmp_path / "run").exists(), "a run that was refused leaves no folder"


@pytest.mark.parametrize("tracker", ["5", "", "rubbish", None])
@pytest.mark.parametrize("kind", ["empty", "incomplete"])
def test_nothing_to_load_is_refused_at_once(kind, tracker, workspace, tmp_path):
    """Whatever the tracker says: the engine ends with status 0, or trains from random weights."""
    source = tmp_path / "source"
    (source / "hf").mkdir(parents=True)
    if tracker is not None:
        (source / checkpoint_folder.TRACKER).write_text(tracker)
    if kind == "incomplete":
        (source / "hf" / checkpoint_folder.DESCRIPTION).write_text("{}")
        iteration = Path(checkpoint_folder.iteration_folder(source, 5))
        iteration.mkdir()
        write_manifest(str(iteration), {}, {"__0_0.distcp": Digest(10, "0" * 16)})
    done = plain(workspace, tmp_path, load=str(source)).assert_refused(f"--load {source}", "no complete checkpoint")
    assert ("iter_0000005: __0_0.distcp is missing" in done.messages[0]) == (kind == "incomplete")
    assert done.status == 2
    assert done.seconds < AT_ONCE


def test_a_tree_of_plain_megatron_is_refused_with_what_to_do(workspace, tmp_path):
    iteration = tmp_path / "source" / "iter_0000005"
    iteration.mkdir(parents=True)
    (iteration / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    done = plain(workspace, tmp_path, load=str(tmp_path / "source"))
    done.assert_refused(
        f"--load {tmp_path / 'source'}", "torch_dist tree of another program", "tools/convert.py import"
    )
    assert done.status == 2


def test_a_config_that_is_no_json_is_named(workspace, tmp_path):
    model = shutil.copytree(workspace["llama"], tmp_path / "llama")
    (model / "config.json").write_text('{"model_type": "llama",')
    plain(workspace, tmp_path, model_name_or_path=model).assert_refused("config.json is not valid JSON")


# What the headers of weights and projectors tell, and the data file: refused before the engine is imported.


def changed_config(workspace, folder: Path, which: str, **values) -> str:
    target = shutil.copytree(workspace[which], folder / which)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **values}))
    return str(target)


def without_tensor(workspace, folder: Path, which: str, name: str) -> str:
    target = shutil.copytree(workspace[which], folder / which)
    path = target / "model.safetensors"
    tensors = load_file(path)
    found = [key for key in tensors if key.endswith(name)]
    assert len(found) == 1, sorted(tensors)
    save_file({key: value for key, value in tensors.items() if key not in found}, path, metadata={"format": "pt"})
    return str(target)


def projector(workspace, folder: Path, kind: str, tower: str | None = None, **recorded) -> Path:
    """Both projector files of a connector of type ``kind``; returns the folder."""
    vision, connector = VisionConfig.from_folder(tower or workspace["clip"]), ConnectorConfig(kind)
    tensors = {name: torch.zeros(shape) for name, shape in projector_shapes(connector, vision, 64).items()}
    write_projector(str(folder), tensors, connector, vision, **recorded)
    return folder


def test_config_and_weights_that_disagree_are_refused_on_all_ranks(workspace, tmp_path):
    """Through torchrun: one message for two ranks, and torchrun ends with them."""
    model = changed_config(workspace, tmp_path, "llama", hidden_size=128, head_dim=8)
    done = on_two_ranks(workspace, tmp_path, model_name_or_path=model)
    done.assert_refused("error: --model_name_or_path", "shape", "64", "128")


def test_broken_json_is_refused_on_all_ranks_with_file_and_line(workspace, tmp_path):
    """Only local rank 0 reads the file: the other one has to hear of it."""
    data = tmp_path / "broken.jsonl"
    data.write_text('{"id": 1, "conversations": []}\n\n{"id": 2,\n')
    done = on_two_ranks(workspace, tmp_path, data_path=data)
    done.assert_refused("error: --data_path", f"{data}: line 3", "not valid JSON")


@pytest.mark.parametrize(("which", "name"), [("llama", "layers.1.mlp.up_proj.weight"), ("clip", "class_embedding")])
def test_a_missing_tensor_is_named(which, name, workspace, tmp_path):
    flag = {"llama": "model_name_or_path", "clip": "vision_tower"}[which]
    broken = without_tensor(workspace, tmp_path, which, name)
    plain(workspace, tmp_path, **{flag: broken}).assert_refused(f"--{flag} {broken}", name)


def test_a_tower_whose_config_disagrees_is_refused(workspace, tmp_path):
    tower = changed_config(workspace, tmp_path, "clip", image_size=42)
    plain(workspace, tmp_path, vision_tower=tower).assert_refused("--vision_tower", "position_embedding")


def test_a_projector_of_another_connector_is_refused_though_its_shape_fits(workspace, tmp_path):
    path = projector(workspace, tmp_path, "sci") / "mm_projector.safetensors"
    done = plain(workspace, tmp_path, pretrain_mm_mlp_adapter=path)
    done.assert_refused(f"--pretrain_mm_mlp_adapter {path}", "--mm_dense_connector_type sci, not dci")


def test_a_projector_of_another_tower_is_refused(workspace, tmp_path):
    path = projector(workspace, tmp_path, "dci", tiny_siglip(tmp_path / "siglip"))
    done = plain(workspace, tmp_path, pretrain_mm_mlp_adapter=path)
    done.assert_refused("--pretrain_mm_mlp_adapter", "another vision tower", "siglip")


def test_a_projector_of_a_tower_with_other_weights_is_refused(workspace, tmp_path):
    folder = projector(workspace, tmp_path, "dci", tower_hash="0123456789abcdef")
    done = plain(workspace, tmp_path, pretrain_mm_mlp_adapter=folder)
    done.assert_refused(
        "--pretrain_mm_mlp_adapter", "another vision tower (clip, hash 0123456789abcdef)", "weights differ"
    )


def test_a_bare_bin_projector_needs_the_type_named(workspace, tmp_path):
    path = projector(workspace, tmp_path, "dci") / "mm_projector.bin"
    words = training_flags(workspace, tmp_path / "run", pretrain_mm_mlp_adapter=path)
    position = words.index("--mm_dense_connector_type")
    del words[position : position + 2]
    done = run([sys.executable, *TRAIN, *words], tmp_path / "logs", SECONDS)
    done.assert_refused(f"--pretrain_mm_mlp_adapter {path}", "name it with --mm_dense_connector_type")


def test_what_the_engine_refuses_is_said_in_its_words(workspace, tmp_path):
    done = plain(workspace, tmp_path, **{"recompute-granularity": "full"})
    done.assert_refused("Megatron refuses these flags", "recompute")
