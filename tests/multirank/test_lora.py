"""Adapters on the sharded model against PEFT on the plain reference, in fp32: losses, gradients, training curves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.reference_batches import make_batch
from tests.multirank import parity
from tests.multirank.lora_jobs import LORA, make_folders, make_job

TRAIN = "tests.multirank.parity_worker:train"
STEPS = 20
LAYOUTS = {
    "TP1": {},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "TP2+SP": {"tensor": 2, "sequence_parallel": True},
    "DP2+distributed-optimizer+gather": {
        "distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def reference_curve(folders):
    return parity.run_reference(make_job(folders, steps=STEPS))


def assert_first_step_equal(job, results, reference):
    difference = abs(parity.losses(results)[0] - reference["losses"][0])
    assert difference <= parity.LOSS_TOLERANCE, f"loss differs by {difference}"
    ours = parity.merge(job, results, "gradients")
    assert ours.keys() == reference["gradients"].keys(), "others learn than under PEFT"
    worst, name = parity.worst_difference(ours, reference["gradients"])
    assert worst <= parity.GRADIENT_TOLERANCE, f"gradient of {name} differs by {worst:.2e}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_equal_peft(workers, folders, reference_curve, layout):
    job = make_job(folders, steps=STEPS, **LAYOUTS[layout])
    results = workers.run(TRAIN, 1 if layout == "TP1" else 2, job)
    assert_first_step_equal(job, results, reference_curve)
    ours = parity.losses(results)
    worst = max(abs(a - b) for a, b in zip(ours, reference_curve["losses"], strict=True))
    assert worst <= parity.CURVE_TOLERANCE, f"curves part by {worst}"
    assert ours[0] - ours[-1] >= 0.5, f"the loss fell from {ours[0]} to {ours[-1]} only"
    final = parity.merge(job, results, "parameters")
    start = reference_curve["start"]
    moved = {n: p - start[n] for n, p in reference_curve["parameters"].items() if n in reference_curve["gradients"]}
    worst, name = parity.worst_difference({name: final[name] - start[name] for name in moved}, moved)
    assert worst <= parity.DELTA_TOLERANCE, f"change of {name} over {STEPS} steps differs by {worst:.2e}"
    frozen = {name: value for name, value in final.items() if not name.startswith(("lora.", "connector."))}
    base = load_file(Path(folders["llama"]) / "model.safetensors")
    assert frozen.keys() == base.keys()
    assert all(torch.equal(frozen[name], base[name]) for name in base), "a frozen weight has moved"


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"tensor": 2, "sequence_parallel": True, "recompute": "full"}, id="TP2+SP+recompute"),
        pytest.param({"tensor": 2, "pipeline": 2, "sequence_parallel": True}, id="TP2xPP2+SP", marks=pytest.mark.long),
        pytest.param({"pipeline": 2, "virtual": 2}, id="VPP2", marks=pytest.mark.long),
    ],
)
def test_first_step_at_further_layouts(workers, folders, reference_curve, layout):
    job = make_job(folders, **layout)
    world = layout.get("tensor", 1) * layout.get("pipeline", 1)
    assert_first_step_equal(job, workers.run(TRAIN, world, job), reference_curve)


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "sequence_parallel": True}], ids=["TP1", "TP2+SP"])
def test_packed_rows_equal_separate_rows(workers, folders, layout):
    """The last layer then works at positions with a target only, behind its attention: so do its adapters."""
    job = make_job(folders, packed=True, **layout)
    packed = make_batch([parity.make_rows([1, 0, 2], seed=5)], 2 * parity.SEQUENCE, tokens_per_image=16, packed=True)
    job = replace(job, micro_batches=[[packed]])
    world = layout.get("tensor", 1)
    assert_first_step_equal(job, workers.run(TRAIN, world, job), parity.run_reference(job))


@pytest.mark.parametrize("language", ["qwen2", "phi"])
def test_linears_with_biases_and_a_start_at_zero(workers, folders, language):
    """Without factors to start from, B is zero: the first loss is the base's, and A has no gradient yet."""
    job = make_job(folders, language=language, tensor=2)
    assert_first_step_equal(job, workers.run(TRAIN, 2, job), parity.run_reference(job))
    fresh = replace(job, lora_state={})
    base = replace(job, lora_state={}, lora=None, trainable="connector")
    results = workers.run(TRAIN, 2, fresh)
    assert parity.losses(results) == parity.losses(workers.run(TRAIN, 2, base))
    gradients = parity.merge(fresh, results, "gradients")
    assert all(not value.any() for name, value in gradients.items() if ".lora_A." in name)
    assert all(value.any() for name, value in gradients.items() if ".lora_B." in name)


def test_every_layout_starts_alike(workers, folders):
    starts = []
    for world, layout in ((1, {}), (2, {"tensor": 2}), (2, {"pipeline": 2})):
        job = replace(make_job(folders, **layout), lora_state={}, lr=0.0)
        starts.append(parity.merge(job, workers.run(TRAIN, world, job), "parameters"))
    names = [name for name in starts[0] if ".lora_A." in name]
    assert len(names) == 4 * 7
    for name in names:
        assert all((other[name] == starts[0][name]).all() for other in starts[1:]), name
        bound = starts[0][name].shape[1] ** -0.5
        assert 0.9 * bound < starts[0][name].abs().max() <= bound
    assert len({float(starts[0][name][0, 0]) for name in names}) == len(names), "two linears start alike"


def test_a_missing_mark_for_sequence_parallelism_is_noticed(workers, folders, reference_curve):
    fault = "factor not marked for sequence parallelism"
    job = make_job(folders, tensor=2, sequence_parallel=True, fault=fault)
    with pytest.raises(AssertionError, match="differs"):
        assert_first_step_equal(job, workers.run(TRAIN, 2, job), reference_curve)


@pytest.mark.long
@pytest.mark.parametrize("layout", [{}, {"sequence_parallel": True}], ids=["TP2", "TP2+SP"])
def test_layers_that_are_computed_again_drop_the_same_inputs(workers, folders, layout):
    job = replace(make_job(folders, tensor=2, **layout), lora=replace(LORA, dropout=0.3))
    once, again = (workers.run(TRAIN, 2, replace(job, recompute=recompute)) for recompute in (False, True))
    assert parity.losses(once) == parity.losses(again)
    worst, name = parity.worst_difference(parity.merge(job, once, "gradients"), parity.merge(job, again, "gradients"))
    assert worst <= 1e-6, f"gradient of {name} differs by {worst:.2e}"
    plain = workers.run(TRAIN, 2, replace(job, lora=LORA))
    assert abs(parity.losses(plain)[0] - parity.losses(once)[0]) > 1e-3, "nothing was dropped"


@pytest.mark.long
def test_bf16_stays_near_fp32(workers, folders, reference_curve):
    """As for the whole model: bf16 keeps 8 bits of mantissa."""
    job = make_job(folders, steps=3, tensor=2, bf16=True, distributed_optimizer=True)
    ours = parity.losses(workers.run(TRAIN, 2, job))
    for found, expected in zip(ours, reference_curve["losses"], strict=False):
        assert abs(found - expected) <= 0.03 * expected
