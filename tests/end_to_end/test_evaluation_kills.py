"""A benchmark that is killed at any moment goes on where it stood: no answer is lost, none is doubled."""

from __future__ import annotations

import json
import sys

import pytest

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig
from dc_megatron.weights.projector_files import write_projector
from tests.end_to_end.launch import Launch, run, torchrun
from tests.multirank import parity

QUESTIONS = 40


@pytest.fixture
def command(workspace, tmp_path):
    """The words of a run on tmp_path/NAME by ``processes`` processes; answers are several tokens long."""
    vision, connector = VisionConfig.from_folder(workspace["clip"]), ConnectorConfig("dci")
    width = LanguageConfig.from_folder(workspace["llama"]).hidden_size
    write_projector(str(tmp_path / "projector"), parity.connector_state(vision, connector, width), connector, vision)
    lines = [{"question_id": n, "image": f"{1 + 3 * (n % 6)}.jpg", "text": f"Question {n}?"} for n in range(QUESTIONS)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def words(name: str, processes: int, *more: str) -> list[str]:
        start = [sys.executable] if processes == 1 else torchrun(processes)
        flags = {
            "model_name_or_path": workspace["llama"],
            "vision_tower": workspace["clip"],
            "pretrain_mm_mlp_adapter": tmp_path / "projector",
            "version": "v1",
            "benchmark": "mmvet",
            "question_file": tmp_path / "questions.jsonl",
            "image_folder": workspace["images"],
            "output_dir": tmp_path / name,
            "max_new_tokens": 8,
            "batch_size": 1,
        }
        pairs = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        return [*start, "tools/evaluate.py", *pairs, "--json", *more]

    return words


def written(folder) -> int:
    """Whole lines in the parts of a run."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("parts/*.jsonl"))


@pytest.mark.long
def test_killed_runs_go_on(command, tmp_path):
    whole = run(command("whole", 1), tmp_path / "log-whole").assert_succeeded()
    assert json.loads(whole.output.splitlines()[-1])["questions"] == QUESTIONS
    folder = tmp_path / "killed"
    for number, processes in enumerate((2, 1, 2)):
        wanted = 10 * (number + 1)
        with Launch(command("killed", processes), tmp_path / f"log-{number}") as launch:
            launch.wait_until(lambda wanted=wanted: written(folder) >= wanted, f"{wanted} answers")
            launch.kill()
        assert not (folder / "answers.jsonl").exists()
    before = written(folder)
    last = run(command("killed", 2, "--tensor-model-parallel-size", "2"), tmp_path / "log-last").assert_succeeded()
    summary = json.loads(last.output.splitlines()[-1])
    assert 30 <= summary["answered_before"] <= before < QUESTIONS
    texts = [[json.loads(line) for line in (tmp_path / name / "answers.jsonl").open()] for name in ("whole", "killed")]
    assert texts[0] == texts[1]
    assert written(folder) == QUESTIONS
    assert json.loads((folder / "mmvet_results.json").read_text()) == {
        f"v1_{a['question_id']}": a["text"] for a in texts[0]
    }


@pytest.mark.long
def test_another_model_is_refused(command, tmp_path):
    run(command("one", 1), tmp_path / "log").assert_succeeded()
    refused = run(command("one", 1, "--max_new_tokens", "9"), tmp_path / "log-other")
    refused.assert_refused("max_new_tokens changed", "--restart")
