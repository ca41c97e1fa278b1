"""Estimated memory: against the four peaks that were measured, and how it changes with what Megatron divides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig, Qwen2Config, Qwen3Config

from dc_megatron.benchmark.step_workload import read_workload
from dc_megatron.config import LanguageConfig
from dc_megatron.planner.memory import FIXED, Numbers, Recompute, Run, largest_stage, passes_in_flight, stage_memory

# Moments and gradients in bf16 beside 16-bit remainders of the master weights, and Megatron's defaults.
LEAN, PLAIN = Numbers(gradient=2, optimizer=6), Numbers()


def run(stage: int, **more) -> Run:
    """The measured runs of benchmarks/results/7b_stage*_h200.json."""
    work = read_workload(f"7b-stage{stage}")
    return replace(
        Run(
            language=work.language_config,
            vision=work.vision_config,
            connector=work.connector_config,
            trainable=tuple(work.trainable),
            numbers=LEAN if stage == 2 else PLAIN,
            positions=8192,
            images=10 if stage == 2 else 13,
            stages=((32,),),
            micro_batches=4,
        ),
        **more,
    )


def fp8(numbers: Numbers) -> Numbers:
    return replace(numbers, fp8=True)


@pytest.mark.parametrize(
    ("stage", "numbers", "gigabytes"),
    [(2, LEAN, 103.92), (2, fp8(LEAN), 112.99), (1, PLAIN, 39.99), (1, fp8(PLAIN), 52.95)],
)
def test_the_measured_peaks(stage, numbers, gigabytes):
    memory = stage_memory(run(stage, numbers=numbers), 0)
    # Half a percent; the docstring says a tenth of a gigabyte or two.
    assert memory.allocated == pytest.approx(gigabytes * 1e9, rel=0.005)
    assert memory.total == memory.allocated + FIXED


def test_what_does_not_learn_has_weights_only():
    memory = stage_memory(run(1), 0)
    width = 4096
    connector = 3 * 1024 * width + width + width**2 + width
    assert memory.gradients == 4 * connector
    assert memory.optimizer == 12 * connector
    # 6.74 billion of the language model, 0.3 of the tower.
    assert memory.weights == pytest.approx(2 * 7.07e9, rel=0.01)


def test_data_parallel_ranks_share_the_optimizer_if_they_are_told_to():
    alone, sharing = (
        stage_memory(run(2, data=4, numbers=n), 0) for n in (PLAIN, replace(PLAIN, shards_optimizer=True))
    )
    assert sharing.optimizer == alone.optimizer / 4
    assert sharing.gradients == alone.gradients


def test_tensor_parallel_ranks_share_layers_and_with_sequence_parallel_the_norms_too():
    whole, half, all_halved = (
        stage_memory(run(2, tensor=tensor, sequence_parallel=sequence), 0)
        for tensor, sequence in ((1, False), (2, False), (2, True))
    )
    # Tower and connector are whole on each of them.
    assert half.weights == pytest.approx(whole.weights / 2, rel=0.05)
    assert 0.55 * whole.activations < half.activations < 0.7 * whole.activations
    assert all_halved.activations == pytest.approx(whole.activations / 2, rel=0.02)


def test_a_tower_on_all_stages_weighs_on_each_and_keeps_the_features_of_a_step_on_the_first():
    stages = ((16,), (16,))
    alone, everywhere = (
        [stage_memory(run(2, stages=stages, tower_on_all_stages=on), stage) for stage in (0, 1)] for on in (False, True)
    )
    assert everywhere[0].weights == alone[0].weights
    assert everywhere[1].weights - alone[1].weights == pytest.approx(2 * 0.29e9, rel=0.02)
    # 10 pictures of 576 places of three times 1024 channels, of 4 micro-batches where else 2 are under way.
    assert everywhere[0].images - alone[0].images == (4 - 2) * 10 * 576 * 3 * 1024 * 2
    assert everywhere[1].images == alone[1].images == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_recomputing_keeps_less(stage):
    plain = run(stage)
    ways = (Recompute(), Recompute("selective"), Recompute("full", 31), Recompute("full", 32))
    memories = [stage_memory(plain, 0, way) for way in ways]
    kept = [memory.activations + memory.images for memory in memories]
    assert kept == sorted(kept, reverse=True)
    # Inputs of 32 layers, the final norm's, and what the connector keeps.
    layer_input = 8192 * 4096 * 2
    assert 34 * layer_input < kept[-1] < 38 * layer_input


def test_a_frozen_model_keeps_no_inputs_of_its_linear_layers():
    learning, frozen = (stage_memory(run(2, trainable=t), 0) for t in (("connector", "llm"), ("connector",)))
    difference = 2 * (2 * 4096 + 11008) * 8192 * 32
    assert learning.activations - frozen.activations == pytest.approx(difference)


def test_stages_keep_what_is_under_way():
    split = run(2, stages=((8,), (8,), (8,), (8,)))
    memories = [stage_memory(split, stage) for stage in range(4)]
    assert memories[0].activations > memories[1].activations > memories[2].activations
    assert memories[1].activations == pytest.approx(memories[2].activations * 3 / 2)
    assert largest_stage(split) == memories[0]
    # Tower, connector and embedding here, the head there, neither between.
    assert memories[1].weights < min(memories[0].weights, memories[3].weights)
    few = replace(split, micro_batches=1)
    assert stage_memory(few, 1).activations == stage_memory(few, 2).activations


@pytest.mark.parametrize(
    ("pipeline", "stage", "micro_batches", "virtual", "expected"),
    [(4, 0, 8, 1, 4), (4, 3, 8, 1, 1), (4, 0, 2, 1, 2), (4, 0, 8, 2, 11), (4, 3, 8, 2, 5), (4, 0, 4, 2, 8)],
)
def test_passes_in_flight(pipeline, stage, micro_batches, virtual, expected):
    assert passes_in_flight(pipeline, stage, micro_batches, virtual) == expected


def test_a_tied_head_is_one_table_with_the_embedding_on_the_same_stage_only():
    def tables(tied: bool, stages) -> float:
        language = replace(run(2).language, tie_word_embeddings=tied)
        one = run(2, language=language, stages=stages)
        return sum(stage_memory(one, stage).weights for stage in range(len(stages)))

    table = 2 * 32000 * 4096
    assert tables(False, ((32,),)) - tables(True, ((32,),)) == table
    assert tables(False, ((16,), (16,))) == tables(True, ((16,), (16,)))


@pytest.mark.parametrize(
    "config",
    [
        PhiConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, partial_rotary_factor=0.4),
        Qwen2Config(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                    num_key_value_heads=2),
        Qwen3Config(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_key_value_heads=8),
        LlamaConfig(),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_parameters_of_every_family_are_those_of_transformers(config):
    """Vocabularies of these sizes need no padding."""
    language = LanguageConfig.from_config(config.to_dict(), "test")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = config.num_hidden_layers

    def learning(*stages) -> float:
        split = run(2, language=language, stages=stages, trainable=("llm",), numbers=Numbers(gradient=1))
        return sum(stage_memory(split, stage).gradients for stage in range(len(stages)))

    expected = sum(parameter.numel() for parameter in model.parameters())
    assert learning((layers,)) == learning((layers - 1,), (1,)) == expected


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_rows_hold_all_keys_and_values_and_a_part_of_the_rest(ranks):
    whole, part = stage_memory(run(2), 0), stage_memory(run(2, context=ranks), 0)
    keys_and_values = 32 * 8192 * 2 * 4096 * 2
    assert part.activations == (whole.activations - keys_and_values) / ranks + keys_and_values
    assert (part.weights, part.gradients, part.images) == (whole.weights, whole.gradients, whole.images)
    # They are replicas of the weights, which share the optimizer where it is shared.
    assert stage_memory(run(2, context=ranks, numbers=replace(LEAN, shards_optimizer=True)), 0).optimizer < (
        1.01 * whole.optimizer / ranks
    )
