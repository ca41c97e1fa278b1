"""--recompute and --pipeline-split: their words, what contradicts them, and what auto decides for a run."""

from __future__ import annotations

import shlex
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dc_megatron.config import ConnectorConfig, VisionConfig, image_tiling
from dc_megatron.errors import UserError
from dc_megatron.planner.memory import Numbers
from dc_megatron.runtime import device
from dc_megatron.training.arguments import typed_options
from dc_megatron.training.argv import translate
from dc_megatron.training.auto_choices import (
    Chosen,
    choose,
    micro_batch,
    numbers,
    refuse_impossible_auto,
    typed_stages,
)
from tests.helpers.language_shapes import LLAMA

VISION = VisionConfig(
    "clip", 32, 64, 4, 4, 28, 14, "quick_gelu", 1e-5, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)
)
GIGABYTE = 10**9


def engine(line: str) -> list[str]:
    return translate(shlex.split(line)).megatron_argv


def checked(line: str, **shape) -> SimpleNamespace:
    translation = translate(shlex.split(line))
    return SimpleNamespace(
        translation=translation,
        settings=translation.settings,
        language=replace(LLAMA, **shape),
        vision=VISION,
        connector=ConnectorConfig("none"),
        tiling=image_tiling(VISION, ConnectorConfig("none")),
        start=SimpleNamespace(words=translation.megatron_argv),
        lora=None,
    )


def data(tiles: int = 1) -> SimpleNamespace:
    """Samples of 10 and 30 positions, packed to rows of 64, five eighths full."""
    rows = SimpleNamespace(statistics=lambda: SimpleNamespace(fill=0.625, seq_length=64, tiles_mean=2.5, tiles_max=4))
    summary = SimpleNamespace(tokens=40, supervised_tokens=10)
    index = SimpleNamespace(lengths=np.array([10, 30]), tiles=np.array([0, 2 * tiles]), summary=summary)
    steps = SimpleNamespace(
        micro_batch_size=1,
        seq_length=64,
        accumulation_steps=4,
        data_parallel_size=2,
        context_parallel_size=1,
        replicas=2,
    )
    return SimpleNamespace(rows=rows, index=index, steps=steps)


def test_words_of_what_is_not_auto():
    full = shlex.split("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    selective = shlex.split("--recompute-granularity selective --recompute-modules mlp")
    for line, expected in (
        ("", []),
        ("--recompute none", []),
        ("--recompute auto", []),
        ("--recompute selective", selective),
        ("--recompute full", full),
        ("--gradient_checkpointing True", full),
        ("--gradient_checkpointing True --recompute full", full),
        ("--gradient_checkpointing True --recompute auto --gradient_checkpointing False", []),
    ):
        words = engine(line)
        start = words.index("--recompute-granularity") if expected else 0
        assert words[start : start + len(expected)] == expected, line
        assert sum(word.startswith("--recompute") for word in words) == len(expected) // 2, line


def test_megatrons_finer_words_add_to_ours():
    options = typed_options(engine("--recompute full --recompute-method block --recompute-num-layers 3"))
    assert (options["--recompute-method"], options["--recompute-num-layers"]) == (["block"], ["3"])
    assert options["--recompute-granularity"] == ["full"]
    options = typed_options(engine("--recompute selective --recompute-modules core_attn"))
    assert options["--recompute-modules"] == ["core_attn"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--recompute auto --gradient_checkpointing True", ["--recompute auto", "--gradient_checkpointing True"]),
        ("--recompute none --gradient_checkpointing True", ["--recompute none contradicts"]),
        ("--recompute auto --recompute-granularity full", ["--recompute auto", "--recompute-granularity full"]),
        ("--recompute auto --recompute-num-layers 2", ["--recompute-num-layers 2", "leave one"]),
        ("--recompute full --recompute-granularity selective", ["--recompute full", "leave one"]),
        ("--recompute none --recompute-activations", ["--recompute none beside --recompute-activations:"]),
        ("--recompute al", ["unknown", "none, selective, full, auto"]),
        (
            "--pipeline-split auto --decoder-first-pipeline-num-layers 2",
            ["--pipeline-split auto", "--decoder-first-pipeline-num-layers 2", "leave one"],
        ),
        ("--pipeline_split auto --pipeline-model-parallel-layout Et|tL", ["Et|tL"]),
        ("--pipeline-split even --account-for-loss-in-pipeline-split", ["--account-for-loss-in-pipeline-split:"]),
    ],
)
def test_contradictions_are_refused(line, words):
    with pytest.raises(UserError) as refused:
        translate(shlex.split(line))
    for word in words:
        assert word in str(refused.value)


