"""A folder in which the answers of a run gather, one file a data-parallel rank; a run that was killed goes on there.

``run.json`` says what is asked of which model. ``parts/`` holds what is answered so far: a line is an answer once its
newline is written, and each has the number of its question. ``answers.jsonl`` is made of them when none is missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil

from dc_megatron.errors import UserError
from dc_megatron.weights.durable_files import write_all, write_file

ANSWERS = "answers.jsonl"
_RUN, _PARTS, _LOCK = "run.json", "parts", ".lock"


class AnswersFolder:
    """``path``: made where it is absent. ``identity``: plain values that decide which answers belong together.

    restart: what an earlier run left is removed. UserError: the folder holds answers of something else, or another
    run is at work in it. Every rank opens it before the process groups start, so that nobody writes yet; ``first``: the
    one of them that changes anything then.
    """

    def __init__(self, path: str, identity: dict, *, restart: bool = False, first: bool = True):
        self.path = path
        # Of the numbers' answers: line of the answers file.
        self.answered: dict[int, dict] = {}
        if first:
            os.makedirs(path, exist_ok=True)
            self._lock = self._take_lock()
        if restart and first:
            self._remove()
        elif not restart:
            self._refuse_another(identity)
            self.answered = self._read_parts()
        if first:
            os.makedirs(os.path.join(path, _PARTS), exist_ok=True)
            write_file(os.path.join(path, _RUN), (json.dumps(identity, indent=1) + "\n").encode())

    def part(self, number: int) -> AnswersPart:
        """The file of data-parallel rank ``number``."""
        return AnswersPart(os.path.join(self.path, _PARTS, f"{number:05}.jsonl"))

    def collect(self, count: int) -> list[dict]:
        """Answers of the questions 0 ... count - 1 in their order, written to ``answers.jsonl`` as well."""
        found = self._read_parts()
        missing = [number for number in range(count) if number not in found]
        if missing:
            raise UserError(
                f"--output_dir {self.path}: {len(missing)} of {count} answers are not there; the folder has to be on a"
                " disk that all nodes share"
            )
        answers = [found[number] for number in range(count)]
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        write_file(os.path.join(self.path, ANSWERS), lines.encode())
        return answers

    def _take_lock(self):
        file = open(os.path.join(self.path, _LOCK), "w")  # noqa: SIM115 (held as long as the run)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--output_dir {self.path}: another run is at work there") from None
        return file

    def _remove(self) -> None:
        shutil.rmtree(os.path.join(self.path, _PARTS), ignore_errors=True)
        for name in (_RUN, ANSWERS):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.path, name))

    def _refuse_another(self, identity: dict) -> None:
        try:
            with open(os.path.join(self.path, _RUN), encoding="utf-8") as file:
                before = json.load(file)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise UserError(f"--output_dir {self.path}: {_RUN} cannot be read ({error}); add --restart") from None
        changed = [name for name in {**before, **identity} if before.get(name) != identity.get(name)]
        if changed:
            raise UserError(
                f"--output_dir {self.path}: holds answers of another run ({', '.join(changed)} changed); give another"
                " folder, or --restart to throw them away"
            )

    def _read_parts(self) -> dict[int, dict]:
        """Number -> answer of all whole lines; an answer without a fault is preferred to one with."""
        found: dict[int, dict] = {}
        folder = os.path.join(self.path, _PARTS)
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            with open(os.path.join(folder, name), "rb") as file:
                for line in file:
                    entry = _whole(line)
                    if entry is not None and (entry["number"] not in found or is_faulty(found[entry["number"]])):
                        found[entry["number"]] = entry["answer"]
        return found


class AnswersPart:
    """A file that answers are appended to; half a line that a killed run left is cut off first."""

    def __init__(self, path: str):
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with open(path, "rb") as file:
            content = file.read()
        os.ftruncate(self._descriptor, content.rfind(b"\n") + 1)
        os.lseek(self._descriptor, 0, os.SEEK_END)

    def add(self, entries: list[tuple[int, dict]]) -> None:
        """(number, answer) of some questions; they are there when it returns, whatever becomes of this process."""
        lines = [json.dumps({"number": n, "answer": a}, ensure_ascii=False) + "\n" for n, a in entries]
        write_all(self._descriptor, "".join(lines).encode())

    def close(self) -> None:
        os.fsync(self._descriptor)
        os.close(self._descriptor)


def is_faulty(answer: dict) -> bool:
    """The question could not be asked: its picture was missing or broken."""
    return "fault" in answer["metadata"]


def _whole(line: bytes) -> dict | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        # What a power cut leaves.
        return None
    known = isinstance(entry, dict) and isinstance(entry.get("number"), int)
    return entry if known and isinstance(entry.get("answer"), dict) else None
