"""A benchmark from its question file to answers, the files that others read, and the metrics that need no judge."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from dc_megatron.data.faults import RecordFault
from dc_megatron.data.image_store import ImageStore, open_store
from dc_megatron.data.llava_json import Record
from dc_megatron.data.picture import Picture
from dc_megatron.data.record_pictures import PictureReader
from dc_megatron.errors import UserError
from dc_megatron.evaluation.answers_folder import AnswersFolder, AnswersPart, is_faulty
from dc_megatron.evaluation.benchmarks import Benchmark, benchmark_of
from dc_megatron.evaluation.metrics import annotations_of, metrics_of
from dc_megatron.evaluation.mmbench_table import table_questions
from dc_megatron.evaluation.questions import BenchmarkQuestion, read_questions
from dc_megatron.evaluation.upload_files import write_upload_files
from dc_megatron.inference.source import Resolved, Source, resolve
from dc_megatron.weights.durable_files import hash_file, write_file
from dc_megatron.weights.folder_identity import folder_identity
from dc_megatron.weights.manifest import MANIFEST

METRICS = "metrics.json"
# Ranks wait for each other after so many batches each, so that none of them is ever minutes ahead.
_BATCHES_BETWEEN_MEETINGS = 4


@dataclass(frozen=True)
class Request:
    """What is asked. ``max_new_tokens`` None: the benchmark's own. See tools/evaluate.py for the others."""

    benchmark: str
    question_file: str
    output_dir: str
    image_folder: str = ""
    image_name: str = ""
    annotations: str = ""
    split: str = "test"
    all_rounds: bool = False
    max_new_tokens: int | None = None
    batch_size: int = 16
    image_backend: str = "auto"
    restart: bool = False


