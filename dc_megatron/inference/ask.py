"""Questions from a command line or a file to a model: what tools/generate.py does."""

from __future__ import annotations

import json
import os

from dc_megatron.data.conversation import IMAGE_MARK
from dc_megatron.data.faults import RecordFault
from dc_megatron.data.llava_json import parse_record, read_records
from dc_megatron.errors import UserError
from dc_megatron.inference.source import Resolved, Source, resolve


def ask_once(source: Source, prompt: str, images: list[str], max_new_tokens: int, image_backend: str = "auto") -> dict:
    """{"question", "images", "answer"} of one question. UserError: bad source, missing picture, wrong image count."""
    resolved = resolve(source)
    _check_images(prompt, images, "--image")
    session, tokenizer = _start(resolved)
    from dc_megatron.inference.generate import Question, answer

    text = answer(session, tokenizer, [Question(prompt, tuple(images))], max_new_tokens, image_backend)[0]
    return {"question": prompt, "images": images, "answer": text}


def ask_file(
    source: Source,
    data_path: str,
    image_folder: str,
    answers: str,
    *,
    max_new_tokens: int,
    batch_size: int,
    image_backend: str = "auto",
) -> dict:
    """Ask the first message of every record of a LLaVA file; rank 0 writes ``answers``, one JSON object a line.

    ``expected`` is the record's first answer, or null. Returns {"questions", "exact", "answers"}.
    """
    resolved = resolve(source)
    questions = [
        _question(record, number, image_folder, data_path) for number, record in enumerate(read_records(data_path))
    ]
    session, tokenizer = _start(resolved)
    from dc_megatron.inference.generate import Question, answer

    given = []
    for first in range(0, len(questions), batch_size):
        part = questions[first : first + batch_size]
        given += answer(
            session, tokenizer, [Question(q["question"], q["images"]) for q in part], max_new_tokens, image_backend
        )
    exact = sum(
        q["expected"] is not None and a.strip() == q["expected"].strip() for q, a in zip(questions, given, strict=True)
    )
    if int(os.environ.get("RANK", "0")) == 0:
        with open(answers, "w", encoding="utf-8") as file:
            for question, text in zip(questions, given, strict=True):
                line = {name: question[name] for name in ("id", "question", "expected")}
                file.write(json.dumps({**line, "answer": text}, ensure_ascii=False) + "\n")
    return {"questions": len(questions), "exact": exact, "answers": answers}


def _start(resolved: Resolved):
    from dc_megatron.data.tokenization import load_tokenizer
    from dc_megatron.inference.session import Session

    source = resolved.source
    folder = os.path.join(source.load, "hf") if source.load else source.model_name_or_path
    tokenizer = load_tokenizer(folder, resolved.version)
    return Session(resolved), tokenizer


def _question(record: dict, number: int, image_folder: str, data_path: str) -> dict:
    try:
        parsed = parse_record(record, number)
    except RecordFault as fault:
        raise UserError(f"--data_path {data_path}: record {number}: {fault}") from None
    text = parsed.messages[0].get("value", "")
    images = tuple(os.path.join(image_folder, name) for name in parsed.images)
    _check_images(text, images, f"--data_path {data_path}: record {number}")
    expected = parsed.messages[1].get("value") if len(parsed.messages) > 1 else None
    return {"id": parsed.identifier, "question": text, "expected": expected, "images": images}


def _check_images(text: str, images, where: str) -> None:
    marks = text.count(IMAGE_MARK)
    if marks and marks != len(images):
        raise UserError(f"{where}: the question has {marks} {IMAGE_MARK} marks and {len(images)} pictures")
    for path in images:
        if not os.path.isfile(path):
            raise UserError(f"{where}: no such picture: {path}")
