"""Questions with lettered options: ScienceQA and MMBench. No torch."""

from __future__ import annotations

import os
import re
from collections import defaultdict

from dc_megatron.data.conversation import IMAGE_MARK
from dc_megatron.evaluation.annotation_files import not_those, read_json
from dc_megatron.evaluation.mmbench_table import ROUND_STEP
from dc_megatron.evaluation.questions import BenchmarkQuestion

_LETTERS = "ABCDE"


def sqa_truths(path: str, questions: list[BenchmarkQuestion], split: str) -> dict[str, dict] | None:
    """The problems of the split by their id."""
    if not path:
        return None
    splits, problems = (read_json(os.path.join(path, name)) for name in ("pid_splits.json", "problems.json"))
    if split not in splits:
        raise not_those(path, f"no split {split}, but {', '.join(splits)}")
    wanted = {str(name): problems[str(name)] for name in splits[split]}
    strange = [str(q.identifier) for q in questions if str(q.identifier) not in wanted]
    if strange:
        raise not_those(path, f"{len(strange)} questions are not in the split {split}, the first is {strange[0]}")
    return wanted


def sqa_choice(text: str, choices: int) -> int:
    """Number of the option that an answer names, -1 where it names none, as the original reads it."""
    words = text.replace("\n", ". ")
    found = re.match(r"([A-E])\. ", words) or re.search(r"The answer is ([A-E])", words)
    letter = words.strip() if words.strip() in tuple(_LETTERS) else found.group(1) if found else ""
    number = _LETTERS.find(letter) if letter else -1
    return number if number < choices else -1


def sqa_metrics(questions: list[BenchmarkQuestion], answers: list[dict], truths: dict[str, dict]) -> dict:
    """Over the whole split: a problem that was not asked counts as wrong, as in the original."""
    right, with_picture = {}, []
    for question, answer in zip(questions, answers, strict=True):
        problem = truths[str(question.identifier)]
        right[str(question.identifier)] = sqa_choice(answer["text"], len(problem["choices"])) == problem["answer"]
        if IMAGE_MARK in answer["prompt"]:
            with_picture.append(str(question.identifier))
    of_pictures = 100 * sum(right[name] for name in with_picture) / len(with_picture) if with_picture else None
    return {
        "accuracy": 100 * sum(right.values()) / len(truths),
        "image_accuracy": of_pictures,
        "not_asked": len(truths) - len(right),
    }


def mmbench_truths(path: str, questions: list[BenchmarkQuestion], split: str) -> list[str] | None:
    """The right letter of each question, of the order in which its options were shown. None: the test's table."""
    letters = [question.facts.get("answer") for question in questions]
    if not all(letter and letter in tuple("ABCD") for letter in letters):
        return None
    shown = []
    for question, letter in zip(questions, letters, strict=True):
        # option_char: the options as they stood, by their letters in the table.
        shown.append("ABCD"[question.answer_fields["option_char"].index(letter)])
    return shown


def letter_of(text: str) -> str:
    """The letter that an answer begins with or consists of; "" where there is none."""
    found = re.match(r"\(?([A-D])(?![A-Za-z])", text.strip())
    return found.group(1) if found else ""


def mmbench_metrics(questions: list[BenchmarkQuestion], answers: list[dict], truths: list[str]) -> dict:
    """``accuracy``: a question is right where all its rounds are. ``round_accuracy``: every round counts by itself.

    Rounds of a question: those that --all_rounds asked, and rows whose index differs by multiples of a million.
    """
    rounds: dict[tuple, list[bool]] = defaultdict(list)
    categories: dict[tuple, str] = {}
    for question, answer, truth in zip(questions, answers, truths, strict=True):
        index = question.identifier
        group = ("number", index % ROUND_STEP) if isinstance(index, int) else ("name", index)
        rounds[group].append(letter_of(answer["text"]) == truth)
        categories[group] = question.facts.get("category") or ""
    by_category = defaultdict(list)
    for group, right in rounds.items():
        by_category[categories[group]].append(all(right))
    flat = [right for one in rounds.values() for right in one]
    return {
        "accuracy": 100 * sum(all(right) for right in rounds.values()) / len(rounds),
        "round_accuracy": 100 * sum(flat) / len(flat),
        "categories": {name: 100 * sum(right) / len(right) for name, right in sorted(by_category.items()) if name},
    }
