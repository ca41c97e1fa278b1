"""The sharded model against plain Hugging Face / PyTorch in fp32: features, losses, gradients, training curves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dc_megatron.config import ConnectorConfig, VisionConfig
from dc_megatron.reference.model import ReferenceModel
from tests.helpers.tiny_models import (
    tiny_clip,
    tiny_dinov2,
    tiny_llama,
    tiny_phi,
    tiny_qwen2,
    tiny_qwen3,
    tiny_siglip,
)
from tests.multirank import parity
from tests.multirank.parity import assert_first_step_equal, make_job

TRAIN = "tests.multirank.parity_worker:train"
STEPS = 20
# Four processes on two cores, or what others show as well.
LONG = pytest.mark.long
# fp32 logits of size 1 to 10, sums of a hundred terms in another order.
LOGIT_TOLERANCE = 2e-5
LAYOUTS = {
    "TP1": {},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "TP2+SP": {"tensor": 2, "sequence_parallel": True},
    "TP2xPP2": {"tensor": 2, "pipeline": 2},
    "DP2+distributed-optimizer": {"distributed_optimizer": True},
}
WORLD = {"TP1": 1, "TP2": 2, "PP2": 2, "TP2+SP": 2, "TP2xPP2": 4, "DP2+distributed-optimizer": 2}
OVERLAPPED = {
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "DP2": {},
    "DP2+distributed-optimizer+gather": {"distributed_optimizer": True, "overlap_param_gather": True},
}
STAGES = {"stage 1": "connector", "stage 2": "connector,llm"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": tiny_llama(root / "llama", vocab=1003),
        "tied": tiny_llama(root / "tied", vocab=1003, tied=True, rope_factor=8.0, layers=2),
        "qwen2": tiny_qwen2(root / "qwen2", vocab_size=1003, num_hidden_layers=2),
        "tied qwen2": tiny_qwen2(root / "tied_qwen2", vocab_size=1003, num_hidden_layers=2, tie_word_embeddings=True),
        "qwen3": tiny_qwen3(root / "qwen3", vocab_size=1003, num_hidden_layers=2, tie_word_embeddings=True),
        "phi": tiny_phi(root / "phi", num_hidden_layers=2),
        "clip": tiny_clip(root / "clip"),
        "dinov2": tiny_dinov2(root / "dinov2"),
        "siglip": tiny_siglip(root / "siglip"),
    }


@pytest.fixture(scope="module")
def reference_curves(folders):
    """The reference's run of both stages, shared by all layouts."""
    return {
        trainable: parity.run_reference(make_job(folders, steps=STEPS, trainable=trainable))
        for trainable in STAGES.values()
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", [pytest.param(one, marks=LONG if one == "TP2xPP2" else ()) for one in LAYOUTS])
def test_twenty_steps_equal_the_reference(workers, folders, reference_curves, layout, stage):
    job = make_job(folders, steps=STEPS, trainable=STAGES[stage], **LAYOUTS[layout])
    reference = reference_curves[job.trainable]
    results = workers.run(TRAIN, WORLD[layout], job)
    assert_first_step_equal(job, results, reference)
    ours = parity.losses(results)
    worst = max(abs(a - b) for a, b in zip(ours, reference["losses"], strict=True))
    assert worst <= parity.CURVE_TOLERANCE, f"curves part by {worst}"
    assert ours[0] - ours[-1] >= 0.5, f"the loss fell from {ours[0]} to {ours[-1]} only"
    moved = {n: p - reference["start"][n] for n, p in reference["parameters"].items() if n in reference["gradients"]}
    final = parity.merge(job, results, "parameters")
    ours_moved = {name: final[name] - reference["start"][name] for name in moved}
    worst, name = parity.worst_difference(ours_moved, moved)
    assert worst <= parity.DELTA_TOLERANCE, f"change of {name} over {STEPS} steps differs by {worst:.2e}"


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("connector", ["sti", "sci", "dci", "none"])
def test_every_connector_and_tower_at_tp2(workers, folders, connector, tower):
    job = make_job(folders, tower=tower, connector=connector, tensor=2)
    assert_first_step_equal(job, workers.run(TRAIN, 2, job), parity.run_reference(job))


@pytest.mark.parametrize("connector", ["sti", "dci"])
def test_a_tower_of_another_family(workers, folders, connector):
    job = make_job(folders, tower="dinov2", connector=connector, tensor=2)
    assert_first_step_equal(job, workers.run(TRAIN, 2, job), parity.run_reference(job))


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=["TP2", "PP2"])
def test_tied_head_and_llama3_rope(workers, folders, layout):
    job = make_job(folders, language="tied", **layout)
    assert_first_step_equal(job, workers.run(TRAIN, 2, job), parity.run_reference(job))


