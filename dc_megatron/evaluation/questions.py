"""Question files of benchmarks: LLaVA's JSON Lines, VQA-style JSON, ScienceQA's and MMMU's JSON. No torch."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, field
from typing import Any

from dc_megatron.data.conversation import IMAGE_MARK
from dc_megatron.errors import UserError
from dc_megatron.evaluation.benchmarks import LETTER, SHORT, Benchmark

# MMMU's marks: <image 1> stands for the first picture, wherever and however often it is written.
_NUMBERED = re.compile(r"<image (\d+)>")


@dataclass(frozen=True)
class BenchmarkQuestion:
    """``number``: its place in the file, the only name that is unique (TextVQA's ids are those of the pictures).

    identifier: ``question_id`` as the file has it. prompt: as the answers file repeats it. asked: what the model reads,
    pictures marked or in front. images: names, in the order of their marks. answer_fields: further fields of the
    answer's line. facts: what the file says that a metric may need (category, options, the right answer, ...).
    """

    number: int
    identifier: Any
    prompt: str
    asked: str
    images: tuple[str, ...] = ()
    answer_fields: dict = field(default_factory=dict)
    facts: dict = field(default_factory=dict)


def read_questions(path: str, benchmark: Benchmark, image_name: str = "") -> list[BenchmarkQuestion]:
    """All questions of a ``.jsonl`` or ``.json`` file.

    image_name: the picture's name where a record has an ``image_id`` only, for example
    ``COCO_val2014_{image_id:012}.jpg``. UserError names file and record for what cannot be asked.
    """
    records = _records(path)
    if not records:
        raise UserError(f"--question_file {path}: holds no question")
    return [_question(record, number, path, benchmark, image_name) for number, record in enumerate(records)]


def _records(path: str) -> list:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--question_file {path}: cannot be read: {error}") from None
    if path.endswith(".jsonl"):
        return [_parsed(line, f"{path}: line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    content = _parsed(text, path)
    if isinstance(content, dict) and isinstance(content.get("questions"), list):
        content = content["questions"]
    if not isinstance(content, list):
        raise UserError(f"--question_file {path}: neither a list of questions nor an object with `questions`")
    return content


def _parsed(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--question_file {where}: not JSON: {error}") from None


def _question(record, number: int, path: str, benchmark: Benchmark, image_name: str) -> BenchmarkQuestion:
    where = f"--question_file {path}: record {number}"
    if not isinstance(record, dict):
        raise UserError(f"{where}: a {type(record).__name__}, not an object")
    identifier = record.get("question_id", record.get("id", number))
    images = _images(record, image_name, where)
    text = _text(record, where)
    if benchmark.name == "mmmu":
        text, images = _numbered_pictures(_mmmu_text(record, text), images, where)
    else:
        text = text.replace(IMAGE_MARK, "").strip() if text.count(IMAGE_MARK) <= 1 else text
        if benchmark.suffix:
            text = f"{text}\n{benchmark.suffix}"
    marks = text.count(IMAGE_MARK)
    if marks and marks != len(images):
        raise UserError(f"{where}: {marks} {IMAGE_MARK} marks and {len(images)} pictures")
    prompt = text
    if benchmark.name == "sqa" and images:
        # The original's metric tells questions with a picture by this mark.
        prompt = f"{IMAGE_MARK}\n{text}"
    return BenchmarkQuestion(number, identifier, prompt, text, images, facts=record)


def _text(record: dict, where: str) -> str:
    messages = record.get("conversations")
    first = messages[0] if isinstance(messages, list) and messages else None
    value = first.get("value") if isinstance(first, dict) else record.get("text", record.get("question"))
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: no text in `text`, `question` or the first of `conversations`")
    return value


def _images(record: dict, image_name: str, where: str) -> tuple[str, ...]:
    names = record.get("image", record.get("images"))
    if names is None and "image_id" in record and "conversations" not in record:
        if not image_name:
            raise UserError(
                f"{where}: has an image_id and no `image`; say the name: --image_name '{{image_id:012}}.jpg'"
            )
        try:
            return (image_name.format(image_id=record["image_id"]),)
        except (ValueError, KeyError, IndexError) as error:
            raise UserError(f"--image_name {image_name}: does not fit {record['image_id']!r}: {error}") from None
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where}: `image` is neither a file name nor a list of file names")
    return tuple(names)


def options_of(record: dict) -> list[str]:
    """MMMU's ``options``: a list, or a list written as text (as its data set holds it)."""
    options = record.get("options") or []
    if isinstance(options, str):
        try:
            options = ast.literal_eval(options)
        except (ValueError, SyntaxError):
            options = []
    return [str(option) for option in options]


def _mmmu_text(record: dict, text: str) -> str:
    """LLaVA 1.5's form of a question; a ``text`` is asked as it stands."""
    if "text" in record or "conversations" in record:
        return text
    listed = "".join(f"({chr(ord('A') + n)}) {option}\n" for n, option in enumerate(options_of(record)))
    return f"{text}\n\n{listed}\n{LETTER}" if listed else f"{text}\n\n{SHORT}"


def _numbered_pictures(text: str, images: tuple[str, ...], where: str) -> tuple[str, tuple[str, ...]]:
    """``<image 2>`` becomes ``<image>``, and the second picture stands in its place."""
    numbers = [int(number) for number in _NUMBERED.findall(text)]
    if not numbers:
        return text, images
    if max(numbers) > len(images) or min(numbers) < 1:
        raise UserError(f"{where}: <image {max(numbers)}> with {len(images)} pictures")
    return _NUMBERED.sub(IMAGE_MARK, text), tuple(images[number - 1] for number in numbers)
