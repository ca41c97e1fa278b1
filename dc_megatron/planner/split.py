"""Decoder layers over pipeline stages, so that the slowest stage is as fast as can be: the first one also has the tower
and the connector, the last one the head."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig
from dc_megatron.errors import UserError
from dc_megatron.planner.flops import step_flops

# Time of an operation beside one of the decoder's in bf16, from the shares of time and of operations in
# benchmarks/results/7b_stage2_h200.json: tower 1.95, head 1.56, connector 0.98, and in FP8 the decoder alone is faster.
_TOWER, _HEAD, _FP8_SPEED = 1.95, 1.56, 1.6


@dataclass(frozen=True)
class StageCosts:
    """Times of one micro-batch, forward and backward, in any one unit: tower and connector, a decoder layer, head.

    The embedding looks rows up and computes nothing: it counts as no time.
    """

    front: float
    layer: float
    head: float


@dataclass(frozen=True)
class PipelineSplit:
    """stages: decoder layers of each stage's chunks. words: for Megatron's parser, none where an even split is best.

    times: of the stages, beside the slowest one's 1. even_time: slowest stage of an even split beside this one's; None
    where the layers cannot be divided evenly. bubble: share of a step in which a stage waits for the others.
    """

    stages: tuple[tuple[int, ...], ...]
    words: tuple[str, ...]
    times: tuple[float, ...]
    even_time: float | None
    bubble: float


def stage_costs(
    language: LanguageConfig,
    vision: VisionConfig,
    connector: ConnectorConfig,
    *,
    lengths: Sequence[int],
    images: float,
    supervised_tokens: float,
    trainable: Sequence[str],
    tensor: int = 1,
    fp8: bool = False,
    tower_on_all_stages: bool = False,
) -> StageCosts:
    """Costs for a micro-batch of samples of ``lengths`` positions with ``images`` tiles together.

    Layers, head and tower are shared by ``tensor`` ranks, the connector is not. Where all stages encode images, they do
    so before the pipeline begins, and no stage is slower for it.
    """
    flops = step_flops(
        language,
        vision,
        connector,
        lengths=lengths,
        images=images,
        supervised_tokens=supervised_tokens,
        trainable=trainable,
    )
    linears = flops.language_model / (_FP8_SPEED if fp8 else 1)
    return StageCosts(
        front=(0 if tower_on_all_stages else _TOWER * flops.tower) + tensor * flops.connector,
        layer=(linears + flops.attention) / language.num_hidden_layers,
        head=_HEAD * flops.head,
    )


def bubble(pipeline: int, micro_batches: int, virtual: int = 1) -> float:
    """Share of a step in which a stage of 1F1B waits: (p - 1) / (m v + p - 1) for equal stages.

    Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters" (2021), section 2.2, where it
    stands as a part of the useful time.
    """
    return (pipeline - 1) / (micro_batches * virtual + pipeline - 1)


def balanced_split(
    costs: StageCosts, layers: int, pipeline: int, micro_batches: int, virtual: int = 1
) -> PipelineSplit:
    """The split whose slowest stage takes the least time; of equals an even one, or else the most alike.

    Every chunk gets a layer at least. UserError where there are not that many.
    """
    refuse_too_few_layers(layers, pipeline, virtual)
    counts = min(_candidates(layers, pipeline, virtual), key=lambda one: _rank(costs, one, virtual))
    stages = tuple(_chunks(costs, count, stage, pipeline, virtual) for stage, count in enumerate(counts))
    times = stage_times(costs, counts)
    even = None if layers % (pipeline * virtual) else stage_times(costs, _even(layers, pipeline))
    return PipelineSplit(
        stages=stages,
        words=_words(stages, virtual),
        times=tuple(time / max(times) for time in times),
        even_time=max(even) / max(times) if even else None,
        bubble=bubble(pipeline, micro_batches, virtual),
    )


def refuse_too_few_layers(layers: int, pipeline: int, virtual: int = 1) -> None:
    """UserError where a chunk would have no layer."""
    if layers < pipeline * virtual:
        chunks = f" with {virtual} virtual stages each" if virtual > 1 else ""
        raise UserError(
            f"--pipeline-split auto: --pipeline-model-parallel-size {pipeline}{chunks} is more than the {layers} layers"
            f" of the model; use at most {max(1, layers // virtual)}"
        )


def _even(layers: int, pipeline: int) -> tuple[int, ...]:
    return (layers // pipeline,) * pipeline


def _candidates(layers: int, pipeline: int, virtual: int) -> Iterator[tuple[int, ...]]:
    """Every number for the first and the last stage; those between share the rest, the later ones what is over.

    The earlier a stage, the more micro-batches it keeps.
    """
    if pipeline == 1:
        yield (layers,)
        return
    between = pipeline - 2
    for first in range(virtual, layers - virtual * (pipeline - 1) + 1):
        for last in range(virtual, layers - first - virtual * between + 1):
            rest = layers - first - last
            if not between and rest:
                continue
            each, over = divmod(rest, between) if between else (0, 0)
            yield (first, *([each] * (between - over)), *([each + 1] * over), last)


def stage_times(costs: StageCosts, counts: Sequence[int]) -> list[float]:
    """Of a micro-batch on each stage with so many decoder layers, in the unit of ``costs``."""
    times = [costs.layer * count for count in counts]
    times[0] += costs.front
    times[-1] += costs.head
    return times


def _rank(costs: StageCosts, counts: tuple[int, ...], virtual: int) -> tuple:
    """What to minimise: the slowest stage (to nine digits: sums in another order do not count), then unevenness."""
    times = stage_times(costs, counts)
    slowest = max(times)
    even = len(set(counts)) == 1 and counts[0] % virtual == 0
    return float(f"{slowest:.9g}"), not even, sum(time**2 for time in times)


def _chunks(costs: StageCosts, count: int, stage: int, pipeline: int, virtual: int) -> tuple[int, ...]:
    """A stage's layers over its chunks, so that these take alike times: one after the other to the fastest chunk."""
    if virtual == 1:
        return (count,)
    chunks = [1] * virtual
    extra = [0.0] * virtual
    extra[0] += costs.front if stage == 0 else 0
    extra[-1] += costs.head if stage == pipeline - 1 else 0
    for _ in range(count - virtual):
        fastest = min(range(virtual), key=lambda chunk: extra[chunk] + costs.layer * chunks[chunk])
        chunks[fastest] += 1
    return tuple(chunks)


