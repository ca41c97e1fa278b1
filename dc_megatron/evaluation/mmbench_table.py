"""MMBench's tables: tab-separated, one question a row, its picture inside as base64. No torch."""

from __future__ import annotations

import base64
import binascii
import csv
import io
from typing import BinaryIO

from dc_megatron.data.image_store import HEADER_BYTES, ImageStore
from dc_megatron.errors import UserError
from dc_megatron.evaluation.benchmarks import Benchmark
from dc_megatron.evaluation.questions import BenchmarkQuestion

LETTERS = "ABCD"
# The circular rounds of a question have its index and a multiple of this, as in MMBench's own files.
ROUND_STEP = 1_000_000
# The largest picture of a table is some megabytes.
_LONGEST_FIELD = 1 << 28


class TablePictures(ImageStore):
    """The pictures of a table by their row's ``index``. A text that is the index of another row stands for its picture,
    which is how the files of circular rounds save space."""

    def __init__(self, path: str, encoded: dict[str, str]):
        self.location = path
        self._encoded = encoded

    def open(self, name: str, block_bytes: int = HEADER_BYTES) -> BinaryIO:
        return io.BytesIO(self.read(name))

    def read(self, name: str) -> bytes:
        text = self._encoded.get(name, "")
        text = self._encoded.get(text, text)
        if not text:
            raise FileNotFoundError(f"row {name} has no picture")
        try:
            return base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise OSError(f"row {name}: not base64: {error}") from None

    def list(self, name: str) -> list[str]:
        return []


def read_table(path: str) -> list[dict[str, str]]:
    """The rows of a table; UserError where it is none."""
    csv.field_size_limit(_LONGEST_FIELD)
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--question_file {path}: cannot be read as a table: {error}") from None
    missing = {"index", "question", "A", "B", "image"} - set(rows[0] if rows else ())
    if missing:
        raise UserError(f"--question_file {path}: no column {', '.join(sorted(missing))}; MMBench's .tsv is needed")
    return rows


def table_questions(path: str, benchmark: Benchmark, all_rounds: bool) -> tuple[list[BenchmarkQuestion], ImageStore]:
    """Questions and pictures of a table.

    all_rounds: every question is asked once for each of its options, which move up by one each time; what a question
    is worth is then decided by all its rounds (see ``choice_metrics.mmbench_metrics``).
    """
    rows = read_table(path)
    questions: list[BenchmarkQuestion] = []
    for row in rows:
        options = _options(row)
        for turn in range(len(options) if all_rounds else 1):
            questions.append(_question(row, options, turn, len(questions), benchmark))
    return questions, TablePictures(path, {row["index"]: row["image"] or "" for row in rows})


def _question(row: dict, options: list[str], turn: int, number: int, benchmark: Benchmark) -> BenchmarkQuestion:
    turned = options[turn:] + options[:turn]
    letters = list(LETTERS[: len(options)])
    parts = ([row["hint"]] if _given(row.get("hint")) else []) + [row["question"]]
    prompt = "\n".join(parts + [f"{letter}. {option}" for letter, option in zip(letters, turned, strict=True)])
    index = int(row["index"]) if row["index"].isdecimal() else row["index"]
    facts = {name: value for name, value in row.items() if name != "image"}
    return BenchmarkQuestion(
        number=number,
        identifier=index,
        prompt=prompt,
        asked=f"{prompt}\n{benchmark.suffix}",
        images=(row["index"],),
        answer_fields={"round_id": turn, "options": turned, "option_char": letters[turn:] + letters[:turn]},
        facts=facts,
    )


def _options(row: dict) -> list[str]:
    options = []
    for letter in LETTERS:
        if not _given(row.get(letter)):
            break
        options.append(row[letter])
    return options


def _given(value: str | None) -> bool:
    return value is not None and value.lower() not in ("", "nan", "none")
