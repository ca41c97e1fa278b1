"""TextVQA's and GQA's counts against numbers worked out by hand."""

import json

import pytest

from dc_megatron.errors import UserError
from dc_megatron.evaluation.questions import BenchmarkQuestion
from dc_megatron.evaluation.vqa_metrics import (
    bare_question,
    gqa_metrics,
    gqa_prediction,
    gqa_truths,
    textvqa_metrics,
    textvqa_truths,
)
from dc_megatron.evaluation.vqa_text import processed, vqa_accuracy

OCR = "What is the brand?\nReference OCR token: NOKIA, 12\nAnswer the question using a single word or phrase."


def question(number, identifier, prompt):
    return BenchmarkQuestion(number, identifier, prompt, prompt)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("The Two dogs.", "2 dogs"),
        ("dont", "don't"),
        ("couldnt've  and couldn'tve", "couldn't've and couldn't've"),
        ("yalld've twas oclock", "yalld've 'twas o'clock"),
        # A decimal point stays, a full stop goes.
        ("3.5 m.", "3.5 m"),
        # A mark beside a space is dropped, between letters it becomes a space.
        ("red - blue", "red blue"),
        ("red-blue", "red blue"),
        ("1,000", "1000"),
        ("John's", "john 's"),
        ("none", "0"),
        ("a an the", ""),
        ("line\nbreak", "line break"),
    ],
)
def test_answers_are_made_comparable(given, expected):
    assert processed(given) == expected


@pytest.mark.parametrize(
    ("same", "accuracy"),
    # Of ten people ``same`` said it: those compare with same - 1 others, the rest with same.
    [
        (0, 0.0),
        (1, (1 * 0 + 9 / 3) / 10),
        (2, (2 / 3 + 8 * 2 / 3) / 10),
        (3, (3 * 2 / 3 + 7) / 10),
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_accuracy_of_ten_answers(same, accuracy):
    answers = ["nokia"] * same + [f"other {n}" for n in range(10 - same)]
    assert vqa_accuracy("Nokia.", answers) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (OCR, "What is the brand?"),
        ("What is the brand?\nAnswer the question using a single word or phrase.", "What is the brand?"),
        ("Reference OCR token: NOKIA\nWhat is the brand?\nAnswer.", "What is the brand?"),
        ("OCR tokens: NOKIA. Question: What is the brand? Short answer:", "What is the brand?"),
    ],
)
def test_the_question_is_found_in_a_prompt(prompt, expected):
    assert bare_question(prompt) == expected


def test_textvqa_finds_answers_by_picture_and_words(tmp_path):
    path = tmp_path / "TextVQA.json"
    entries = [
        {"image_id": "p1", "question": "what is the brand?", "answers": ["nokia"] * 10},
        {"image_id": "p1", "question": "which year?", "answers": ["1999"] * 3 + ["2000"] * 7},
    ]
    path.write_text(json.dumps({"data": entries}))
    # TextVQA's ids are those of the pictures, so they repeat.
    questions = [question(0, "p1", OCR), question(1, "p1", "Which year?\nAnswer.")]
    truths = textvqa_truths(str(path), questions, "test")
    answers = [{"text": "Nokia"}, {"text": "1999"}]
    assert textvqa_metrics(questions, answers, truths) == {"accuracy": pytest.approx(100 * (1 + 0.9) / 2)}
    with pytest.raises(UserError, match="1 questions are not in it, the first is 'who\\?' of p1"):
        textvqa_truths(str(path), [question(0, "p1", "Who?\nAnswer.")], "test")


def test_gqa_counts_exact_matches(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"7": {"answer": "yes"}, "8": {"answer": "red"}, "9": {"answer": "left"}}))
    questions = [question(n, str(n + 7), "?") for n in range(3)]
    truths = gqa_truths(str(path), questions, "test")
    answers = [{"text": "Yes."}, {"text": "dark red"}, {"text": "left"}]
    assert gqa_metrics(questions, answers, truths) == {"accuracy": pytest.approx(200 / 3)}
    assert gqa_prediction("Dark Red.") == "dark red"
    with pytest.raises(UserError, match="1 questions have no answer in it, the first is 10"):
        gqa_truths(str(path), [question(0, "10", "?")], "test")
    assert gqa_truths("", questions, "test") is None