def _words(stages: tuple[tuple[int, ...], ...], virtual: int) -> tuple[str, ...]:
    """Megatron 0.19.2 knows a number for the first and for the last stage, the others being equal, or a whole layout.

    With virtual stages it is a layout, which then says how many there are: transformer_config.py asks for multiples
    otherwise.
    """
    if len({chunk for chunks in stages for chunk in chunks}) == 1:
        return ()
    counts = [chunks[0] for chunks in stages]
    if virtual == 1 and len(set(counts[1:-1])) <= 1:
        first, last = str(counts[0]), str(counts[-1])
        return ("--decoder-first-pipeline-num-layers", first, "--decoder-last-pipeline-num-layers", last)
    pieces = [f"t*{chunks[number]}" for number in range(virtual) for chunks in stages]
    return ("--pipeline-model-parallel-layout", f"E{'|'.join(pieces)}L")


def stages_of_layout(layout: str, pipeline: int) -> tuple[tuple[int, ...], ...]:
    """Decoder layers of each stage's chunks, of Megatron's ``--pipeline-model-parallel-layout``.

    As megatron-core's pipeline_parallel_layer_layout.py reads it: "Et*3|(tt|)*2tL"; t is a layer, | ends a chunk.
    """
    text = re.sub(r"\(([^)]+)\)\*(\d+)", lambda found: found[1] * int(found[2]), layout.replace(",", ""))
    text = re.sub(r"(.)\*(\d+)", lambda found: found[1] * int(found[2]), text)
    chunks = [piece.count("t") for piece in text.split("|")]
    return tuple(tuple(chunks[stage::pipeline]) for stage in range(pipeline))
