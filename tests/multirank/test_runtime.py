"""The patch table against the installed megatron-core and torch, and checkpoints across layouts, on real ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig
from tests.helpers.tiny_models import tiny_clip, tiny_llama
from tests.multirank import parity
from tests.multirank.job import Job

WORKER = "tests.multirank.runtime_worker"
LAYOUTS = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 in two virtual stages": (2, {"pipeline": 2, "virtual": 2}),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    language, tower = tiny_llama(root / "llama", vocab=1003), tiny_clip(root / "clip")
    state = parity.connector_state(
        VisionConfig.from_folder(tower), ConnectorConfig("dci"), LanguageConfig.from_folder(language).hidden_size
    )
    return Job(language_folder=language, vision_folder=tower, micro_batches=[], connector_state=state)


@pytest.fixture(scope="module")
def saved(workers, job, tmp_path_factory):
    """A checkpoint written at TP2, and the seconds that three saves took."""
    folders = [str(tmp_path_factory.mktemp("checkpoint")) for _ in range(3)]
    results = workers.run(f"{WORKER}:save", 2, replace(job, tensor=2), folders)
    return folders[0], [max(ranks) for ranks in zip(*results, strict=True)]


def test_every_row_has_a_target_a_condition_and_a_reason(workers):
    (rows,) = workers.run(f"{WORKER}:table", 1)
    assert [row["target"] for row in rows if not row["exists"]] == []
    assert [row["target"] for row in rows if not row["known_condition"]] == []
    assert [row["target"] for row in rows if len(row["why"].split()) < 3] == []
    targets = [row["target"] for row in rows]
    assert len(set(targets)) == len(targets), "a target is patched twice"


def test_applying_twice_changes_nothing_and_undo_restores_every_original(workers):
    (report,) = workers.run(f"{WORKER}:apply_and_undo", 1)
    (rows,) = workers.run(f"{WORKER}:table", 1)
    # A CPU meets every condition but those of a GPU.
    expected = [row["target"] for row in rows if row["condition"] not in ("cuda", "te_without_apex")]
    assert sorted(report["applied"]) == sorted(expected)
    assert len(report["targets"]) > len(expected)
    assert report["applied the second time"] == report["applied"]
    assert (report["not replaced"], report["replaced twice"], report["left behind"]) == ([], [], [])


@pytest.mark.parametrize("transformer_engine", [True, False])
def test_a_gpu_gets_only_the_rows_that_a_gpu_needs(workers, transformer_engine):
    """The same table where there is CUDA, with and without Transformer Engine."""
    holds = {
        "no_cuda": False,
        "cuda": True,
        "no_te_and_no_apex": not transformer_engine,
        "te_without_apex": transformer_engine,
    }
    (got,) = workers.run(f"{WORKER}:applied_under", 1, **holds)
    (rows,) = workers.run(f"{WORKER}:table", 1)
    expected = {row["target"] for row in rows if holds.get(row["condition"], True)}
    assert set(got["whole"]) == expected
    assert set(got["core"]) == {target for target in expected if not target.startswith("megatron.training")}
    # Of torch nothing is replaced but what would execute a checkpoint's pickle.
    of_torch = [target for target in got["whole"] if target.startswith("torch")]
    assert of_torch == ["torch.distributed.checkpoint.filesystem:pickle"]
    assert ("megatron.core.optimizer:Adam" in got["core"]) is not transformer_engine
    assert ("megatron.core.tensor_parallel.layers:_grad_accum_fusion_available" in got["core"]) is transformer_engine
    assert "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer.scale_gradients" in got["core"]
    assert "megatron.training.initialize:_compile_dependencies" in got["whole"]


def test_replaced_functions_still_take_the_arguments_ours_take(workers):
    (got,) = workers.run(f"{WORKER}:signatures", 1)
    assert got["_set_cuda_rng_state"] == ["new_state", "device", "graph_safe"]
    assert got["_get_cuda_rng_state"] == ["device", "clone", "graph_safe"]
    assert got["get_write_results_queue"] == ["mp_mode"]
    assert "allow_no_cuda" in got["initialize_megatron"]


def test_what_megatron_core_finds_where_it_looks_for_cuda(workers):
    (got,) = workers.run(f"{WORKER}:effects", 1)
    assert [what for what, holds in got.items() if not holds] == []


def test_an_asynchronous_save_writes_what_was_there_when_it_was_scheduled(workers):
    assert workers.run(f"{WORKER}:saved_beside_a_step", 1) == [[0.0, 0.0, 0.0]]


def test_checkpoint_keys_are_the_same_at_every_layout(workers, job):
    found = {}
    for name, (world, layout) in LAYOUTS.items():
        results = workers.run(f"{WORKER}:keys", world, replace(job, **layout))
        found[name] = {key: shape for result in results for key, shape in result.items()}
    first = found["TP1"]
    assert {key.split(".")[0] for key in first} == {"language_model", "connector"}
    assert {key for key in first if key.startswith("connector.")} == {
        f"connector.mlp.{number}.{part}" for number in (0, 2) for part in ("weight", "bias")
    }
    assert "language_model.decoder.layers.self_attention.linear_qkv.weight" in first
    for name, keys in found.items():
        assert set(keys) == set(first), f"{name} has other keys than TP1"
        # The padded vocabulary is a multiple of 128 times the tensor-parallel size; here 1024 at both.
        assert {k: v for k, v in keys.items() if v != first[k]} == {}, f"{name} has other shapes than TP1"


def test_a_tiny_checkpoint_is_saved_in_under_two_seconds(saved):
    """Without a spawned manager, which imports everything again. The best of three: other processes share the cores."""
    assert min(saved[1]) < 2, saved[1]


@pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2", "TP2xPP2"])
def test_a_checkpoint_loads_at_another_layout_to_the_bit(workers, job, saved, layout):
    world, sizes = LAYOUTS[layout]
    target = replace(job, **sizes)
    results = workers.run(f"{WORKER}:load", world, target, saved[0])
    assert all(result["tower_untouched"] for result in results)
    full = parity.merge(target, results, "parameters")
    expected = load_file(f"{job.language_folder}/model.safetensors")
    expected.update({f"connector.{name}": value for name, value in job.connector_state.items()})
    assert set(full) == set(expected)
    assert [name for name, value in expected.items() if not torch.equal(full[name], value)] == []
