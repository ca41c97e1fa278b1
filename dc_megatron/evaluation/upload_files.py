"""Answers in the layouts that other programs read: evaluation scripts and servers of the benchmarks. No torch.

MMBench's server takes a spreadsheet, which the original writes through pandas and openpyxl. Here it is the same columns
as a tab-separated table, which spreadsheet programs and ``pandas.read_table`` open.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import defaultdict

from dc_megatron.evaluation.answers_folder import ANSWERS
from dc_megatron.evaluation.benchmarks import Benchmark
from dc_megatron.evaluation.mmbench_table import read_table
from dc_megatron.evaluation.mmmu_metrics import chosen_letter
from dc_megatron.evaluation.questions import BenchmarkQuestion, options_of
from dc_megatron.evaluation.vqa_metrics import gqa_prediction
from dc_megatron.evaluation.yes_no_metrics import mme_file
from dc_megatron.weights.durable_files import write_file

# Columns that the original drops, and where it puts the prediction.
_NOT_FOR_MMBENCH = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_PLACE = 6


def write_upload_files(
    folder: str,
    benchmark: Benchmark,
    question_file: str,
    questions: list[BenchmarkQuestion],
    answers: list[dict],
    truths: list | None,
) -> list[str]:
    """Names of the files below ``folder`` that hold the answers, ``answers.jsonl`` (already there) first.

    truths: of ``metrics.annotations_of``.
    """
    made = {
        "gqa": lambda: {"testdev_balanced_predictions.json": _gqa(answers)},
        "mme": lambda: _mme(questions, answers, truths),
        "mmbench": lambda: {"mmbench_upload.tsv": _mmbench(question_file, answers)},
        "mmbench_cn": lambda: {"mmbench_upload.tsv": _mmbench(question_file, answers)},
        "mmvet": lambda: {"mmvet_results.json": _json({_mmvet_name(a["question_id"]): a["text"] for a in answers})},
        "mmmu": lambda: {"mmmu_output.json": _mmmu(questions, answers)},
    }.get(benchmark.name, dict)()
    for name, text in made.items():
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        write_file(os.path.join(folder, name), text.encode())
    return [ANSWERS, *made]


def _json(content) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _gqa(answers: list[dict]) -> str:
    return _json([{"questionId": str(a["question_id"]), "prediction": gqa_prediction(a["text"])} for a in answers])


def _mmvet_name(identifier) -> str:
    name = str(identifier)
    return name if name.startswith("v1_") else f"v1_{name}"


def _mme(
    questions: list[BenchmarkQuestion], answers: list[dict], truths: list[tuple[str, str]] | None
) -> dict[str, str]:
    """A file a category for MME's calculation: the picture's text file, question, right answer, answer.

    None without annotations: the right answer is a column of it.
    """
    lines = defaultdict(list)
    for question, answer, (words, right) in zip(questions, answers, truths or [], strict=truths is not None):
        category, name = mme_file(question)
        lines[category].append("\t".join((name, words, right, _one_line(answer["text"]))))
    return {f"mme/{category}.txt": "\n".join(own) + "\n" for category, own in lines.items()}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _mmbench(question_file: str, answers: list[dict]) -> str:
    """The table without pictures and hints, with the first round's answer to every row."""
    predictions = {str(a["question_id"]): a["text"] for a in reversed(answers) if a["round_id"] == 0}
    rows = read_table(question_file)
    columns = [name for name in rows[0] if name not in _NOT_FOR_MMBENCH]
    columns.insert(_PREDICTION_PLACE, "prediction")
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, delimiter="\t", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "prediction": predictions[row["index"]]} for row in rows)
    return out.getvalue()


def _mmmu(questions: list[BenchmarkQuestion], answers: list[dict]) -> str:
    """id -> letter where the answer names one of the question's options, else the answer."""
    output = {}
    for question, answer in zip(questions, answers, strict=True):
        options = options_of(question.facts)
        letter = chosen_letter(answer["text"], len(options), options) if options else ""
        output[str(question.identifier)] = letter or answer["text"]
    return _json(output)
