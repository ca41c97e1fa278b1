"""The model's parts on real ranks, and its configuration against the one that the engine derives from flags."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig, padded_vocab_size
from tests.helpers.language_shapes import LLAMA
from tests.helpers.tiny_models import tiny_clip, tiny_llama, tiny_qwen3
from tests.multirank import parity
from tests.multirank.job import Job

WORKER = "tests.multirank.model_worker"
COUNTS = [0, 1, 2, 3, 5]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    language, tower = tiny_llama(root / "llama", vocab=1003), tiny_clip(root / "clip")
    state = parity.connector_state(
        VisionConfig.from_folder(tower), ConnectorConfig("dci"), LanguageConfig.from_folder(language).hidden_size
    )
    return Job(language_folder=language, vision_folder=tower, micro_batches=[], connector_state=state)


@pytest.mark.parametrize("groups", [8, 4, 2, 1])
def test_attention_is_the_formula(workers, groups):
    """Grouped queries included; packed samples attend to themselves only."""
    (got,) = workers.run(f"{WORKER}:attention", 1, groups, [5, 1, 7, 3])
    assert got["unpacked"] <= 1e-6
    assert got["packed"] <= 1e-6
    assert got["packed as one stretch"] > 0.1, "the samples would agree with any packing"


def test_attention_refuses_what_it_would_answer_wrongly(workers):
    (said,) = workers.run(f"{WORKER}:refused_attention_inputs", 1)
    assert "mask tensor was given" in said["a mask"]
    assert "bias is not supported" in said["a bias"]
    assert "ends at 3, the row has 4" in said["bounds that end early"]


@pytest.mark.parametrize(
    ("vocab_size", "shard", "ranks"),
    [(8, 4, 2), (7, 4, 2), (4, 4, 2), (3, 4, 2), (5, 4, 4)],
    ids=["none padded", "one column", "a whole shard", "a shard and more", "two whole shards and more"],
)
def test_padded_columns_have_probability_zero(workers, vocab_size, shard, ranks):
    (got,) = workers.run(f"{WORKER}:masked_softmax", 1, vocab_size, shard, ranks)
    assert torch.allclose(got["probabilities"][:, :vocab_size], torch.tensor(1 / vocab_size))
    assert not got["probabilities"][:, vocab_size:].any()
    assert not got["gradient"][:, vocab_size:].any()
    assert got["finite"]


@pytest.mark.parametrize(
    ("vocabulary", "tensor", "rows"),
    [(32000, 1, 32000), (32000, 4, 32256), (32000, 2, 32000), (1003, 1, 1024), (1003, 8, 1024), (1003, 16, 2048)],
)
def test_the_padded_vocabulary_is_megatrons(vocabulary, tensor, rows):
    assert padded_vocab_size(vocabulary, tensor) == rows


def test_images_are_shared_out_over_the_tensor_parallel_group(workers, job):
    """Any number of them, none and fewer than ranks included: features and gradients are those of one rank."""
    (alone,) = workers.run(f"{WORKER}:image_features", 1, job, COUNTS)
    ranks = workers.run(f"{WORKER}:image_features", 2, replace(job, tensor=2), COUNTS)
    for position, count in enumerate(COUNTS):
        expected = alone[position]
        assert expected["encoded"] == count
        for rank in ranks:
            got = rank[position]
            assert got["encoded"] == -(-count // 2), f"{count} images: one rank encoded {got['encoded']}"
            assert got["tower_gradients"] == []
            assert got["features"].shape == expected["features"].shape
            assert got["features"].shape[0] == count
            assert count == 0 or (got["features"] - expected["features"]).abs().max() <= 1e-6
            assert set(got["gradients"]) == set(expected["gradients"])
            for name, gradient in expected["gradients"].items():
                difference = (got["gradients"][name] - gradient).norm() / gradient.norm()
                assert difference <= 1e-6, f"{count} images, {name}: {difference:.2e}"


def test_a_batch_without_pictures_still_runs_the_connector(workers, job):
    """Its gradient is zero, not absent: an overlapped gradient reduction waits for every parameter."""
    (got,) = workers.run(f"{WORKER}:text_only_embeddings", 1, job)
    assert got["equal"]
    assert all(gradient is not None and not gradient.any() for gradient in got["gradients"].values())


def test_only_the_first_stage_holds_tower_and_connector(workers, job):
    first, last = workers.run(f"{WORKER}:parts", 2, replace(job, pipeline=2))
    assert first["parts"] == [["connector", "language_model", "vision_tower"]]
    assert last["parts"] == [["language_model"]]
    assert first["saved_without_tower"] == [["connector", "language_model"]]
    assert not first["tower_trains"]
    assert first["trained"] == {
        "connector": ["connector"],
        "llm": ["language_model"],
        "connector,llm": ["connector", "language_model"],
    }
    assert last["trained"] == {"connector": [], "llm": ["language_model"], "connector,llm": ["language_model"]}


def test_only_the_first_virtual_stage_holds_tower_and_connector(workers, job):
    first, last = workers.run(f"{WORKER}:parts", 2, replace(job, pipeline=2, virtual=2))
    assert first["parts"] == [["connector", "language_model", "vision_tower"], ["language_model"]]
    assert last["parts"] == [["language_model"], ["language_model"]]


@pytest.mark.parametrize("virtual", [None, 2])
def test_the_tower_may_be_on_all_stages_and_is_not_saved_there_either(workers, job, virtual):
    first, last = workers.run(f"{WORKER}:parts", 2, replace(job, pipeline=2, virtual=virtual, tower_stages="all"))
    later = [["language_model"]] * (1 if virtual else 0)
    assert first["parts"] == [["connector", "language_model", "vision_tower"], *later]
    assert last["parts"] == [["language_model", "vision_tower"], *later]
    assert last["saved_without_tower"][0] == ["language_model"]
    assert last["trained"]["connector"] == []
    assert not last["tower_trains"]


def test_a_connector_given_by_a_file_survives_the_next_load_only(workers, job):
    (got,) = workers.run(f"{WORKER}:load_state", 1, job)
    assert got["keys_while_given"] == []
    assert got["given_is_kept"]
    assert got["the_next_load_counts"]
    assert "connector.mlp.0.weight" in got["missing"]


@pytest.mark.parametrize("norms_of_heads", [False, True])
def test_checkpoints_are_alike_with_and_without_transformer_engines_norm(workers, job, tmp_path, norms_of_heads):
    if norms_of_heads:
        job = replace(job, language_folder=tiny_qwen3(tmp_path / "qwen3", num_hidden_layers=2))
    (got,) = workers.run(f"{WORKER}:idle_state", 1, job, str(tmp_path))
    assert got["keys"]["torch"] == got["keys"]["transformer engine"]
    assert got["exchanged"]


def test_the_connector_starts_alike_at_every_layout(workers, job):
    (alone,) = workers.run(f"{WORKER}:initial_connector", 1, job)
    for rank in workers.run(f"{WORKER}:initial_connector", 2, replace(job, tensor=2)):
        assert all(torch.equal(rank[name], value) for name, value in alone.items())


# Fields that may differ between the engine's TransformerConfig and ours, and why that is no difference.
MAY_DIFFER = {
    "tensor_parallel_num_weight_shards": "None means the tensor-parallel size, which is what the engine writes",
    "expert_tensor_parallel_num_weight_shards": "as above; there are no experts",
    "use_cpu_initialization": "None and False are asked for in the same if",
    "attention_softmax_in_fp32": "read by megatron-core's own softmax, which neither of our attentions uses",
    "cp_comm_type": "our attention gathers keys and values, and has no other way",
    "inference_sampling_seed": "read by megatron-core's inference engine, which is not used",
    "overlap_p2p_comm": "when stages exchange what they computed: the engine overlaps under a virtual pipeline",
    "batch_p2p_comm": "its opposite",
}
QWEN2 = replace(LLAMA, model_type="qwen2", qkv_bias=True, rope_scaling_factor=None, rope_theta=1e6)
QWEN3 = replace(LLAMA, model_type="qwen3", qk_norm=True, rope_scaling_factor=None)
PHI = replace(
    LLAMA, model_type="phi", parallel_layers=True, rotary_percent=0.5, rope_scaling_factor=None, num_key_value_heads=8
)
TIED = replace(LLAMA, tie_word_embeddings=True, rope_scaling_factor=None, num_key_value_heads=8, rms_norm_eps=1e-5)


@pytest.mark.parametrize(
    ("language", "line", "world_size", "layout"),
    [
        (LLAMA, "", 1, {}),
        (TIED, "", 1, {}),
        (QWEN2, "", 1, {}),
        (QWEN3, "", 1, {}),
        (PHI, "", 1, {}),
        (
            LLAMA,
            "--tensor-model-parallel-size 2 --sequence-parallel --bf16 True",
            2,
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, "params_dtype": torch.bfloat16},
        ),
        (
            LLAMA,
            "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --fp16 True",
            2,
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "params_dtype": torch.float16,
            },
        ),
        (LLAMA, "--context-parallel-size 2", 2, {"context_parallel_size": 2}),
    ],
    ids=["TP1", "tied, no groups", "biases", "norms of heads", "phi", "TP2+SP bf16", "PP2 VPP2 fp16", "CP2"],
)
def test_the_configuration_is_the_one_that_the_engine_derives(workers, language, line, world_size, layout):
    arguments = (language, f"--max_steps 3 {line}", world_size)
    (differences,) = workers.run(f"{WORKER}:configurations", 1, *arguments, layout)
    assert {name: values for name, values in differences.items() if name not in MAY_DIFFER} == {}


BLOCKED = """
import sys
sys.modules["megatron.training"] = None  # importing it, or anything in it, now fails
import importlib, pkgutil
from dc_megatron.runtime import parallel, patches
patches.apply()
import dc_megatron.inference
for module in pkgutil.iter_modules(dc_megatron.inference.__path__):
    importlib.import_module("dc_megatron.inference." + module.name)
import torch
from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig
from dc_megatron.inference import assemble
from dc_megatron.model.language_model import Layout, transformer_config
from tests.helpers.reference_batches import make_batch

parallel.start()
language, vision = LanguageConfig.from_folder(sys.argv[1]), VisionConfig.from_folder(sys.argv[2])
connector = ConnectorConfig("dci")
model = assemble.build_model(
    language, vision, connector, transformer_config(language, Layout()),
    vocab_rows=1024, max_sequence_length=128, transformer_engine=False, seed=1,
)
assemble.load_language_model(model, language, 1024)
assemble.load_vision_tower(model, vision, connector)
batch = make_batch([[("text", [5, 6]), ("image", 1), ("text", [7, 8, 9])]], 32, tokens_per_image=16)
logits = model.eval()(batch, positions=torch.tensor([20]))
assert logits.shape == (1, 1003) and logits.isfinite().all(), logits.shape
assert not [name for name in sys.modules if name.startswith("megatron.training.")]
print("next id", int(logits.argmax()))
"""


def test_inference_works_without_the_training_engine(job):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BLOCKED, job.language_folder, job.vision_folder],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))),
        env={**os.environ, "DC_DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("next id"), done.stdout
