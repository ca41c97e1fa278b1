"""The parts of examples/quickstart: what they write is what the quickstart's numbers rest on."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
from PIL import Image, ImageStat

ROOT = Path(__file__).resolve().parents[3]
PARTS = ROOT / "examples" / "quickstart"
sys.path.insert(0, str(PARTS))

import make_models  # noqa: E402
import photographs  # noqa: E402
import scenes  # noqa: E402
import summary  # noqa: E402

from dc_megatron.config import ConnectorConfig, DataConfig, DataSource, LanguageConfig, VisionConfig, image_tiling  # noqa: E402
from dc_megatron.data.index import sample_from_record  # noqa: E402
from dc_megatron.data.tokenization import load_tokenizer  # noqa: E402
from dc_megatron.errors import UserError  # noqa: E402

ROWS = {"text": 64, "train": 52, "held_out": 52}  # positions of a row in examples/quickstart.sh


def run_part(name: str, *words: str) -> None:
    subprocess.run([sys.executable, PARTS / f"{name}.py", *words], check=True, capture_output=True, cwd=ROOT)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    run_part("make_data", "--out", str(folder), "--pictures", "120", "--texts", "300", "--held-out", "60")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    run_part("make_models", "--out", str(folder))
    return folder


def read(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("place", scenes.PLACES)
@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_a_drawn_scene_shows_its_colour_where_it_says(place, shape):
    for colour, rgb in scenes.COLOURS.items():
        image = scenes.draw(scenes.Scene(colour, shape, place), random.Random(1))
        x, y = (int(scenes.PICTURE_SIZE * centre) for centre in scenes.PLACES[place])
        assert max(abs(a - b) for a, b in zip(image.getpixel((x, y)), rgb, strict=True)) <= 12
        elsewhere = [image.getpixel((int(96 * a), int(96 * b))) for p, (a, b) in scenes.PLACES.items() if p != place]
        assert all(min(pixel) >= 200 for pixel in elsewhere), "background only"


def test_the_description_in_words_has_every_answer_and_no_other():
    rng = random.Random(0)
    for _ in range(200):
        scene = scenes.random_scene(rng)
        words = set(scenes.describe(scene, rng).replace(".", "").split())
        for kind, choices in scenes.ANSWERS.items():
            assert words & set(choices) == {scene.answer(kind)}


def test_every_photograph_is_a_public_one_inside_the_wheel_and_loads_without_a_network():
    for name in photographs.CAPTIONS:
        image = photographs.crop(photographs.load(name), random.Random(0))
        assert image.mode == "RGB"
        assert max(image.size) == photographs.LONGEST_SIDE


def test_pictures_are_jpeg_files_that_exist_and_texts_have_none(data):
    for record in read(data, "train") + read(data, "held_out"):
        with Image.open(data / record["image"]) as image:
            assert image.format == "JPEG"
        assert record["conversations"][0]["value"].startswith("<image>\n")
    for record in read(data, "text"):
        assert "image" not in record
        assert "<image>" not in json.dumps(record)


def test_held_out_pictures_are_not_among_those_trained_on(data):
    def pixels(records):
        return {(data / r["image"]).read_bytes() for r in records if not r["id"].startswith("blank-")}

    held_out = pixels(read(data, "held_out"))
    assert len(held_out) == 180 + len(photographs.CAPTIONS)
    assert not held_out & pixels(read(data, "train"))


def test_without_the_picture_no_answering_beats_a_quarter(data):
    """The best that a model can do on a blank picture: the most frequent answer to every question."""
    answers: dict[str, Counter] = {}
    for record in read(data, "held_out"):
        if record["id"].startswith("blank-"):
            question, answer = (message["value"] for message in record["conversations"])
            answers.setdefault(question, Counter())[answer] += 1
    assert {sum(counts.values()) for counts in answers.values()} == {60}
    best = sum(max(counts.values()) for counts in answers.values()) / 180
    assert best <= 0.25


def test_a_blank_question_is_a_scene_question_with_one_grey_picture(data):
    records = {r["id"]: r for r in read(data, "held_out")}
    blanks = {name: r for name, r in records.items() if name.startswith("blank-")}
    assert len(blanks) == 180
    for name, record in blanks.items():
        assert record["conversations"] == records[name.removeprefix("blank-")]["conversations"]
    (path,) = {r["image"] for r in blanks.values()}
    with Image.open(data / path) as image:
        assert max(ImageStat.Stat(image).stddev) < 1


def test_the_same_seed_writes_the_same_files_and_another_does_not(data, tmp_path):
    sizes = ("--pictures", "120", "--texts", "300", "--held-out", "60")
    run_part("make_data", "--out", str(tmp_path / "same"), *sizes)
    run_part("make_data", "--out", str(tmp_path / "other"), *sizes, "--seed", "1")
    first = {p.relative_to(data): p.read_bytes() for p in data.rglob("*.j*")}
    assert first == {p.relative_to(tmp_path / "same"): p.read_bytes() for p in (tmp_path / "same").rglob("*.j*")}
    assert read(tmp_path / "other", "train") != read(data, "train")


def test_ids_are_sentencepiece_ids_and_the_system_prompt_is_one_of_them(models):
    folder = models / "language_model"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(str(folder), "v1").hugging_face
    text = f"{make_models.SYSTEM_PROMPT} USER: It is purple. What colour is the shape? ASSISTANT: purple"
    ids = tokenizer(text).input_ids
    assert ids == [tokenizer.bos_token_id, *pieces.encode(text)]
    assert len(pieces.encode(make_models.SYSTEM_PROMPT)) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == LanguageConfig.from_folder(str(folder)).vocab_size


def test_random_models_are_the_same_for_the_same_seed(models, tmp_path):
    run_part("make_models", "--out", str(tmp_path))
    for name in ("language_model/model.safetensors", "vision_tower/model.safetensors", "language_model/tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (models / name).read_bytes()


def test_every_record_fits_the_rows_of_the_quickstart(data, models):
    folder = str(models / "language_model")
    vision = VisionConfig.from_folder(str(models / "vision_tower"))
    tiling = image_tiling(vision, ConnectorConfig("dci"))
    tokenizer = load_tokenizer(folder, "v1")
    for name, row in ROWS.items():
        config = DataConfig((DataSource("", str(data)),), folder, "v1", "pad", row, row, tiling)
        for number, record in enumerate(read(data, name)):
            sample = sample_from_record(config, tokenizer, record, number)
            assert not sample.truncated
            assert sample.supervised_tokens >= 2, "the answer and what ends it"


def metrics(losses: list[float]) -> list[dict]:
    same = {"step_seconds": 0.5, "tokens": 98, "positions": 100}
    return [{"iteration": i + 1, "loss": loss, **same} for i, loss in enumerate(losses)]


def answer(name: str, expected: str, given: str) -> dict:
    return {"id": name, "question": "<image>\nWhat is it?", "expected": expected, "answer": given}


ANSWERS = [
    answer("colour-0", "red", " Red."),
    answer("shape-0", "cross", "cross"),
    answer("place-0", "left", "right"),
    answer("place-1", "top", "top"),
    answer("blank-colour-0", "red", "red"),
    answer("blank-shape-0", "cross", "circle"),
    answer("photograph-cat", "a cat", "a cat"),
]


def write_run(run: Path) -> None:
    for name in summary.STAGES:
        (run / name).mkdir(parents=True)
        lines = [json.dumps(entry) for entry in metrics([4.0] * 5 + [2.0] * 3 + [1.0] * 5)]
        (run / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "answers").mkdir()
    exported = [*ANSWERS[:2], answer("place-0", "left", "left"), *ANSWERS[3:]]
    for name, given in (("stage1", ANSWERS), ("stage2", ANSWERS), ("export", exported)):
        (run / "answers" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, given)))
    (run / "data").mkdir()
    held_out = [{"id": record["id"], "image": f"images/{record['id']}.jpg"} for record in ANSWERS]
    (run / "data" / "held_out.json").write_text(json.dumps(held_out))


def run_summary(run: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, PARTS / "summary.py", "--run", run, "--tensor-parallel", "2"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_summary_counts_pictures_and_blanks_apart(tmp_path):
    write_run(tmp_path)
    result = run_summary(tmp_path)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "summary.json").read_text())
    stage = {"first_loss": 4.0, "last_loss": 1.0, "seconds": 6.5, "fill": 0.98}
    assert written == {
        "stages": [
            {"name": "text", **stage, "accuracy": None},
            {"name": "stage1", **stage, "accuracy": 0.75},
            {"name": "stage2", **stage, "accuracy": 0.75},
        ],
        "accuracy": 0.75,
        "accuracy_blank_image": 0.5,
        "accuracy_photographs": 1.0,
        "questions": 7,
        "same_answers_from_the_export": 6,
        "tensor_model_parallel_size": 2,
    }
    with Image.open(tmp_path / "loss.png") as image:
        assert image.width > 1000
    for shown in (
        "colour-0.jpg",
        "photograph-cat.jpg",
        "loss.png",
        "tools/generate.py",
        "4.00 -> 1.00",
        "98.0 %",
        "the same answer to 6 of 7 questions",
        "    What is it?  ->  Red.",
    ):
        assert shown in result.stdout


def test_a_wrong_example_shows_what_was_expected():
    held_out = [{"id": record["id"], "image": "x.jpg"} for record in ANSWERS]
    shown = summary.examples([ANSWERS[2], ANSWERS[6]], held_out, "data")
    content = summary.summarise(
        dict.fromkeys(summary.STAGES, metrics([1.0])), dict.fromkeys(("stage1", "stage2", "export"), ANSWERS), 2
    )
    assert "right   (expected: left)" in summary.first_screen(content, shown, "run")


@pytest.mark.parametrize("content", [None, "", "{broken"])
def test_summary_names_the_file_that_is_missing_or_broken(tmp_path, content):
    write_run(tmp_path)
    path = tmp_path / "answers" / "stage2.jsonl"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"stage2\.jsonl"):
        summary.read_json_lines(str(path))


def test_summary_ends_with_status_two_where_a_stage_did_not_finish(tmp_path):
    result = run_summary(tmp_path)
    assert result.returncode == 2
    assert "text/metrics.jsonl: no such file" in result.stderr


def run_quickstart(**environment: str) -> subprocess.CompletedProcess:
    command = ["bash", "examples/quickstart.sh"]
    # No PATH but the system's: a check that came after the set-up would try to make an environment.
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={"PATH": "/usr/bin:/bin", **environment}, timeout=20
    )


def test_quickstart_leaves_a_folder_alone_that_it_did_not_make(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    result = run_quickstart(QUICKSTART_RUN=str(tmp_path))
    assert result.returncode == 2
    assert "holds other things" in result.stderr
    assert (tmp_path / "data" / "thesis.txt").read_text() == "mine"


def test_quickstart_refuses_a_size_that_is_no_number(tmp_path):
    result = run_quickstart(QUICKSTART_RUN=str(tmp_path / "run"), QUICKSTART_STEPS="many")
    assert result.returncode == 2
    assert "'many'" in result.stderr
