"""Parts that learn at rates of their own, a vision tower that learns, and every precision, against the reference."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from transformers import Trainer

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig, image_tiling, padded_vocab_size
from dc_megatron.reference.model import ReferenceModel
from dc_megatron.weights.language_tables import find_rule, language_table
from tests.helpers.tiny_models import tiny_clip, tiny_llama, tiny_qwen2, tiny_siglip
from tests.multirank import parity
from tests.multirank.parity import assert_first_step_equal, make_job

WORKER = "tests.multirank.parity_worker"
TRAIN = f"{WORKER}:train"
ALL_PARTS = "connector,llm,vision_tower"
# Warm-up and decay of three steps, and a rate that is a thousand times another: a group at the wrong rate, or out of
# step with the schedule, is far off.
GROUPS = {
    "trainable": ALL_PARTS,
    "rates": {"connector": 1e-2, "vision_tower": 1e-5},
    "shares": (0.5, 1.0, 0.25),
    "weight_decay": 0.5,
    "lr": 1e-3,
}
# The last micro-batch has no image: the tower must take part in it all the same.
COUNTS = ((1, 3), (2, 1), (0, 0), (0, 0))
LAYOUTS = {
    "TP1": {},
    "TP2": {"tensor": 2},
    "TP2+SP": {"tensor": 2, "sequence_parallel": True, "overlap_grad_reduce": True, "distributed_optimizer": True},
    "PP2": {"pipeline": 2},
    "DP2": {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
}
# Gradients of a sum over some fifty tokens stay below fp16's 65504 at it.
FITTING_SCALE = 2.0**8
WORLD = {"TP1": 1, "TP2": 2, "TP2+SP": 2, "PP2": 2, "DP2": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": tiny_llama(root / "llama", vocab=1003, layers=2),
        "tied": tiny_llama(root / "tied", vocab=1003, tied=True, layers=2),
        "qwen2": tiny_qwen2(root / "qwen2", vocab_size=1003, num_hidden_layers=2),
        "clip": tiny_clip(root / "clip"),
        "siglip": tiny_siglip(root / "siglip"),
    }


@pytest.fixture(scope="module")
def groups_reference(folders):
    return without_key_biases(parity.run_reference(make_job(folders, counts=COUNTS, steps=3, **GROUPS)))


def without_key_biases(reference: dict) -> dict:
    """``reference`` without gradients that are nothing but rounding.

    A bias of the tower's keys moves all of a query's scores alike, which softmax does not see: its gradient is zero.
    """
    idle = {name for name in reference["gradients"] if name.startswith("vision_tower.") and "k_proj.bias" in name}
    assert idle
    assert max(float(reference["gradients"][name].norm()) for name in idle) < 1e-6
    return {**reference, "gradients": {n: g for n, g in reference["gradients"].items() if n not in idle}}


def moved(parameters: dict, start: dict) -> dict:
    return {name: parameters[name] - value for name, value in start.items()}


def assert_curves_equal(job, results, reference) -> None:
    """Losses of all steps, and how far every parameter that learns has gone."""
    ours = parity.losses(results)
    worst = max(abs(a - b) for a, b in zip(ours, reference["losses"], strict=True))
    assert worst <= parity.CURVE_TOLERANCE, f"losses {ours} and {reference['losses']}"
    start = {name: reference["start"][name] for name in reference["gradients"]}
    final = parity.merge(job, results, "parameters")
    worst, name = parity.worst_difference(moved(final, start), moved(reference["parameters"], start))
    assert worst <= parity.DELTA_TOLERANCE, f"change of {name} differs by {worst:.2e}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rates_decay_and_a_tower_that_learns_equal_plain_torch(workers, folders, groups_reference, layout):
    job = make_job(folders, counts=COUNTS, steps=3, **GROUPS, **LAYOUTS[layout])
    results = workers.run(TRAIN, WORLD[layout], job)
    assert any(name.startswith("vision_tower.encoder") for name in groups_reference["gradients"])
    assert_first_step_equal(job, results, groups_reference)
    assert_curves_equal(job, results, groups_reference)


@pytest.mark.parametrize("connector", ["sti", "none"])
def test_a_siglip_tower_learns_with_its_layers_recomputed(workers, folders, connector):
    """More ranks than images in a micro-batch: the second rank encodes a blank one."""
    job = make_job(folders, tower="siglip", connector=connector, counts=((1, 0), (2, 0)), trainable=ALL_PARTS, tensor=2)
    reference = without_key_biases(parity.run_reference(job))
    assert_first_step_equal(job, workers.run(TRAIN, 2, replace(job, recompute="full")), reference)


def test_a_tower_whose_gradients_stay_apart_is_noticed(workers, folders):
    job = make_job(folders, trainable=ALL_PARTS, tensor=2, fault="tower gradients of one rank")
    results, reference = workers.run(TRAIN, 2, job), without_key_biases(parity.run_reference(job))
    with pytest.raises(AssertionError, match="differ"):
        assert_first_step_equal(job, results, reference)


@pytest.mark.parametrize(("language", "tower"), [("qwen2", "clip"), ("llama", "siglip")])
def test_what_decays_is_what_hugging_faces_trainer_decays(workers, folders, language, tower):
    vision, connector = VisionConfig.from_folder(folders[tower]), ConnectorConfig("none")
    size = vision.image_size
    tiling = image_tiling(vision, connector, ((size, 2 * size),), "spatial_unpad")
    job = make_job(folders, language=language, tower=tower, connector="none", trainable=ALL_PARTS)
    width = LanguageConfig.from_folder(folders[language]).hidden_size
    job = replace(job, tiling=tiling, connector_state=parity.connector_state(vision, connector, width, newline=True))
    (ours,) = workers.run(f"{WORKER}:decaying", 1, job)
    model = ReferenceModel(folders[tower], folders[language], vision, connector, tiling=tiling)
    model.set_trainable(ALL_PARTS)
    theirs = set(Trainer.get_decay_parameter_names(None, model))
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    table = language_table(job_language := LanguageConfig.from_folder(folders[language]), padded_vocab_size(1003, 1))
    seen = set()
    for name, decays in ours.items():
        for one in _names_there(name, table):
            assert (one in theirs) == decays, f"{name}: Hugging Face decays {one}: {one in theirs}"
            seen.add(one)
    assert seen == expected - ({"language_model.lm_head.weight"} if job_language.tie_word_embeddings else set())
    assert "image_newline" in theirs
    assert any(re.search(r"norm|bias", name) for name in ours)


def _names_there(name: str, table: list) -> list[str]:
    """The reference's names of what our parameter ``name`` is made of."""
    part, _, rest = name.partition(".")
    if part == "vision_tower":
        return [f"vision_tower.{rest.removeprefix('model.')}"]
    if part != "language_model":
        return [name]
    rule, layer = find_rule(table, rest)
    return [f"language_model.{source}" for source in rule.source_shapes(layer)]


