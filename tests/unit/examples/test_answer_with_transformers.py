"""examples/quickstart/answer_with_transformers.py on a tiny stock Llava."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from dc_megatron.data.hf_processor import image_token, write_processor
from tests.helpers.data_files import conversation, photo, sentencepiece_tokenizer, vision_config, write_records

PROGRAM = Path(__file__).resolve().parents[3] / "examples" / "quickstart" / "answer_with_transformers.py"
sys.path.insert(0, str(PROGRAM.parent))

import answer_with_transformers  # noqa: E402


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> str:
    base = tmp_path_factory.mktemp("export")
    source = sentencepiece_tokenizer(base / "tokenizer")
    place = image_token(source, 480)
    vision = vision_config("clip", 28)
    torch.manual_seed(0)
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": place.rows, "initializer_range": 0.5}
    tower = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "image_size": 28}
    tower |= {"num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "initializer_range": 0.5}
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=place.token_id,
        image_seq_length=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    folder = str(base / "export")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    write_processor(
        folder,
        tokenizer_folder=source,
        vision=vision,
        tokens_per_image=vision.num_patches,
        version="v1",
        image_aspect_ratio="pad",
        image_token_id=place.token_id,
        vocab_rows=place.rows,
        model_max_length=512,
    )
    return folder


@pytest.fixture
def questions(tmp_path) -> list[dict]:
    records = [
        {"id": "one", "image": "a.png", "conversations": conversation("<image>\nWhat is in the picture?", "A circle.")},
        {"image": ["a.png", "b.png"], "conversations": conversation("Compare <image> and <image>.", "x", "y", "z")},
        {"id": 7, "conversations": conversation("Hello", "no")[:1]},
        {"id": "two", "image": "b.png", "conversations": conversation("Where?", "top")},
    ]
    photo(tmp_path / "images" / "a.png", 41, 67)
    photo(tmp_path / "images" / "b.png", 50, 20, seed=1)
    write_records(tmp_path / "questions.json", records)
    return records


def run(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["answer_with_transformers.py", *map(str, words)])
    answer_with_transformers.main()


def test_it_needs_nothing_of_ours():
    tree = ast.parse(PROGRAM.read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules <= {"__future__", "argparse", "json", "os", "torch", "PIL", "transformers"}


def test_a_file_of_questions(export, questions, tmp_path, monkeypatch):
    flags = ["--model", export, "--data_path", tmp_path / "questions.json", "--image_folder", tmp_path / "images"]
    written = {}
    for size in (1, 3):
        answers = tmp_path / f"{size}.jsonl"
        run(monkeypatch, *flags, "--answers", answers, "--batch_size", size, "--max_new_tokens", 6)
        written[size] = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert written[1] == written[3], "padding changes nothing"
    assert all(list(line) == ["id", "question", "expected", "answer"] for line in written[1])
    assert [line["id"] for line in written[1]] == ["one", "1", "7", "two"]
    assert [line["expected"] for line in written[1]] == ["A circle.", "x", None, "top"]
    assert [line["question"] for line in written[1]] == [r["conversations"][0]["value"] for r in questions]
    assert any(line["answer"] for line in written[1])


def test_one_question(export, questions, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--model", export, "--data_path", tmp_path / "questions.json", "--image_folder",
        tmp_path / "images", "--answers", tmp_path / "out.jsonl", "--max_new_tokens", 6)  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    capsys.readouterr()
    run(monkeypatch, "--model", export, "--image", os.path.join(tmp_path, "images", "b.png"), "--prompt", "Where?",
        "--max_new_tokens", 6)  # fmt: skip
    assert capsys.readouterr().out.strip() == lines[3]["answer"]


@pytest.mark.parametrize("words", [["--prompt", "x", "--data_path", "y"], [], ["--data_path", "x"]])
def test_half_a_request_is_refused(words, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--model", "x", *words)
    assert stop.value.code == 2
    assert "give --prompt TEXT" in capsys.readouterr().err
