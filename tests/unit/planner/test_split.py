"""Layers over pipeline stages: against every split there is, in Megatron's words, as Megatron reads them."""

from __future__ import annotations

from itertools import product

import pytest

from dc_megatron.benchmark.step_workload import read_workload
from dc_megatron.errors import UserError
from dc_megatron.planner.split import (
    StageCosts,
    balanced_split,
    bubble,
    stage_costs,
    stages_of_layout,
)

EVEN = StageCosts(0.0, 1.0, 0.0)


def slowest(costs: StageCosts, counts) -> float:
    times = [costs.layer * count for count in counts]
    times[0] += costs.front
    times[-1] += costs.head
    return max(times)


@pytest.mark.parametrize("costs", [EVEN, StageCosts(0.8, 1, 0.15), StageCosts(4.9, 1, 0.15), StageCosts(0.3, 1, 2.4)])
@pytest.mark.parametrize(("layers", "pipeline"), [(7, 1), (8, 2), (9, 2), (8, 3), (12, 4), (11, 4), (5, 5)])
def test_no_split_has_a_faster_slowest_stage(costs, layers, pipeline):
    split = balanced_split(costs, layers, pipeline, micro_batches=4)
    counts = [chunks[0] for chunks in split.stages]
    assert sum(counts) == layers
    every = (c for c in product(range(1, layers + 1), repeat=pipeline) if sum(c) == layers)
    assert slowest(costs, counts) == pytest.approx(min(slowest(costs, one) for one in every))
    assert max(split.times) == 1


def test_no_words_where_an_even_split_is_as_good():
    split = balanced_split(EVEN, 8, 4, 4)
    assert (split.stages, split.words, split.even_time) == (((2,),) * 4, (), 1.0)
    # The tower is less than a layer here, so giving one away makes another stage the slowest.
    assert balanced_split(StageCosts(0.8, 1, 0.15), 32, 4, 4).words == ()


def test_first_and_last_stage():
    split = balanced_split(StageCosts(3.0, 1.0, 1.0), 12, 4, 4)
    assert split.stages == ((1,), (4,), (4,), (3,))
    assert split.words == ("--decoder-first-pipeline-num-layers", "1", "--decoder-last-pipeline-num-layers", "3")
    assert split.times == (1, 1, 1, 1)
    assert split.even_time == 6 / 4


def test_a_layout_where_the_stages_between_differ():
    split = balanced_split(EVEN, 9, 4, 4)
    assert split.stages == ((2,), (2,), (3,), (2,))
    assert split.words == ("--pipeline-model-parallel-layout", "Et*2|t*2|t*3|t*2L")
    assert split.even_time is None


def test_virtual_stages_get_a_layout_of_alike_chunks():
    split = balanced_split(StageCosts(2.0, 1.0, 1.0), 21, 3, 6, virtual=2)
    assert split.stages == ((2, 4), (4, 4), (4, 3))
    assert split.words == ("--pipeline-model-parallel-layout", "Et*2|t*4|t*4|t*4|t*4|t*3L")
    assert balanced_split(EVEN, 12, 3, 6, virtual=2).words == ()
    # Six layers a stage are even, but two chunks of three stages do not divide them into halves of twelve.
    assert balanced_split(EVEN, 9, 3, 6, virtual=2).stages == ((2, 1),) * 3


@pytest.mark.parametrize("layout", ["Et*2|t*2|t*3|t*2L", "Ett|(tt|)*2,tttL", "E|t*3|(tt|)*4ttt|L"])
def test_a_layout_is_read_as_megatron_reads_it(layout):
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    read = PipelineParallelLayerLayout(layout, 4).layout
    assert stages_of_layout(layout, 4) == tuple(
        tuple(chunk.count(LayerType.decoder) for chunk in chunks) for chunks in read
    )


@pytest.mark.parametrize(
    ("costs", "layers", "pipeline", "virtual"),
    [
        (StageCosts(3, 1, 1), 12, 4, 1),
        (StageCosts(1.5, 1, 0), 9, 2, 1),
        (EVEN, 9, 4, 1),
        (StageCosts(2, 1, 1), 21, 3, 2),
    ],
)
def test_megatron_takes_the_words(costs, layers, pipeline, virtual):
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    names = {
        "--decoder-first-pipeline-num-layers": "num_layers_in_first_pipeline_stage",
        "--decoder-last-pipeline-num-layers": "num_layers_in_last_pipeline_stage",
        "--pipeline-model-parallel-layout": "pipeline_model_parallel_layout",
    }
    words = balanced_split(costs, layers, pipeline, 8, virtual).words
    told = {names[n]: v if v.startswith("E") else int(v) for n, v in zip(words[::2], words[1::2], strict=True)}
    assert told
    TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        **told,
    )


def test_the_bubble():
    assert bubble(1, 8) == 0
    assert bubble(4, 8) == 3 / 11
    assert bubble(4, 8, virtual=2) == 3 / 19
    assert balanced_split(EVEN, 16, 4, 8, virtual=2).bubble == 3 / 19


def test_more_stages_than_layers_are_refused():
    with pytest.raises(UserError, match=r"--pipeline-model-parallel-size 4 is more than the 3 layers.*at most 3"):
        balanced_split(EVEN, 3, 4, 1)
    with pytest.raises(UserError, match=r"2 virtual stages.*at most 3"):
        balanced_split(EVEN, 7, 4, 1, virtual=2)


@pytest.fixture
def costs():
    work = read_workload("7b-stage2")

    def make(**more) -> StageCosts:
        row = {
            "lengths": [800] * 10,
            "images": 10,
            "supervised_tokens": 1200,
            "trainable": ("connector", "llm"),
            **more,
        }
        return stage_costs(work.language_config, work.vision_config, work.connector_config, **row)

    return make


def test_costs_follow_what_a_row_holds(costs):
    plain = costs()
    # Measured: 2.3 % of the time for tower and connector, 0.4 % for the head, beside 93.6 % for 32 layers.
    assert plain.front / plain.layer == pytest.approx(0.023 / 0.936 * 32, rel=0.05)
    assert plain.head / plain.layer == pytest.approx(0.0044 / 0.936 * 32, rel=0.05)
    assert costs(images=20).front == 2 * plain.front
    assert costs(trainable=("connector",)).layer < 0.7 * plain.layer
    assert costs(fp8=True).layer < 0.7 * plain.layer
    assert costs(fp8=True).front == plain.front
    # Images that all stages encode before the pipeline begins leave the connector to the first.
    assert costs(tower_on_all_stages=True).front < 0.15 * plain.front
    # The connector runs whole on every rank of a tensor-parallel group.
    assert costs(tensor=4).front > plain.front