def test_auto_divides_layers_that_do_not_come_out_even():
    assert translate(["--pipeline-split", "auto"]).settings.uneven_pipeline
    assert not translate(["--pipeline-split", "even"]).settings.uneven_pipeline


def test_nothing_is_chosen_unasked():
    assert choose(checked("--pipeline-model-parallel-size 2"), None, GIGABYTE) == Chosen()


def test_the_split_and_its_note():
    chosen = choose(
        checked("--pipeline-split auto --pipeline-model-parallel-size 3", num_hidden_layers=7), data(), None
    )
    assert chosen.words[0] == "--decoder-first-pipeline-num-layers"
    (note,) = chosen.notes
    assert note.startswith("--pipeline-split auto: layers ")
    assert "estimated times of the stages" in note
    assert "bubble 33 % of a step (3 stages, 4 micro-batches)" in note
    one = choose(checked("--pipeline-split auto"), data(), None)
    assert (one.words, one.notes) == ((), ("--pipeline-split auto: there is one pipeline stage, which has all layers",))


def test_a_heavy_tower_takes_layers_from_the_first_stage():
    line = "--pipeline-split auto --pipeline-model-parallel-size 2 --packing none"
    light, heavy = (choose(checked(line, num_hidden_layers=8), data(tiles), None) for tiles in (1, 500))
    assert int(heavy.words[1]) < 4
    assert int(heavy.words[1]) + int(heavy.words[3]) == 8
    assert not light.words or int(light.words[1]) > int(heavy.words[1])
    assert "(as many each: the slowest takes " in heavy.notes[0]


def test_a_layout_stands_for_the_virtual_stages_that_were_typed():
    line = "--pipeline-split auto --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --seed 3"
    case = checked(line, num_hidden_layers=5)
    chosen = choose(case, data(), None)
    assert chosen.words[0] == "--pipeline-model-parallel-layout"
    words = chosen.applied(case.start.words)
    assert words[:2] == list(chosen.words)
    assert "--num-virtual-stages-per-pipeline-rank" not in words
    assert words[words.index("--seed") :][:2] == ["--seed", "3"]


def test_recompute_follows_the_gpu():
    case = checked("--recompute auto --bf16 True")
    for memory, words in ((80 * GIGABYTE, ()), (1 * GIGABYTE, ("--recompute-granularity", "full"))):
        chosen = choose(case, data(), memory)
        assert chosen.words[:2] == words
        assert f"{memory / GIGABYTE:.1f} GB of this GPU" in chosen.notes[0]
    assert choose(case, data(), None).words == ()
    assert choose(case, data(), None).notes == (
        "--recompute auto: none, since there is no GPU here whose memory could be too small",
    )


def test_recompute_knows_that_stage_2_shares_its_optimizer_unless_told_not_to():
    def needed(line: str) -> float:
        note = choose(checked(f"--recompute auto --bf16 True {line}", hidden_size=4096), data(), 200 * GIGABYTE).notes[
            0
        ]
        return float(note.split("about ")[1].split(" GB")[0])

    shared, alone = needed(""), needed("--use-distributed-optimizer False")
    assert alone > shared
    assert needed("--use-distributed-optimizer") == shared