@pytest.mark.parametrize("language", ["qwen2", pytest.param("tied qwen2", marks=LONG)])
@pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2", "TP2+SP"])
def test_biases_on_queries_keys_and_values(workers, folders, layout, language):
    job = make_job(folders, language=language, **LAYOUTS[layout])
    reference = parity.run_reference(job)
    assert any(name.endswith("k_proj.bias") for name in reference["gradients"])
    assert_first_step_equal(job, workers.run(TRAIN, WORLD[layout], job), reference)


# A parameter that Llama does not have.
OWN_PARTS = {"qwen3": "k_norm.weight", "phi": "lm_head.bias"}


@pytest.mark.parametrize("language", OWN_PARTS)
@pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2", "TP2+SP"])
def test_other_families(workers, folders, layout, language):
    job = make_job(folders, language=language, **LAYOUTS[layout])
    reference = parity.run_reference(job)
    assert any(name.endswith(OWN_PARTS[language]) for name in reference["gradients"])
    assert_first_step_equal(job, workers.run(TRAIN, WORLD[layout], job), reference)


@pytest.mark.parametrize("language", OWN_PARTS)
def test_logits_under_sequence_parallelism(workers, folders, language):
    """The other layouts' logits are compared in test_converted_logits.py."""
    job = make_job(folders, language=language, tensor=2, sequence_parallel=True)
    model = ReferenceModel(job.vision_folder, job.language_folder, VisionConfig.from_folder(job.vision_folder),
                           ConnectorConfig("dci")).eval()  # fmt: skip
    model.connector.load_state_dict(job.connector_state)
    batch = job.micro_batches[0][0]
    with torch.no_grad():
        expected = model(batch).logits[batch["labels"] != -100]
    for got in workers.run("tests.multirank.parity_worker:logits", 2, job):
        assert float((got - expected).abs().max()) <= LOGIT_TOLERANCE


@pytest.mark.parametrize("language", OWN_PARTS)
@pytest.mark.parametrize("layout", ["PP2", "TP2+SP"])
def test_packed_rows_of_other_families(workers, folders, language, layout):
    """Samples of one row attend separately, and the last layer works at their targets only."""
    from tests.helpers.reference_batches import make_batch

    rows = parity.make_rows([1, 0, 2], seed=5)
    packed = make_batch([rows], 2 * parity.SEQUENCE, tokens_per_image=16, packed=True)
    job = make_job(folders, language=language, packed=True, **LAYOUTS[layout])
    job = replace(job, micro_batches=[[packed]])
    assert_first_step_equal(job, workers.run(TRAIN, 2, job), parity.run_reference(job))


def test_a_head_bias_in_chunks_and_recomputed_layers(workers, folders):
    job = make_job(folders, language="phi", tensor=2, recompute="full", chunk_bytes=4 * 640 * 7)
    results = workers.run(TRAIN, 2, job)
    assert all(result["chunked_rows"] for result in results)
    assert_first_step_equal(job, results, parity.run_reference(job))


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {}], ids=["TP2", "PP2", "DP2"])
def test_microbatch_reduction_is_the_original_mean_of_means(workers, folders, layout):
    job = make_job(folders, loss_reduction="microbatch", **layout)
    # The second micro-batch loses half of its targets, so that the two reductions differ.
    second = job.micro_batches[0][1]
    second["labels"][:, ::2] = -100
    vision = VisionConfig.from_folder(job.vision_folder)
    model = ReferenceModel(job.vision_folder, job.language_folder, vision, ConnectorConfig("dci"))
    model.connector.load_state_dict(job.connector_state)
    model.set_trainable("connector,llm")
    for batch in job.micro_batches[0]:
        output = model(batch)
        (output.loss_sum / output.supervised_tokens / len(job.micro_batches[0])).backward()
    expected = {
        name.removeprefix("language_model."): p.grad for name, p in model.named_parameters() if p.grad is not None
    }
    gradients = parity.merge(job, workers.run(TRAIN, 2, job), "gradients")
    worst, name = parity.worst_difference(gradients, expected)
    assert worst <= parity.GRADIENT_TOLERANCE, f"gradient of {name} differs by {worst:.2e}"


def test_virtual_pipeline(workers, folders):
    job = make_job(folders, pipeline=2, virtual=2)
    assert_first_step_equal(job, workers.run(TRAIN, 2, job), parity.run_reference(job))


