"""Questions for a yes or a no: POPE and MME. No torch."""

from __future__ import annotations

import os
from collections import defaultdict

from dc_megatron.errors import UserError
from dc_megatron.evaluation.annotation_files import not_those, read_json_lines
from dc_megatron.evaluation.answers_folder import is_faulty
from dc_megatron.evaluation.benchmarks import SHORT
from dc_megatron.evaluation.questions import BenchmarkQuestion

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_YES_OR_NO = "Please answer yes or no."


def pope_truths(path: str, questions: list[BenchmarkQuestion], split: str) -> list[bool] | None:
    """Whether each question's answer is yes: those of a category in the order of its ``coco_pope_*.json``."""
    if not path:
        return None
    if not os.path.isdir(path):
        raise not_those(path, "not a folder with coco_pope_*.json")
    truths: dict[int, bool] = {}
    for category, asked in _by_category(questions).items():
        file = os.path.join(path, f"coco_pope_{category}.json")
        entries = read_json_lines(file)
        if len(entries) != len(asked):
            raise not_those(file, f"{len(entries)} labels and {len(asked)} questions of the category {category}")
        for question, entry in zip(asked, entries, strict=True):
            if entry.get("image", question.images[0]) != question.images[0]:
                raise not_those(
                    file, f"{entry['image']} where question {question.identifier} is about {question.images[0]}"
                )
            truths[question.number] = entry["label"] != "no"
    return [truths[question.number] for question in questions]


def says_yes(text: str) -> bool:
    """POPE's reading of an answer: all is a yes that has no "no" in its first sentence."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def pope_metrics(questions: list[BenchmarkQuestion], answers: list[dict], truths: list[bool]) -> dict:
    """For each category, and their mean F1, which is what papers quote."""
    metrics = {}
    for category, asked in _by_category(questions).items():
        pairs = [(_said(answers[q.number], truths[q.number]), truths[q.number]) for q in asked]
        metrics[category] = _pope_counts(pairs)
    return {**metrics, "mean_f1": sum(values["f1"] for values in metrics.values()) / len(metrics)}


def _said(answer: dict, truth: bool) -> bool:
    """A question that could not be asked has an empty answer, which would be read as a yes: it counts as wrong."""
    return not truth if is_faulty(answer) else says_yes(answer["text"])


def _pope_counts(pairs: list[tuple[bool, bool]]) -> dict[str, float]:
    """(said yes, is yes) of each question; a share without a denominator is 0."""
    right_yes = sum(said and true for said, true in pairs)
    said_yes, is_yes = sum(said for said, _ in pairs), sum(true for _, true in pairs)
    precision = right_yes / said_yes if said_yes else 0.0
    recall = right_yes / is_yes if is_yes else 0.0
    both = precision + recall
    return {
        "accuracy": 100 * sum(said == true for said, true in pairs) / len(pairs),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * 2 * precision * recall / both if both else 0.0,
        "yes_ratio": 100 * said_yes / len(pairs),
    }


def _by_category(questions: list[BenchmarkQuestion]) -> dict[str, list[BenchmarkQuestion]]:
    categories = defaultdict(list)
    for question in questions:
        category = question.facts.get("category")
        if not isinstance(category, str) or not question.images:
            raise UserError(f"--question_file: question {question.identifier} has no `category` or no `image`")
        categories[category].append(question)
    return dict(categories)


def mme_file(question: BenchmarkQuestion) -> tuple[str, str]:
    """(category, name of the text file) of a question, whose id is ``category/.../picture.jpg``."""
    parts = str(question.identifier).split("/")
    return parts[0], parts[-1].split(".")[0] + ".txt"


def mme_words(prompt: str) -> str:
    """The question as MME's own files have it, up to its spaces: one before the last sentence, or two."""
    words = prompt.replace(SHORT, "").strip()
    return words if _YES_OR_NO in words else f"{words} {_YES_OR_NO}"


def mme_truths(path: str, questions: list[BenchmarkQuestion], split: str) -> list[tuple[str, str]] | None:
    """(question as MME writes it, ``Yes`` or ``No``) of each question, from the folders of its release."""
    if not path:
        return None
    known = _mme_answers(path)
    truths = []
    for question in questions:
        found = known.get((*mme_file(question), _without_spaces(mme_words(question.prompt))))
        if found is None:
            raise not_those(path, f"no answer to question {question.identifier}: {mme_words(question.prompt)!r}")
        truths.append(found)
    return truths


def _mme_answers(path: str) -> dict[tuple[str, str, str], tuple[str, str]]:
    known = {}
    for category in sorted(os.listdir(path)) if os.path.isdir(path) else []:
        folder = os.path.join(path, category)
        inner = os.path.join(folder, "questions_answers_YN")
        folder = inner if os.path.isdir(inner) else folder
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            if name.endswith(".txt"):
                for words, answer in _mme_lines(os.path.join(folder, name)):
                    known[category, name, _without_spaces(words)] = (words, answer)
    return known


def _mme_lines(path: str) -> list[tuple[str, str]]:
    with open(path, encoding="utf-8") as file:
        lines = [line.strip().split("\t") for line in file if line.strip()]
    if any(len(parts) != 2 for parts in lines):
        raise not_those(path, "a line is not a question, a tab and an answer")
    return [(words, answer) for words, answer in lines]


def _without_spaces(words: str) -> str:
    return " ".join(words.split())


def mme_reading(text: str) -> str:
    """``yes``, ``no`` or ``other``, as MME's calculation reads the first letters."""
    words = text.strip().lower()
    if words in ("yes", "no"):
        return words
    start = words[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_metrics(questions: list[BenchmarkQuestion], answers: list[dict], truths: list[tuple[str, str]]) -> dict:
    """Scores: of a category accuracy plus the accuracy of pictures whose two questions are both right, 0 to 200."""
    pictures: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for question, answer, (_, truth) in zip(questions, answers, truths, strict=True):
        category, name = mme_file(question)
        pictures[category][name].append(mme_reading(answer["text"]) == truth.lower())
    scores = {}
    for category, own in pictures.items():
        singles = [right for two in own.values() for right in two]
        scores[category] = 100 * sum(singles) / len(singles) + 100 * sum(all(two) for two in own.values()) / len(own)
    return {
        "perception": sum(scores.get(category, 0.0) for category in PERCEPTION),
        "cognition": sum(scores.get(category, 0.0) for category in COGNITION),
        "categories": scores,
    }
