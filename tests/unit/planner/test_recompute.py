"""The least recomputation that fits."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from dc_megatron.benchmark.step_workload import read_workload
from dc_megatron.planner.memory import Numbers, Recompute, Run, largest_stage
from dc_megatron.planner.recompute import SPARE, choose_recompute, recompute_words

_WORK = read_workload("7b-stage2")
RUN = Run(
    language=_WORK.language_config,
    vision=_WORK.vision_config,
    connector=_WORK.connector_config,
    trainable=("connector", "llm"),
    numbers=Numbers(gradient=2, optimizer=6),
    positions=8192,
    images=10,
    stages=((32,),),
    micro_batches=4,
)
SHORT, LONG = 800, 60_000


def gpu(bytes_needed: float) -> int:
    """The smallest GPU into which that fits."""
    return int(bytes_needed / (1 - SPARE)) + 1


def test_nothing_where_it_fits():
    choice = choose_recompute(RUN, SHORT, 150 * 10**9)
    assert (choice.words, choice.extra, choice.fits) == ((), 0.0, True)
    assert choice.why.startswith("nothing is computed again: about 106.9 GB fit into the 150.0 GB")


@pytest.mark.parametrize("layers", [1, 7, 31])
def test_the_smallest_number_of_layers_that_fits(layers):
    memory = gpu(largest_stage(RUN, Recompute("full", layers)).total)
    choice = choose_recompute(RUN, SHORT, memory)
    assert choice.recompute == Recompute("full", layers)
    assert choice.words == tuple(
        shlex.split(f"--recompute-granularity full --recompute-method block --recompute-num-layers {layers}")
    )
    assert choice.extra == layers / 32
    assert f"{layers} of the 32 layers" in choice.why
    # A byte less, and it takes one layer more.
    assert choose_recompute(RUN, SHORT, memory - 4).recompute == Recompute("full", layers + 1)


def test_all_layers_are_uniform():
    memory = gpu(largest_stage(RUN, Recompute("full", 32)).total)
    choice = choose_recompute(RUN, SHORT, memory)
    words = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    assert choice.words == tuple(words.split())
    assert choice.fits
    assert choice.why.startswith("every layer is computed again")


def test_what_cannot_fit_recomputes_everything_and_says_so():
    choice = choose_recompute(RUN, SHORT, 24 * 10**9)
    assert not choice.fits
    assert choice.words[3] == "uniform"
    assert "still too much" in choice.why
    assert "24.0 GB of this GPU" in choice.why


def test_the_mlps_where_attention_over_long_samples_is_the_dearer_part():
    memory = gpu(largest_stage(RUN, Recompute("selective")).total)
    choice = choose_recompute(RUN, LONG, memory)
    assert choice.words == ("--recompute-granularity", "selective", "--recompute-modules", "mlp")
    assert choice.extra < choose_recompute(RUN, SHORT, memory).extra
    assert choose_recompute(RUN, SHORT, memory).recompute.granularity == "full"
    assert "the MLP of every layer is" in choice.why


def test_layers_are_counted_in_each_chunk():
    run = replace(RUN, stages=((4, 4),) * 4, numbers=replace(RUN.numbers, fp8=True))
    memory = gpu(largest_stage(run, Recompute("full", 2)).total)
    choice = choose_recompute(run, SHORT, memory)
    assert choice.words[-1] == "2"
    assert choice.extra == 0.5
    assert "2 of the layers of each chunk" in choice.why


def test_words_of_the_three_ways():
    assert recompute_words(Recompute()) == ()
    assert recompute_words(Recompute("full", 3))[3:] == ("block", "--recompute-num-layers", "3")
    assert recompute_words(Recompute("full"), all_layers=True)[3:] == ("uniform", "--recompute-num-layers", "1")