@pytest.mark.parametrize(
    "layout", [pytest.param("TP1", marks=LONG), "TP2+SP", "PP2", pytest.param("TP2xPP2", marks=LONG), "VPP2"]
)
def test_images_encoded_by_all_stages(workers, folders, layout):
    """Three steps, in one of which there are fewer images than ranks, and in one none."""
    layouts = {**LAYOUTS, "VPP2": {"pipeline": 2, "virtual": 2}}
    job = make_job(folders, tower_stages="all", **layouts[layout])
    vision, connector = VisionConfig.from_folder(folders["clip"]), ConnectorConfig("dci")
    mixes = [[[3, 1], [1, 2]], [[0, 0], [0, 0]], [[0, 1], [0, 0]]]
    job = replace(job, micro_batches=[parity.make_step(mix, vision, connector, seed=i) for i, mix in enumerate(mixes)])
    reference = parity.run_reference(job)
    world = WORLD.get(layout, 2)
    results = workers.run(TRAIN, world, job)
    assert_first_step_equal(job, results, reference)
    assert parity.losses(results) == pytest.approx(reference["losses"], abs=parity.CURVE_TOLERANCE)
    for result in results:
        assert sum(result["encoded_tiles"]) == -(-7 // world) + 1, "every rank encodes its share of a step, filled up"
        assert result["samples"] == 12


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("language", ["llama", "phi"])
def test_recomputing_changes_nothing(workers, folders, language, recompute):
    job = make_job(folders, language=language, tensor=2, recompute=recompute)
    assert_first_step_equal(job, workers.run(TRAIN, 2, job), parity.run_reference(job))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", OVERLAPPED.values(), ids=OVERLAPPED)
def test_batches_with_and_without_images_under_overlapped_reduction(workers, folders, layout, stage):
    """Four iterations with other mixes: all text, mixed, and a last micro-batch without images.

    Under overlapped gathering a parameter that no forward pre-hook waits for is used with its old values.
    """
    job = make_job(folders, trainable=STAGES[stage], overlap_grad_reduce=True, **layout)
    vision, connector = VisionConfig.from_folder(folders["clip"]), ConnectorConfig("dci")
    mixes = [[[3, 1], [0, 0]], [[0, 0], [0, 0]], [[0, 3], [1, 0]], [[1, 0], [0, 0]]]
    steps = [parity.make_step(mix, vision, connector, seed=i + 1) for i, mix in enumerate(mixes)]
    job = replace(job, micro_batches=steps)
    reference = parity.run_reference(job)
    results = workers.run(TRAIN, 2, job)
    assert_first_step_equal(job, results, reference)
    ours = parity.losses(results)
    worst = max(abs(a - b) for a, b in zip(ours, reference["losses"], strict=True))
    assert worst <= parity.CURVE_TOLERANCE, f"losses {ours} and {reference['losses']}"


@pytest.mark.parametrize("fault", ["wrong layer index", "unmasked padded column", "missing tensor-parallel reduction"])
def test_a_seeded_fault_is_noticed(workers, folders, fault):
    job = make_job(folders, tensor=2, fault=fault)
    results = workers.run(TRAIN, 2, job)
    with pytest.raises(AssertionError, match="differs"):
        assert_first_step_equal(job, results, parity.run_reference(job))


def test_packed_rows_equal_separate_rows(workers, folders):
    """Two samples in one row attend and count positions separately."""
    from tests.helpers.reference_batches import make_batch

    job = make_job(folders, tensor=2, sequence_parallel=True, packed=True)
    rows = parity.make_rows([1, 0, 2], seed=5)
    packed = make_batch([rows], 2 * parity.SEQUENCE, tokens_per_image=16, packed=True)
    job = replace(job, micro_batches=[[packed]])
    reference = parity.run_reference(job)
    apart = make_batch(rows, parity.SEQUENCE, tokens_per_image=16)
    assert abs(parity.run_reference(replace(job, micro_batches=[[apart]]))["losses"][0] - reference["losses"][0]) < 1e-6
    assert_first_step_equal(job, workers.run(TRAIN, 2, job), reference)


def test_bf16_stays_near_fp32(workers, folders):
    """bf16 keeps 8 bits of mantissa: the loss of a few layers agrees to about 2^-8 of its size."""
    job = make_job(folders, steps=3, tensor=2, bf16=True, distributed_optimizer=True)
    reference = parity.run_reference(replace(job, bf16=False))
    for ours, expected in zip(parity.losses(workers.run(TRAIN, 2, job)), reference["losses"], strict=True):
        assert abs(ours - expected) <= 0.03 * expected
