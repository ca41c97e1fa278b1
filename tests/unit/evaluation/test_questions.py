"""Question files of benchmarks: what is asked, with which pictures, and what is refused."""

import base64
import json

import pytest

from dc_megatron.errors import UserError
from dc_megatron.evaluation.benchmarks import LETTER, SHORT, benchmark_of
from dc_megatron.evaluation.mmbench_table import table_questions
from dc_megatron.evaluation.questions import read_questions


@pytest.fixture
def ask(tmp_path):
    def call(content, benchmark="other", name="q.json", image_name=""):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_questions(str(path), benchmark_of(benchmark), image_name)

    return call


def test_llavas_lines(ask):
    lines = [
        {"question_id": "p", "image": "p.jpg", "text": "What?\nReference OCR token: x\nAnswer.", "category": "default"},
        {"question_id": "p", "image": "p.jpg", "text": "Who?"},
    ]
    first, second = ask("\n".join(map(json.dumps, lines)) + "\n", "textvqa", "q.jsonl")
    assert (first.number, first.identifier, first.images) == (0, "p", ("p.jpg",))
    assert first.asked == first.prompt == lines[0]["text"]
    assert (second.number, second.identifier) == (1, "p")


def test_scienceqas_records(ask):
    content = [
        {"id": "4", "image": "4/image.png", "conversations": [{"from": "human", "value": "Which?\n<image>"}]},
        {"id": "5", "conversations": [{"from": "human", "value": "Why?"}]},
    ]
    with_picture, without = ask(content, "sqa")
    assert with_picture.asked == f"Which?\n{LETTER}"
    # The mark in the answers file is what the original's metric tells the two kinds by.
    assert with_picture.prompt == f"<image>\nWhich?\n{LETTER}"
    assert without.prompt == without.asked == f"Why?\n{LETTER}"
    assert without.images == ()


def test_vqas_questions(ask):
    content = {"questions": [{"question_id": 9, "image_id": 42, "question": "How many?"}]}
    (question,) = ask(content, image_name="COCO_val2014_{image_id:012}.jpg")
    assert (question.identifier, question.images) == (9, ("COCO_val2014_000000000042.jpg",))
    with pytest.raises(UserError, match="record 0: has an image_id and no `image`"):
        ask(content)
    with pytest.raises(UserError, match=r"--image_name .*does not fit 42"):
        ask(content, image_name="{name}.jpg")


def test_mmmus_questions(ask):
    content = [
        {
            "id": "a",
            "question": "Is <image 2> like <image 1>?",
            "options": "['yes', 'no']",
            "image": ["1.png", "2.png"],
        },
        {"id": "b", "question": "How long?", "options": [], "image": "3.png"},
    ]
    choice, open_one = ask(content, "mmmu")
    assert choice.asked == f"Is <image> like <image>?\n\n(A) yes\n(B) no\n\n{LETTER}"
    assert choice.images == ("2.png", "1.png")
    assert open_one.asked == f"How long?\n\n{SHORT}"


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("[]", "q.json", "holds no question"),
        ("", "q.jsonl", "holds no question"),
        ('{"a": 1}', "q.json", "neither a list of questions"),
        ('{"text": "x"}\n{"text": \n', "q.jsonl", r"q.jsonl: line 2: not JSON"),
        ("[3]", "q.json", "record 0: a int, not an object"),
        ('[{"image": "a.jpg"}]', "q.json", "record 0: no text"),
        ('[{"text": "x", "image": 3}]', "q.json", "record 0: `image` is neither"),
        ('[{"text": "<image> <image>", "image": "a.jpg"}]', "q.json", "2 <image> marks and 1 pictures"),
    ],
)
def test_what_cannot_be_asked_is_refused(ask, content, name, words):
    with pytest.raises(UserError, match=words):
        ask(content, name=name)


def test_an_unknown_benchmark_gets_the_nearest():
    with pytest.raises(UserError, match="textvqa"):
        benchmark_of("textvqq")


ROWS = (
    "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\n"
    "1\tWhich?\tLook.\tred\tblue\tgreen\t\tB\tcolour\t{picture}\n"
    "1000001\tWhich?\tnan\tblue\tred\t\t\tA\tcolour\t1\n"
    "2\tWhat?\t\tx\ty\t\t\tA\tcolour\t\n"
)


def test_mmbenchs_table(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_text(ROWS.format(picture=base64.b64encode(b"bytes of a picture").decode()))
    questions, pictures = table_questions(str(path), benchmark_of("mmbench"), all_rounds=False)
    assert [question.identifier for question in questions] == [1, 1000001, 2]
    assert questions[0].prompt == "Look.\nWhich?\nA. red\nB. blue\nC. green"
    assert questions[0].asked == f"{questions[0].prompt}\n{LETTER}"
    assert questions[1].prompt == "Which?\nA. blue\nB. red"
    assert pictures.read("1") == b"bytes of a picture"
    # A row that names another one has its picture.
    assert pictures.open("1000001").read() == b"bytes of a picture"
    with pytest.raises(FileNotFoundError):
        pictures.read("2")


def test_rounds_move_the_options_up(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_text(ROWS.format(picture="AAAA"))
    questions, _ = table_questions(str(path), benchmark_of("mmbench"), all_rounds=True)
    assert [(q.identifier, q.answer_fields["round_id"]) for q in questions[:4]] == [
        (1, 0),
        (1, 1),
        (1, 2),
        (1000001, 0),
    ]
    assert questions[1].prompt == "Look.\nWhich?\nA. blue\nB. green\nC. red"
    assert questions[1].answer_fields == {
        "round_id": 1,
        "options": ["blue", "green", "red"],
        "option_char": ["B", "C", "A"],
    }


def test_a_file_that_is_no_table(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_text("index\tquestion\n1\tWhich?\n")
    with pytest.raises(UserError, match="no column A, B, image"):
        table_questions(str(path), benchmark_of("mmbench"), all_rounds=False)