@pytest.mark.parametrize(
    ("tower", "connector", "language", "layout"),
    [
        ("siglip", "sti", "tied", {"pipeline": 2}),
        ("siglip", "sci", "tied", {"tensor": 2}),
        ("siglip", "none", "llama", {"tensor": 2, "sequence_parallel": True}),
        ("clip", "sti", "llama", {"pipeline": 2}),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "+".join(value),
)
def test_five_steps_of_other_connectors_towers_and_a_tied_head(workers, folders, tower, connector, language, layout):
    """A tied head at PP 2 lies on both stages, whose gradients must be added in every step."""
    job = make_job(folders, tower=tower, connector=connector, language=language, steps=5, **layout)
    reference = parity.run_reference(job)
    results = workers.run(TRAIN, 2, job)
    assert_first_step_equal(job, results, reference)
    assert_curves_equal(job, results, reference)
    assert reference["losses"][0] - reference["losses"][-1] > 0.1


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=["TP2", "PP2"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_learn_as_fp32_does(workers, folders, precision, layout):
    """fp16 keeps 11 bits and bf16 8: losses agree to some 2^-10 and 2^-7 of their size. Nothing overflows."""
    settings = {precision: True, "initial_loss_scale": FITTING_SCALE, **layout}
    job = make_job(folders, language="tied", trainable=ALL_PARTS, steps=5, **settings)
    reference = parity.run_reference(job)
    results = workers.run(TRAIN, 2, job)
    tolerance = {"bf16": 0.02, "fp16": 0.004}[precision]
    for ours, expected in zip(parity.losses(results), reference["losses"], strict=True):
        assert abs(ours - expected) <= tolerance * expected
    assert results[0]["steps_taken"] == [True] * 5
    assert results[0]["loss_scales"] == [FITTING_SCALE if precision == "fp16" else 1.0] * 5


def test_an_overflow_skips_the_step_and_lowers_the_scale(workers, folders):
    """Two overflows in a row halve the scale (megatron-core's hysteresis); only then are steps taken."""
    job = make_job(folders, fp16=True, tensor=2, steps=6, initial_loss_scale=2.0**40)
    results = workers.run(TRAIN, 2, job)
    scales, taken = results[0]["loss_scales"], results[0]["steps_taken"]
    assert (scales[0], taken[0]) == (2.0**40, False)
    assert scales[-1] < scales[0]
    assert all(result["steps_taken"] == taken for result in results), "ranks disagree about an overflow"
    assert parity.losses(results)[1] == parity.losses(results)[0], "a skipped step changed the model"
