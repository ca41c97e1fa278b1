"""MMMU's reading of an answer, and its accuracy. No torch.

The rules are those of the benchmark's own evaluation, but for one: an answer that names no option is wrong here, where
MMMU draws an option at random (which would make a score depend on the order of the questions).
"""

from __future__ import annotations

import re
from collections import defaultdict

from dc_megatron.evaluation.annotation_files import not_those, read_json
from dc_megatron.evaluation.questions import BenchmarkQuestion, options_of

MULTIPLE_CHOICE = "multiple-choice"
_NUMBER_FORMS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
# What stands before the answer in a sentence.
_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def mmmu_truths(path: str, questions: list[BenchmarkQuestion], split: str) -> list[dict] | None:
    """{"question_type", "ground_truth"} of each question: from ``answer_dict_val.json``, else from the questions."""
    if path:
        known = read_json(path)
        absent = [str(q.identifier) for q in questions if str(q.identifier) not in known]
        if absent:
            raise not_those(path, f"{len(absent)} questions are not in it, the first is {absent[0]}")
        return [known[str(question.identifier)] for question in questions]
    if not all("answer" in question.facts for question in questions):
        return None
    truths = []
    for question in questions:
        kind = question.facts.get("question_type") or (MULTIPLE_CHOICE if options_of(question.facts) else "open")
        truths.append({"question_type": kind, "ground_truth": question.facts["answer"]})
    return truths


def mmmu_metrics(questions: list[BenchmarkQuestion], answers: list[dict], truths: list[dict]) -> dict:
    """Of all questions, and of each subject (``validation_Art_Theory_7`` is one of Art_Theory)."""
    subjects = defaultdict(list)
    for question, answer, truth in zip(questions, answers, truths, strict=True):
        subject = re.sub(r"^(validation|dev|test)_|_\d+$", "", str(question.identifier))
        subjects[subject].append(is_right(answer["text"], truth, options_of(question.facts)))
    flat = [right for one in subjects.values() for right in one]
    return {
        "accuracy": 100 * sum(flat) / len(flat),
        "subjects": {name: 100 * sum(right) / len(right) for name, right in sorted(subjects.items())},
    }


def is_right(text: str, truth: dict, options: list[str]) -> bool:
    """options: of the question; where they are not known, letters up to D or the right one are looked for."""
    gold = truth["ground_truth"]
    golds = gold if isinstance(gold, list) else [gold]
    if truth["question_type"] == MULTIPLE_CHOICE:
        count = max(len(options) or 4, *(ord(letter[0]) - ord("A") + 1 for letter in golds))
        return chosen_letter(text, count, options) in golds
    return _open_is_right(text, [str(one) for one in golds])


def chosen_letter(text: str, count: int, options: list[str]) -> str:
    """The option that an answer names: (B), else B by itself, else its words; the last one where it names several."""
    for mark in ",.!?;:'":
        text = text.strip(mark)
    padded = f" {text} "
    letters = [chr(ord("A") + number) for number in range(count)]
    for form in ("({})", " {} "):
        places = {letter: padded.rfind(form.format(letter)) for letter in letters}
        named = [letter for letter in letters if places[letter] >= 0]
        if named:
            return max(named, key=places.get)
    if len(padded.split()) <= 5:
        return ""
    places = {letter: padded.lower().rfind(option.lower()) for letter, option in zip(letters, options, strict=False)}
    named = [letter for letter in places if places[letter] >= 0]
    return max(named, key=places.get) if named else ""


def _open_is_right(text: str, golds: list[str]) -> bool:
    """A right text is part of one of the candidates, or a right number is one of them."""
    wanted = [form for gold in golds for form in _normal(gold)]
    for candidate in _candidates(text):
        if isinstance(candidate, float):
            if candidate in wanted:
                return True
        elif any(isinstance(one, str) and one in candidate for one in wanted):
            return True
    return False


def _candidates(text: str) -> list[str | float]:
    """Ends of sentences that may be the answer, and all numbers in them."""
    ends = _sentence_ends(text.strip().strip(".").lower())
    numbers = [number for end in ends for form in _NUMBER_FORMS for number in re.findall(form, end)]
    return [form for one in [*ends, *numbers] for form in _normal(one)]


def _sentence_ends(text: str) -> list[str]:
    # The text is lower case by now, so MMMU's full stop before a capital never divides; lines do.
    lines = text.split("\n")
    ends = []
    for number, line in enumerate(lines):
        leads = (*_LEADS, "=") if number == len(lines) - 1 else _LEADS
        tails = [line.split(lead)[-1].strip() for lead in leads if lead in line]
        tails = [tail for tail in tails if tail]
        shortest = min(tails, key=len) if tails else ""
        if shortest and shortest not in tuple(":,.!?;'"):
            ends.append(shortest)
    return ends or [text]


def _normal(text: str) -> list[str | float]:
    """A number to two places, else lower case; a single letter with a space on either side, so that it is a word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        pass
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
