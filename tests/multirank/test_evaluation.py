"""A benchmark at TP1, TP2, PP2 and DP2, stopped and continued on another layout."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import pytest

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig
from dc_megatron.evaluation.run_benchmark import Request
from dc_megatron.inference.source import Source
from dc_megatron.weights.projector_files import write_projector
from tests.helpers.workspace import make_workspace
from tests.multirank import parity

LAYOUTS = {"TP1": (1, 1, 1), "TP2": (2, 1, 2), "PP2": (1, 2, 2), "DP2": (1, 1, 2)}
SUFFIX = "\nAnswer the question using a single word or phrase."
WORKER = "tests.multirank.evaluation_worker:evaluate"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(source, request without a folder, root): nine questions, two of which have pictures that cannot be used."""
    root = tmp_path_factory.mktemp("evaluation")
    workspace = make_workspace(root, records=7)
    vision, connector = VisionConfig.from_folder(workspace["clip"]), ConnectorConfig("dci")
    width = LanguageConfig.from_folder(workspace["llama"]).hidden_size
    write_projector(str(root / "projector"), parity.connector_state(vision, connector, width), connector, vision)
    whole = (root / "images" / "1.jpg").read_bytes()
    (root / "images" / "cut.jpg").write_bytes(whole[:-100])
    pictures = ["1.jpg", "2.jpg", "absent.jpg", "4.jpg", "cut.jpg", "5.jpg", None, "1.jpg", "2.jpg"]
    lines = []
    for number, picture in enumerate(pictures):
        line = {"question_id": f"{number:03}", "text": f"What is in picture {number}?{SUFFIX}"}
        lines.append({**line, "image": picture} if picture else line)
    (root / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "gqa.json").write_text(json.dumps({line["question_id"]: {"answer": "x"} for line in lines}))
    source = Source(
        model_name_or_path=workspace["llama"],
        vision_tower=workspace["clip"],
        projector=str(root / "projector"),
        version="v1",
    )
    request = Request(
        "gqa",
        str(root / "questions.jsonl"),
        "",
        image_folder=workspace["images"],
        annotations=str(root / "gqa.json"),
        max_new_tokens=5,
        batch_size=2,
        image_backend="pil",
    )
    return source, request, root


def run(workers, setting, folder: str, layout: str, **more):
    source, request, root = setting
    tensor, pipeline, world = LAYOUTS[layout]
    source = replace(source, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    batches = more.pop("batches", None)
    request = replace(request, output_dir=str(root / folder), **more)
    return workers.run(WORKER, world, source, request, batches)


def answers(setting, folder: str) -> list[dict]:
    path = setting[2] / folder / "answers.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(workers, setting) -> list[dict]:
    """The answers of one process, one question at a time."""
    ((summary, asked),) = run(workers, setting, "alone", "TP1", batch_size=1)
    assert (summary["questions"], asked) == (9, 9)
    assert summary["faults"] == {"missing image": 1, "corrupt image": 1}
    return answers(setting, "alone")


def test_answers_have_the_layout_of_the_original(setting, alone):
    assert [a["question_id"] for a in alone] == [f"{n:03}" for n in range(9)]
    for number, one in enumerate(alone):
        assert list(one) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
        assert one["prompt"] == f"What is in picture {number}?{SUFFIX}"
        assert one["model_id"] == "llama"
    assert len({a["answer_id"] for a in alone}) == 9
    texts = [a["text"] for a in alone]
    assert (texts[2], texts[4]) == ("", "")
    # A random model says something, and not always the same.
    assert len(set(texts)) > 3
    assert "absent.jpg" in alone[2]["metadata"]["fault"]
    assert alone[4]["metadata"] == {"fault": "corrupt image: cut.jpg"}
    predictions = json.loads((setting[2] / "alone" / "testdev_balanced_predictions.json").read_text())
    assert [p["questionId"] for p in predictions] == [a["question_id"] for a in alone]


@pytest.mark.parametrize("layout", ["TP2", "PP2", "DP2"])
def test_every_layout_gives_the_same_answers(workers, setting, alone, layout):
    results = run(workers, setting, layout, layout)
    assert answers(setting, layout) == alone
    asked = [asked for _, asked in results]
    assert asked == ([5, 4] if layout == "DP2" else [9, 9])
    assert all(summary == {} for summary, _ in results[1:])


def test_a_run_that_was_stopped_goes_on_at_another_layout(workers, setting, alone):
    stopped = run(workers, setting, "stopped", "DP2", batches=1)
    assert stopped == [("stopped", 2), ("stopped", 2)]
    with open(setting[2] / "stopped" / "parts" / "00001.jsonl", "ab") as file:
        file.write(b'{"number": 8, "answer": {"text": "ha')
    (summary, asked), _ = run(workers, setting, "stopped", "TP2")
    # Of four that were answered one had no picture, and is asked again.
    assert (summary["answered_before"], asked) == (3, 6)
    assert answers(setting, "stopped") == alone


def test_what_is_answered_is_not_asked_again(workers, setting, alone):
    ((summary, asked),) = run(workers, setting, "alone", "TP1", batch_size=1)
    assert (summary["answered_before"], asked) == (7, 2)
    assert answers(setting, "alone") == alone
    assert summary["metrics"] == {"accuracy": 0.0}


def test_a_table_with_its_pictures_inside(workers, setting):
    root = setting[2]
    encoded = [base64.b64encode((root / "images" / name).read_bytes()).decode() for name in ("1.jpg", "2.jpg")]
    rows = [f"5\tWhich?\t\tred\tblue\tgreen\tA\t{encoded[0]}", f"9\tWhat?\tLook.\tx\ty\t\tB\t{encoded[1]}"]
    table = root / "mmbench.tsv"
    table.write_text("index\tquestion\thint\tA\tB\tC\tanswer\timage\n" + "".join(row + "\n" for row in rows))
    more = {"benchmark": "mmbench", "question_file": str(table), "annotations": "", "all_rounds": True}
    ((summary, asked), _) = run(workers, setting, "table", "DP2", **more)
    given = answers(setting, "table")
    assert [(a["question_id"], a["round_id"], a["options"][0]) for a in given] == [
        (5, 0, "red"),
        (5, 1, "blue"),
        (5, 2, "green"),
        (9, 0, "x"),
        (9, 1, "y"),
    ]
    # Two batches of two on one rank, the last question on the other.
    assert (summary["questions"], summary["faults"], asked) == (5, {}, 3)
    assert set(summary["metrics"]) == {"accuracy", "round_accuracy", "categories"}
    lines = (root / "table" / "mmbench_upload.tsv").read_text().splitlines()
    assert len(lines) == 3
    assert "prediction" in lines[0]
    assert encoded[0] not in lines[1]
