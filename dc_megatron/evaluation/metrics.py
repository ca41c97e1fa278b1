"""Right answers of a benchmark's questions, and what is counted with them. Percent, but for MME's scores. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dc_megatron.evaluation.benchmarks import Benchmark
from dc_megatron.evaluation.choice_metrics import mmbench_metrics, mmbench_truths, sqa_metrics, sqa_truths
from dc_megatron.evaluation.mmmu_metrics import mmmu_metrics, mmmu_truths
from dc_megatron.evaluation.questions import BenchmarkQuestion
from dc_megatron.evaluation.vqa_metrics import gqa_metrics, gqa_truths, textvqa_metrics, textvqa_truths
from dc_megatron.evaluation.yes_no_metrics import mme_metrics, mme_truths, pope_metrics, pope_truths


@dataclass(frozen=True)
class Metric:
    """``truths(path, questions, split)``: one entry a question, or None where nothing says what is right; UserError
    where the annotations are not those of the questions. ``count(questions, answers, truths)``: name -> value."""

    truths: Callable
    count: Callable


METRICS = {
    "textvqa": Metric(textvqa_truths, textvqa_metrics),
    "gqa": Metric(gqa_truths, gqa_metrics),
    "sqa": Metric(sqa_truths, sqa_metrics),
    "pope": Metric(pope_truths, pope_metrics),
    "mme": Metric(mme_truths, mme_metrics),
    "mmbench": Metric(mmbench_truths, mmbench_metrics),
    "mmbench_cn": Metric(mmbench_truths, mmbench_metrics),
    "mmmu": Metric(mmmu_truths, mmmu_metrics),
}


def annotations_of(benchmark: Benchmark, path: str, split: str, questions: list[BenchmarkQuestion]):
    """What ``metrics_of`` needs, read before any question is asked; None where nothing can be counted."""
    metric = METRICS.get(benchmark.name)
    return None if metric is None else metric.truths(path, questions, split)


def metrics_of(
    benchmark: Benchmark, questions: list[BenchmarkQuestion], answers: list[dict], truths
) -> tuple[dict | None, str]:
    """(metrics, ""), or (None, why nothing was counted)."""
    if benchmark.needs_judge:
        return None, f"{benchmark.name} is scored by a judge model: give it the answers"
    if benchmark.name not in METRICS:
        return None, "a file of its own kind: only answers are written"
    if truths is None:
        wanted = (
            f"--annotations ({benchmark.annotations})" if benchmark.annotations else "an `answer` in the question file"
        )
        return None, f"what is right is not known: it needs {wanted}"
    return METRICS[benchmark.name].count(questions, answers, truths), ""
