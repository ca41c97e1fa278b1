"""POPE's and MME's counts against numbers worked out by hand."""

import json

import pytest

from dc_megatron.errors import UserError
from dc_megatron.evaluation.questions import BenchmarkQuestion
from dc_megatron.evaluation.yes_no_metrics import (
    mme_metrics,
    mme_reading,
    mme_truths,
    pope_metrics,
    pope_truths,
    says_yes,
)


def answer(text, **metadata):
    return {"text": text, "metadata": metadata}


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no, it is not", False),
        ("There is not a dog", False),
        ("It is. No doubt", True),
        ("nothing", True),
        ("NO", True),
    ],
)
def test_popes_reading(text, yes):
    assert says_yes(text) is yes


def pope(tmp_path, categories, labels):
    """Questions of ``categories`` in the file's order, and coco_pope files with ``labels`` of each."""
    questions = []
    for number, category in enumerate(categories):
        facts = {"category": category}
        questions.append(BenchmarkQuestion(number, number, "?", "?", (f"{number}.jpg",), facts=facts))
    for category, own in labels.items():
        images = [q.images[0] for q in questions if q.facts["category"] == category]
        lines = [{"label": label, "image": image} for label, image in zip(own, images, strict=False)]
        (tmp_path / f"coco_pope_{category}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return questions


def test_pope_counts(tmp_path):
    categories = ["random", "popular", "random", "random", "random", "popular"]
    questions = pope(tmp_path, categories, {"random": ["yes", "no", "yes", "no"], "popular": ["yes", "no"]})
    truths = pope_truths(str(tmp_path), questions, "test")
    assert truths == [True, True, False, True, False, False]
    said = [
        answer("Yes"),
        answer("Yes"),
        answer("Yes"),
        answer("no"),
        answer("No."),
        answer("", fault="missing image: x"),
    ]
    metrics = pope_metrics(questions, said, truths)
    # random: yes-yes, no-yes, yes-no, no-no: one of each kind.
    assert metrics["random"] == {"accuracy": 50, "precision": 50, "recall": 50, "f1": 50, "yes_ratio": 50}
    # popular: a right yes, and a question without its picture, whose answer is no: wrong, so a false yes.
    assert metrics["popular"] == {
        "accuracy": 50,
        "precision": 50,
        "recall": 100,
        "f1": pytest.approx(200 / 3),
        "yes_ratio": 100,
    }
    assert metrics["mean_f1"] == pytest.approx((50 + 200 / 3) / 2)


def test_pope_without_a_single_yes(tmp_path):
    questions = pope(tmp_path, ["random"] * 2, {"random": ["yes", "no"]})
    truths = pope_truths(str(tmp_path), questions, "test")
    assert pope_metrics(questions, [answer("no"), answer("no")], truths)["random"]["f1"] == 0


def test_popes_labels_of_other_questions_are_refused(tmp_path):
    questions = pope(tmp_path, ["random"] * 2, {"random": ["yes", "no"]})
    with pytest.raises(UserError, match="2 labels and 1 questions of the category random"):
        pope_truths(str(tmp_path), questions[:1], "test")
    with pytest.raises(UserError, match=r"0\.jpg where question 1 is about 1\.jpg"):
        pope_truths(str(tmp_path), questions[::-1], "test")


def mme(root):
    release = root / "MME"
    (release / "count").mkdir(parents=True)
    (release / "count" / "001.txt").write_text(
        "Is there one dog?  Please answer yes or no.\tYes\nAre there two dogs? Please answer yes or no.\tNo\n"
    )
    (release / "count" / "002.txt").write_text(
        "Is there a cat? Please answer yes or no.\tYes\nIs there a cow? Please answer yes or no.\tNo\n"
    )
    inner = release / "code_reasoning" / "questions_answers_YN"
    inner.mkdir(parents=True)
    inner.joinpath("7.txt").write_text(
        "Is it Python? Please answer yes or no.\tYes\nIs it C? Please answer yes or no.\tNo\n"
    )
    suffix = "\nAnswer the question using a single word or phrase."
    asked = [
        ("count/001.png", f"Is there one dog?  Please answer yes or no.{suffix}"),
        ("count/001.png", f"Are there two dogs?{suffix}"),
        ("count/002.png", f"Is there a cat?{suffix}"),
        ("count/002.png", f"Is there a cow?{suffix}"),
        ("code_reasoning/images/7.png", f"Is it Python?{suffix}"),
        ("code_reasoning/images/7.png", f"Is it C?{suffix}"),
    ]
    return str(release), [BenchmarkQuestion(n, i, p, p, ("x",)) for n, (i, p) in enumerate(asked)]


def test_mme_scores(tmp_path):
    release, questions = mme(tmp_path)
    truths = mme_truths(release, questions, "test")
    assert [right for _, right in truths] == ["Yes", "No"] * 3
    assert truths[0][0] == "Is there one dog?  Please answer yes or no."
    said = [answer(text) for text in ("Yes", "no", "Yes, a cat", "yes", "perhaps", "No")]
    metrics = mme_metrics(questions, said, truths)
    # count: 3 of 4 answers, 1 of 2 pictures; code: 1 of 2, no picture.
    assert metrics["categories"] == {"count": 75 + 50, "code_reasoning": 50}
    assert (metrics["perception"], metrics["cognition"]) == (125, 50)


@pytest.mark.parametrize(
    ("text", "read"), [("Yes", "yes"), ("Noyes", "no"), ("no.", "no"), ("It is no", "other"), ("", "other")]
)
def test_mmes_reading(text, read):
    assert mme_reading(text) == read


def test_an_mme_question_that_is_not_in_the_release(tmp_path):
    release, questions = mme(tmp_path)
    stranger = BenchmarkQuestion(0, "count/001.png", "Who?", "Who?", ("x",))
    with pytest.raises(UserError, match=r"no answer to question count/001\.png: 'Who\? Please"):
        mme_truths(release, [*questions, stranger], "test")
