"""A checkpoint of adapters: small, read at any layout, exported for PEFT and merged, and true to one base only."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dc_megatron.config import ConnectorConfig, LanguageConfig, LoraConfig, VisionConfig
from dc_megatron.errors import UserError
from dc_megatron.inference.source import Source, resolve
from dc_megatron.weights.exporter import export_checkpoint
from dc_megatron.weights.peft_files import PeftFactors
from dc_megatron.weights.projector_files import read_projector
from dc_megatron.weights.torch_dist_tree import TorchDistTree
from dc_megatron.weights.verify import verify
from tests.multirank import parity
from tests.multirank.job import Job
from tests.multirank.lora_jobs import make_folders, make_job

WORKER = "tests.multirank.lora_worker"


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    return make_job(make_folders(tmp_path_factory.mktemp("models")), tensor=2)


@pytest.fixture(scope="module")
def checkpoint(workers, job, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "run"
    workers.run(f"{WORKER}:save", 2, job, str(folder))
    return folder


@pytest.fixture(scope="module")
def exports(checkpoint, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for kind in ("peft", "hf", "llava"):
        export_checkpoint(str(checkpoint), kind, str(root / kind))
    return {path.name: path for path in root.iterdir()}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(torch.arange(3, 90)[None]).logits


def text_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_the_tree_holds_adapters_and_connector_and_no_language_model(checkpoint, job):
    tree = TorchDistTree(str(checkpoint / "iter_0000004"))
    assert {name.split(".")[0] for name in tree.tensors} == {"lora", "connector"}
    assert {name.removeprefix("lora.") for name in tree.tensors if name.startswith("lora.")} == job.lora_state.keys()


@pytest.mark.parametrize("from_peft", [False, True], ids=["checkpoint", "lora_weight_path"])
def test_what_two_tensor_ranks_saved_is_read_at_another_layout(workers, checkpoint, exports, job, from_peft):
    layout = {"tensor": 2} if from_peft else {"tensor": 1, "pipeline": 2}
    other = replace(job, lora_state={}, **layout)
    results = workers.run(f"{WORKER}:load", 2, other, str(checkpoint), str(exports["peft"]) if from_peft else "")
    found = parity.merge(other, results, "parameters")
    for name, value in job.lora_state.items():
        assert torch.equal(found[f"lora.{name}"], value), name
    base = load_file(Path(job.language_folder) / "model.safetensors")
    assert all(torch.equal(found[name], base[name]) for name in base), "the base is that of its folder"


def test_peft_loads_the_adapter_and_merged_equals_unmerged(exports, job):
    import peft

    adapted = peft.PeftModel.from_pretrained(text_model(job.language_folder), exports["peft"])
    state = adapted.state_dict()
    for name, value in job.lora_state.items():
        assert torch.equal(state[f"base_model.model.{name}".replace(".weight", ".default.weight")], value), name
    unmerged, merged = logits(adapted), logits(text_model(exports["hf"]))
    assert (unmerged - logits(text_model(job.language_folder))).abs().max() > 0.1, "the adapters do something"
    # fp32: the merged weight is rounded once, and sums run in another order.
    assert (unmerged - merged).abs().max() <= 1e-5
    assert (logits(adapted.merge_and_unload()) - merged).abs().max() <= 1e-5


def test_what_was_trained_besides_goes_in_llavas_layout(exports, checkpoint, job):
    vision, connector = VisionConfig.from_folder(job.vision_folder), ConnectorConfig("dci")
    found, _ = read_projector(str(exports["peft"] / "non_lora_trainables.bin"), connector, vision, 64)
    assert all(torch.equal(found[name], value) for name, value in job.connector_state.items())
    names = torch.load(exports["peft"] / "non_lora_trainables.bin", weights_only=True)
    assert set(names) == {
        f"base_model.model.model.mm_projector.{part}" for part in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    config = json.loads((exports["peft"] / "config.json").read_text())
    assert (config["model_type"], config["mm_dense_connector_type"]) == ("llava_llama", "dci")
    whole = load_file(exports["llava"] / "model.safetensors")
    assert torch.equal(whole["model.mm_projector.0.weight"], job.connector_state["mlp.0.weight"])


def test_exports_are_what_the_checkpoint_says_bit_for_bit(exports, checkpoint):
    for kind in ("hf", "llava"):
        result = verify(str(checkpoint), str(exports[kind]))
        assert result.equal, result.differences[:3]


def test_another_base_is_refused_and_a_moved_one_found(checkpoint, job, tmp_path):
    assert resolve(Source(load=str(checkpoint))).language.path == job.language_folder
    assert resolve(Source(load=str(checkpoint))).lora == job.lora
    moved = str(shutil.copytree(job.language_folder, tmp_path / "moved"))
    assert resolve(Source(load=str(checkpoint), model_name_or_path=moved)).language.path == moved
    export_checkpoint(str(checkpoint), "hf", str(tmp_path / "hf"), language_model=moved)
    weights = load_file(f"{moved}/model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, f"{moved}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--model_name_or_path .*moved: its weights are not those.*model.safetensors"):
        resolve(Source(load=str(checkpoint), model_name_or_path=moved))
    with pytest.raises(UserError, match="are not those that the adapters"):
        export_checkpoint(str(checkpoint), "peft", str(tmp_path / "peft"), language_model=moved)
    lost = shutil.copytree(checkpoint, tmp_path / "lost")
    described = json.loads((lost / "hf" / "dc_megatron.json").read_text())
    (lost / "hf" / "dc_megatron.json").write_text(json.dumps({**described, "language_model": "/nowhere"}))
    what = r"/nowhere, which is not there; name it: --model_name_or_path"
    with pytest.raises(UserError, match=what):
        resolve(Source(load=str(lost)))
    with pytest.raises(UserError, match=what):
        export_checkpoint(str(lost), "hf", str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, "has r 8, alpha 8, not --lora_r 4 --lora_alpha 8"),
        ({"use_dora": True}, "use_dora True, which is not available"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        (None, "has no adapter_model.safetensors"),
        ("fewer", "2 weights missing"),
    ],
)
def test_an_adapter_folder_of_another_kind_is_refused(exports, job, tmp_path, change, message):
    folder = shutil.copytree(exports["peft"], tmp_path / "peft")
    if change is None:
        (folder / "adapter_model.safetensors").unlink()
    elif change == "fewer":
        factors = load_file(folder / "adapter_model.safetensors")
        kept = {name: value for name, value in factors.items() if ".layers.3.mlp.up_proj." not in name}
        save_file(kept, folder / "adapter_model.safetensors")
    else:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        PeftFactors(str(folder), LanguageConfig.from_folder(job.language_folder), LoraConfig(4, 8))


def test_a_model_without_adapters_has_no_peft_export(exports, tmp_path):
    with pytest.raises(UserError, match=r"--format peft: .*holds no adapters"):
        export_checkpoint(str(exports["llava"]), "peft", str(tmp_path / "peft"))
