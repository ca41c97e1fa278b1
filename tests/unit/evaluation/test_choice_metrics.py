"""ScienceQA's, MMBench's and MMMU's counts against numbers worked out by hand."""

import json

import pytest

from dc_megatron.errors import UserError
from dc_megatron.evaluation.choice_metrics import (
    letter_of,
    mmbench_metrics,
    mmbench_truths,
    sqa_choice,
    sqa_metrics,
    sqa_truths,
)
from dc_megatron.evaluation.mmmu_metrics import chosen_letter, is_right, mmmu_metrics, mmmu_truths
from dc_megatron.evaluation.questions import BenchmarkQuestion


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", 1),
        ("B.", -1),
        ("B. a frog", 1),
        ("E", -1),
        ("The answer is C.", 2),
        ("It is round. The answer is A", 0),
        ("a frog", -1),
        ("B\nbecause", 1),
    ],
)
def test_scienceqas_reading(text, choice):
    assert sqa_choice(text, 3) == choice


def test_sqa_counts_the_whole_split(tmp_path):
    problems = {str(n): {"choices": ["x", "y", "z"], "answer": n % 3} for n in range(6)}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["0", "1", "2", "3"], "val": ["4"]}))
    questions = [BenchmarkQuestion(n, str(n), "?", "?") for n in range(3)]
    truths = sqa_truths(str(tmp_path), questions, "test")
    answers = [{"text": t, "prompt": p} for t, p in (("A", "<image>\n?"), ("C", "<image>\n?"), ("C. z", "?"))]
    metrics = sqa_metrics(questions, answers, truths)
    # Right: 0 and 2, of a split of 4; of the two with a picture one.
    assert metrics == {"accuracy": 50, "image_accuracy": 50, "not_asked": 1}
    with pytest.raises(UserError, match="3 questions are not in the split val, the first is 0"):
        sqa_truths(str(tmp_path), questions, "val")
    with pytest.raises(UserError, match="no split minival, but test, val"):
        sqa_truths(str(tmp_path), questions, "minival")


def mmbench(identifiers, letters, turns=None, answer="A"):
    questions = []
    for number, index in enumerate(identifiers):
        turn = turns[number] if turns else 0
        facts = {"answer": answer, "category": "ocr" if number < 2 else "shape"}
        fields = {"round_id": turn, "option_char": list("ABC"[turn:] + "ABC"[:turn])}
        questions.append(BenchmarkQuestion(number, index, "?", "?", answer_fields=fields, facts=facts))
    truths = mmbench_truths("", questions, "test")
    return mmbench_metrics(questions, [{"text": letter} for letter in letters], truths), truths


def test_mmbench_of_one_round():
    metrics, _ = mmbench([1, 2, 3], ["A", "B", "(A)"])
    assert metrics["accuracy"] == pytest.approx(200 / 3) == metrics["round_accuracy"]
    assert metrics["categories"] == {"ocr": 50, "shape": 100}


def test_mmbench_of_asked_rounds():
    """Options B, C, A in the second round: what was A stands at C."""
    metrics, truths = mmbench([1, 1, 1, 2, 2, 2], ["A", "C", "B.", "A", "A", "B"], turns=[0, 1, 2] * 2)
    assert truths == ["A", "C", "B"] * 2
    assert (metrics["accuracy"], metrics["round_accuracy"]) == (50, pytest.approx(500 / 6))


def test_mmbench_of_rounds_in_the_file():
    metrics, _ = mmbench([1, 1_000_001, 2, 1_000_002], ["A", "B", "A", "A"])
    assert (metrics["accuracy"], metrics["round_accuracy"]) == (50, 75)


def test_mmbenchs_test_table_has_no_answers():
    question = BenchmarkQuestion(0, 1, "?", "?", answer_fields={"option_char": ["A", "B"]}, facts={"answer": ""})
    assert mmbench_truths("", [question], "test") is None


@pytest.mark.parametrize(
    ("text", "letter"), [("B", "B"), ("B. a", "B"), ("(C) x", "C"), ("Blue", ""), ("", ""), ("E", "")]
)
def test_the_letter_of_an_answer(text, letter):
    assert letter_of(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B) or rather (C)", "C"),
        ("I think A but no: B is right", "B"),
        ("It must surely be the green one then", "B"),
        # Words are looked for in answers of more than five words only.
        ("the green one", ""),
        ("Dog", ""),
    ],
)
def test_mmmus_reading(text, letter):
    assert chosen_letter(text, 3, ["red", "green", "blue"]) == letter


@pytest.mark.parametrize(
    ("text", "truth", "right"),
    [
        ("42", "42", True),
        ("The answer is 42.", "42", True),
        ("x = 41.999", "42.00", True),
        ("41", "42", False),
        ("1,000 dollars", "1000", True),
        ("a harmonic oscillator", "Harmonic", True),
        ("cat", "c", False),
        ("it is c", "c", True),
        ("2e3", "2000", True),
        ("no idea", ["five", "idea"], True),
    ],
)
def test_mmmus_open_questions(text, truth, right):
    assert is_right(text, {"question_type": "short-answer", "ground_truth": truth}, []) is right


def test_mmmu_counts_by_subject(tmp_path):
    path = tmp_path / "answer_dict_val.json"
    truth = {
        "validation_Art_Theory_1": {"question_type": "multiple-choice", "ground_truth": "B"},
        "validation_Art_Theory_2": {"question_type": "multiple-choice", "ground_truth": "A"},
        "validation_Math_9": {"question_type": "short-answer", "ground_truth": "7"},
    }
    path.write_text(json.dumps(truth))
    questions = [BenchmarkQuestion(n, name, "?", "?") for n, name in enumerate(truth)]
    answers = [{"text": "B"}, {"text": "D"}, {"text": "7 apples"}]
    metrics = mmmu_metrics(questions, answers, mmmu_truths(str(path), questions, "test"))
    assert metrics == {"accuracy": pytest.approx(200 / 3), "subjects": {"Art_Theory": 50, "Math": 100}}
    facts = {"answer": "A", "options": "['x', 'y']"}
    alone = [BenchmarkQuestion(0, "dev_Math_1", "?", "?", facts=facts)]
    assert mmmu_truths("", alone, "test") == [{"question_type": "multiple-choice", "ground_truth": "A"}]
    assert mmmu_truths("", questions, "test") is None