def test_recompute_counts_the_layers_of_the_split_that_is_chosen():
    line = "--recompute auto --pipeline-split auto --pipeline-model-parallel-size 2"
    chosen = choose(checked(line, num_hidden_layers=7), data(), GIGABYTE)
    assert chosen.words[::4] == (
        "--decoder-first-pipeline-num-layers",
        "--recompute-granularity",
        "--recompute-num-layers",
    )
    assert [note.split(":")[0] for note in chosen.notes] == ["--pipeline-split auto", "--recompute auto"]


def test_too_many_stages_are_refused_before_the_data_is_read():
    settings = translate(shlex.split("--pipeline-split auto --pipeline-model-parallel-size 8")).settings
    with pytest.raises(UserError, match="8 is more than the 4 layers"):
        refuse_impossible_auto(settings, LLAMA, [])
    words = ["--num-layers-per-virtual-pipeline-stage", "3"]
    with pytest.raises(UserError, match=r"--num-layers-per-virtual-pipeline-stage 3: 4 layers are no multiple"):
        refuse_impossible_auto(replace(settings, pipeline_model_parallel_size=2), LLAMA, words)
    refuse_impossible_auto(replace(settings, pipeline_split="even"), LLAMA, [])


def test_what_a_micro_batch_holds():
    packed, single = micro_batch(data(), packed=True), micro_batch(data(), packed=False)
    assert (packed.positions, packed.most_positions, packed.images, packed.most_images) == (40, 64, 2.5, 4)
    assert (single.positions, single.most_positions, single.images, single.most_images) == (20, 64, 1, 2)
    assert packed.supervised == 10
    # A position sees samples of 10 and 30 in proportion to their lengths.
    assert packed.length == (100 + 900) / 40


LEAN = "--use-precision-aware-optimizer --use-distributed-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", Numbers(4, 4, 8)),
        ("--bf16 True", Numbers(2, 4, 12)),
        ("--bf16 True --use-distributed-optimizer", Numbers(2, 4, 12, True)),
        ("--bf16 True --grad-reduce-in-bf16", Numbers(2, 2, 12)),
        (f"--bf16 True --main-grads-dtype bf16 {LEAN}", Numbers(2, 2, 6, True)),
        ("--bf16 True --use-precision-aware-optimizer", Numbers(2, 4, 10)),
        ("--fp16 True", Numbers(2, 2, 12)),
        ("--bf16 True --fp8-format hybrid", Numbers(2, 4, 12, fp8=True)),
    ],
)
def test_bytes_of_a_number(line, expected):
    translation = translate(shlex.split(line))
    assert numbers(translation.settings, typed_options(translation.megatron_argv)) == expected


@pytest.mark.parametrize(
    ("line", "virtual", "expected"),
    [
        ("", 1, ((3,), (3,), (3,))),
        ("--decoder-first-pipeline-num-layers 1", 1, ((1,), (4,), (4,))),
        ("--decoder-first-pipeline-num-layers 2 --decoder-last-pipeline-num-layers 4", 1, ((2,), (3,), (4,))),
        ("--pipeline-model-parallel-layout Et*2|t*4|t*3L", 1, ((2,), (4,), (3,))),
        ("--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split", 1, ((3,), (4,), (3,))),
        ("--decoder-first-pipeline-num-layers 2 --decoder-last-pipeline-num-layers 2", 2, ((1, 1), (3, 3), (1, 1))),
    ],
)
def test_layers_of_the_stages_that_megatrons_flags_make(line, virtual, expected):
    words = shlex.split(line)
    settings = translate(["--pipeline-model-parallel-size", "3", *words]).settings
    layers = sum(map(sum, expected))
    got = typed_stages(typed_options(words), settings, replace(LLAMA, num_hidden_layers=layers), virtual)
    assert got == expected


def test_memory_of_the_gpu(monkeypatch):
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    assert device.memory_bytes() is None
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=80 + index))
    assert device.memory_bytes() == 81
