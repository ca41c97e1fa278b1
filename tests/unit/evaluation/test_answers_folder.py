"""Answers that gather in a folder: none is lost or doubled, whatever stops a run."""

import json

import pytest

from dc_megatron.errors import UserError
from dc_megatron.evaluation.answers_folder import AnswersFolder
from dc_megatron.evaluation.benchmarks import benchmark_of
from dc_megatron.evaluation.questions import BenchmarkQuestion
from dc_megatron.evaluation.upload_files import write_upload_files

IDENTITY = {"question_file": "a", "model": "b"}


def answer(text, **metadata):
    return {"text": text, "metadata": metadata}


def opened(tmp_path, **more):
    return AnswersFolder(str(tmp_path), more.pop("identity", IDENTITY), **more)


def test_a_run_goes_on_where_it_stood(tmp_path):
    folder = opened(tmp_path)
    part = folder.part(0)
    part.add([(0, answer("a")), (3, answer("ü\nd"))])
    folder.part(1).add([(1, answer("b"))])
    # Killed in the middle of a line, and nothing was closed.
    with open(tmp_path / "parts" / "00000.jsonl", "ab") as file:
        file.write(b'{"number": 2, "answer": {"te')
    del folder

    folder = opened(tmp_path)
    assert sorted(folder.answered) == [0, 1, 3]
    # With another number of ranks: what was rank 1's file stays, and counts.
    folder.part(0).add([(2, answer("c"))])
    assert [a["text"] for a in folder.collect(4)] == ["a", "b", "c", "ü\nd"]
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["a", "b", "c", "ü\nd"]


def test_a_missing_answer_is_said(tmp_path):
    folder = opened(tmp_path)
    folder.part(0).add([(0, answer("a"))])
    with pytest.raises(UserError, match="1 of 2 answers are not there"):
        folder.collect(2)


def test_an_answer_takes_the_place_of_a_fault(tmp_path):
    folder = opened(tmp_path)
    folder.part(1).add([(0, answer("", fault="missing image: a.jpg"))])
    folder.part(1).add([(0, answer("a"))])
    folder.part(2).add([(0, answer("", fault="missing image: a.jpg"))])
    assert folder.collect(1) == [answer("a")]


def test_answers_of_another_run_are_refused(tmp_path):
    opened(tmp_path).part(0).add([(0, answer("a"))])
    other = {**IDENTITY, "model": "c", "bf16": True}
    with pytest.raises(UserError, match=r"another run \(model, bf16 changed\).*--restart"):
        opened(tmp_path, identity=other)
    folder = opened(tmp_path, identity=other, restart=True)
    assert folder.answered == {}
    assert not list((tmp_path / "parts").iterdir())


def test_two_runs_do_not_share_a_folder(tmp_path):
    first = opened(tmp_path)
    with pytest.raises(UserError, match="another run is at work"):
        opened(tmp_path)
    # Other ranks of the same run are not another one.
    assert opened(tmp_path, first=False).answered == first.answered


def upload(tmp_path, name, answers, questions=None, truths=None, question_file=""):
    questions = questions or [BenchmarkQuestion(n, a["question_id"], "?", "?") for n, a in enumerate(answers)]
    files = write_upload_files(str(tmp_path), benchmark_of(name), question_file, questions, answers, truths)
    assert files[0] == "answers.jsonl"
    return {file: (tmp_path / file).read_text() for file in files[1:]}


def test_layouts_for_other_programs(tmp_path):
    answers = [{"question_id": "20", "text": "Red."}, {"question_id": "21", "text": "no"}]
    files = upload(tmp_path, "gqa", answers)
    assert json.loads(files["testdev_balanced_predictions.json"]) == [
        {"questionId": "20", "prediction": "red"},
        {"questionId": "21", "prediction": "no"},
    ]
    files = upload(tmp_path, "mmvet", [{"question_id": 0, "text": "a"}, {"question_id": "v1_1", "text": "b"}])
    assert json.loads(files["mmvet_results.json"]) == {"v1_0": "a", "v1_1": "b"}
    assert upload(tmp_path, "textvqa", answers) == {}


def test_mmes_layout_holds_what_is_right(tmp_path):
    answers = [{"question_id": "OCR/1.jpg", "text": "Yes\nsir"}, {"question_id": "OCR/1.jpg", "text": "No"}]
    truths = [("Is it? Please answer yes or no.", "Yes"), ("Isn't it? Please answer yes or no.", "No")]
    files = upload(tmp_path, "mme", answers, truths=truths)
    assert files == {
        "mme/OCR.txt": "1.txt\tIs it? Please answer yes or no.\tYes\tYes sir\n"
        "1.txt\tIsn't it? Please answer yes or no.\tNo\tNo\n"
    }
    assert upload(tmp_path, "mme", answers) == {}


def test_mmmus_layout_has_letters(tmp_path):
    facts = {"options": ["cat", "dog"]}
    questions = [BenchmarkQuestion(0, "a", "?", "?", facts=facts), BenchmarkQuestion(1, "b", "?", "?")]
    answers = [{"question_id": "a", "text": "(B) dog"}, {"question_id": "b", "text": "3 m"}]
    files = upload(tmp_path, "mmmu", answers, questions)
    assert json.loads(files["mmmu_output.json"]) == {"a": "B", "b": "3 m"}


def test_mmbenchs_table_is_the_file_without_pictures(tmp_path):
    table = tmp_path / "dev.tsv"
    columns = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment"
    table.write_text(f"{columns}\n7\tWhich?\th\tx\ty\tz\tw\tA\tc\tAAAA\ts\tl\tm\n")
    answers = [
        {"question_id": 7, "round_id": 0, "text": "A"},
        {"question_id": 7, "round_id": 1, "text": "B"},
    ]
    files = upload(tmp_path, "mmbench", answers, question_file=str(table))
    assert files["mmbench_upload.tsv"] == (
        "index\tquestion\tA\tB\tC\tD\tprediction\tanswer\n7\tWhich?\tx\ty\tz\tw\tA\tA\n"
    )