def run_benchmark(source: Source, request: Request, progress: Callable[[str, int, int], object] | None = None) -> dict:
    """Ask what is not answered yet and count; every rank calls it, rank 0 writes the files.

    Returns {"benchmark", "questions", "answered_before", "faults" (reason -> questions), "metrics" (or None),
    "why_no_metrics", "files"}; on ranks other than 0 an empty dict. UserError: bad files, another run's answers in the
    folder.
    """
    benchmark = benchmark_of(request.benchmark)
    resolved = resolve(source)
    questions, store = _read(request, benchmark)
    # Before hours are spent on answers.
    truths = annotations_of(benchmark, request.annotations, request.split, questions)
    rank = int(os.environ.get("RANK", "0"))
    identity = _identity(resolved, request, benchmark)
    folder = AnswersFolder(request.output_dir, identity, restart=request.restart, first=rank == 0)
    before = {number for number, answer in folder.answered.items() if not is_faulty(answer)}
    remaining = [question for question in questions if question.number not in before]
    if remaining:
        asker = _Asker(resolved, request.image_backend, store, identity)
        _answer_all(asker, folder, remaining, request.batch_size, progress)
    if rank:
        return {}
    answers = folder.collect(len(questions))
    metrics, why = metrics_of(benchmark, questions, answers, truths)
    summary = {
        "benchmark": benchmark.name,
        "questions": len(questions),
        "answered_before": len(before),
        "faults": dict(Counter(a["metadata"]["fault"].split(":")[0] for a in answers if is_faulty(a))),
        "metrics": metrics,
        "why_no_metrics": why,
    }
    files = write_upload_files(folder.path, benchmark, request.question_file, questions, answers, truths)
    summary["files"] = [os.path.join(folder.path, name) for name in (*files, METRICS)]
    write_file(summary["files"][-1], (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def _read(request: Request, benchmark: Benchmark) -> tuple[list[BenchmarkQuestion], ImageStore]:
    is_table = request.question_file.endswith(".tsv")
    if is_table != benchmark.name.startswith("mmbench"):
        wanted = "MMBench's .tsv" if not is_table else "--benchmark mmbench"
        raise UserError(f"--question_file {request.question_file}: --benchmark {benchmark.name} needs {wanted}")
    if is_table:
        return table_questions(request.question_file, benchmark, request.all_rounds)
    if request.all_rounds:
        raise UserError(f"--all_rounds: {benchmark.name} has no rounds; it is a flag of mmbench")
    return read_questions(request.question_file, benchmark, request.image_name), open_store(request.image_folder or ".")


def _identity(resolved: Resolved, request: Request, benchmark: Benchmark) -> dict:
    """What the answers depend on. The layout and the batch are no part of it."""
    source = resolved.source
    model = {"vision_tower": folder_identity(resolved.vision.path)}
    if resolved.iteration_folder:
        manifest = os.path.join(resolved.iteration_folder, MANIFEST)
        whole = os.path.isfile(manifest)
        model["checkpoint"] = hash_file(manifest).xxh3_64 if whole else folder_identity(resolved.iteration_folder)
    else:
        model["model_name_or_path"] = folder_identity(source.model_name_or_path)
    if source.projector:
        model["pretrain_mm_mlp_adapter"] = folder_identity(source.projector)
    connector = resolved.connector
    return {
        "benchmark": benchmark.name,
        "question_file": hash_file(request.question_file).xxh3_64,
        "image_folder": request.image_folder,
        "image_name": request.image_name,
        "all_rounds": request.all_rounds,
        **model,
        "model_id": os.path.basename(os.path.normpath(source.load or source.model_name_or_path)),
        "mm_dense_connector_type": connector.dense_connector_type,
        "mm_vision_select_layer": connector.select_layer,
        "version": resolved.version,
        "image_aspect_ratio": resolved.image_aspect_ratio,
        "image_grid_pinpoints": [list(size) for size in resolved.tiling.pinpoints],
        "mm_patch_merge_type": resolved.tiling.merge,
        "max_new_tokens": request.max_new_tokens or benchmark.new_tokens,
        "bf16": source.bf16,
    }


class _Asker:
    """Batches of questions to the model. Made by every rank; joins the process groups."""

    def __init__(self, resolved: Resolved, image_backend: str, store: ImageStore, identity: dict):
        from dc_megatron.inference.ask import start

        self._image_backend, self._store, self._identity = image_backend, store, identity
        self._reader = PictureReader(store, resolved.tiling, video_frames=1)
        self.session, self._tokenizer = start(resolved)
        self._run = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def order(self, question: BenchmarkQuestion) -> tuple[int, int, int]:
        """Sorts questions so that prompts of one length, which go on together, are neighbours."""
        return len(question.images), len(self._tokenizer.encode(question.asked)[0]), question.number

    def answers(self, questions: list[BenchmarkQuestion]) -> list[tuple[int, dict]]:
        """(number, line of the answers file) of each question, on every rank of this model."""
        from dc_megatron.inference.generate import Question, answer

        faults: dict[int, str] = {}
        asked: list[tuple[BenchmarkQuestion, list[Picture]]] = []
        for question in questions:
            try:
                asked.append((question, self._reader.read(Record("", question.images, []))[1]))
            except RecordFault as fault:
                faults[question.number] = str(fault)
        self._reader.forget()
        texts: dict[int, str] = {}
        if asked:
            given = answer(
                self.session,
                self._tokenizer,
                [Question(question.asked, tuple(pictures)) for question, pictures in asked],
                [self._store],
                self._identity["max_new_tokens"],
                self._image_backend,
            )
            texts = {question.number: text for (question, _), text in zip(asked, given.texts, strict=True)}
            faults |= _broken(asked, given.blank)
        return [(q.number, self._line(q, texts.get(q.number, ""), faults.get(q.number))) for q in questions]

    def _line(self, question: BenchmarkQuestion, text: str, fault: str | None) -> dict:
        """In the layout of the original's scripts. A question with a fault has no answer, which no metric takes for
        right, and says why."""
        return {
            "question_id": question.identifier,
            "prompt": question.prompt,
            "text": "" if fault else text,
            **question.answer_fields,
            "answer_id": hashlib.sha256(f"{self._run} {question.number}".encode()).hexdigest()[:22],
            "model_id": self._identity["model_id"],
            "metadata": {"fault": fault} if fault else {},
        }


def _broken(asked: list[tuple[BenchmarkQuestion, list[Picture]]], blank: frozenset[int]) -> dict[int, str]:
    """Number of a question -> fault, where one of its pictures had a header and no more."""
    faults, first = {}, 0
    for question, pictures in asked:
        names = [picture.name for n, picture in enumerate(pictures, first) if n in blank]
        if names:
            faults[question.number] = f"{RecordFault.CORRUPT_IMAGE}: {names[0]}"
        first += len(pictures)
    return faults


def _answer_all(
    asker: _Asker,
    folder: AnswersFolder,
    questions: list[BenchmarkQuestion],
    size: int,
    progress: Callable[[str, int, int], object] | None,
) -> None:
    """Batches of ``size`` go to the data-parallel ranks in turn; the first rank of each model writes its answers."""
    import torch
    from megatron.core import parallel_state

    questions = sorted(questions, key=asker.order)
    batches = [questions[first : first + size] for first in range(0, len(questions), size)]
    data_rank, data_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    part: AnswersPart | None = None
    if parallel_state.get_model_parallel_group().rank() == 0:
        part = folder.part(data_rank)
    rounds = -(-len(batches) // data_size)
    for turn in range(rounds):
        place = turn * data_size + data_rank
        if place < len(batches):
            answers = asker.answers(batches[place])
            if part is not None:
                part.add(answers)
        if progress is not None:
            progress("questions answered", min((turn + 1) * data_size * size, len(questions)), len(questions))
        if turn % _BATCHES_BETWEEN_MEETINGS == 0 or turn + 1 == rounds:
            torch.distributed.barrier()
    if part is not None:
        part.close()
    # All parts are whole now.
    torch.distributed.barrier()
