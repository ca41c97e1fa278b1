"""The benchmarks that tools/evaluate.py knows: how they are asked, and what their annotations are. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from dc_megatron.config import one_of

LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class Benchmark:
    """``suffix``: a line that is put behind every question (LLaVA's question files hold it for the others).

    ``suffix_is_shown``: the ``prompt`` of an answer has it too, as the original's script for that benchmark writes it.
    ``new_tokens``: the longest answer. ``annotations``: what --annotations names, "" where there is nothing to name.
    ``needs_judge``: its score is given by another model, so only answers are written.
    """

    name: str
    suffix: str = ""
    suffix_is_shown: bool = True
    new_tokens: int = 128
    annotations: str = ""
    needs_judge: bool = False


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("textvqa", annotations="TextVQA_0.5.1_val.json"),
        Benchmark("gqa", annotations="testdev_balanced_questions.json"),
        Benchmark("sqa", suffix=LETTER, annotations="the folder of problems.json and pid_splits.json"),
        Benchmark("pope", annotations="the folder of coco_pope_*.json"),
        Benchmark("mme", annotations="the folder MME_Benchmark_release_version"),
        Benchmark("mmbench", suffix=LETTER, suffix_is_shown=False),
        Benchmark("mmbench_cn", suffix="请直接回答选项字母。", suffix_is_shown=False),
        Benchmark("mmvet", new_tokens=1024, needs_judge=True),
        Benchmark("mmmu", annotations="answer_dict_val.json"),
        Benchmark("other", new_tokens=1024),
    )
}


def benchmark_of(name: str) -> Benchmark:
    """UserError that names the nearest known one."""
    return BENCHMARKS[one_of(name, tuple(BENCHMARKS), "--benchmark")]
