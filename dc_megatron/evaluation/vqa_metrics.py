"""Open questions with short answers: TextVQA and GQA. No torch."""

from __future__ import annotations

import re

from dc_megatron.evaluation.annotation_files import not_those, read_json
from dc_megatron.evaluation.questions import BenchmarkQuestion
from dc_megatron.evaluation.vqa_text import vqa_accuracy


def textvqa_truths(path: str, questions: list[BenchmarkQuestion], split: str) -> list[list[str]] | None:
    """Ten people's answers to each question, found by picture and words as the original does."""
    if not path:
        return None
    content = read_json(path)
    entries = content.get("data") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise not_those(path, "no list `data` in it")
    answers = {(str(entry["image_id"]), entry["question"].lower()): entry["answers"] for entry in entries}
    keys = [(str(question.identifier), bare_question(question.prompt).lower()) for question in questions]
    absent = [key for key in keys if key not in answers]
    if absent:
        raise not_those(path, f"{len(absent)} questions are not in it, the first is {absent[0][1]!r} of {absent[0][0]}")
    return [answers[key] for key in keys]


def bare_question(prompt: str) -> str:
    """The question alone, out of LLaVA's prompts with or without OCR tokens."""
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return found.group(1) if found else prompt
    lines = prompt.split("\n")
    return lines[1] if lines[0].startswith("Reference OCR token:") and len(lines) > 1 else lines[0]


def textvqa_metrics(questions: list[BenchmarkQuestion], answers: list[dict], truths: list[list[str]]) -> dict:
    """VQA accuracy."""
    scores = [vqa_accuracy(answer["text"], truth) for answer, truth in zip(answers, truths, strict=True)]
    return {"accuracy": 100 * sum(scores) / len(scores)}


def gqa_truths(path: str, questions: list[BenchmarkQuestion], split: str) -> list[str] | None:
    if not path:
        return None
    content = read_json(path)
    identifiers = [str(question.identifier) for question in questions]
    absent = [name for name in identifiers if not isinstance(content, dict) or "answer" not in content.get(name, {})]
    if absent:
        raise not_those(path, f"{len(absent)} questions have no answer in it, the first is {absent[0]}")
    return [content[name]["answer"] for name in identifiers]


def gqa_prediction(text: str) -> str:
    """What the original hands to GQA's own evaluation."""
    return text.rstrip(".").lower()


def gqa_metrics(questions: list[BenchmarkQuestion], answers: list[dict], truths: list[str]) -> dict:
    """Exact matches."""
    right = sum(gqa_prediction(answer["text"]) == truth for answer, truth in zip(answers, truths, strict=True))
    return {"accuracy": 100 * right / len(answers)}
