"""A benchmark of steps with stand-ins for its processes: the order of things, failures, and what is compared."""

from __future__ import annotations

import pytest

from dc_megatron.benchmark import machine, step_speed
from dc_megatron.benchmark.step_processes import VariantProcesses
from dc_megatron.benchmark.step_speed import benchmark_steps, compared
from dc_megatron.benchmark.step_text import as_text
from dc_megatron.benchmark.step_variants import VARIANTS
from dc_megatron.benchmark.step_workload import read_workload
from dc_megatron.errors import UserError

# Two rounds of two steps each, after one that does not count.
SIZES = {"rounds": 2, "steps": 2, "warmup": 1, "coexist": True, "baseline_steps": 1}
SECONDS = {"ours": 1.0, "hf": 4.0, "text-only": 0.5, "ours-stage1": 0.8, "megatron-plain": 3.0}


class Stage:
    """What all stand-ins share: the commands in order, and where one goes wrong."""

    def __init__(self):
        self.asked: list[tuple[str, str]] = []
        self.running: set[str] = set()
        self.together = 0
        self.faults: dict[tuple[str, str], BaseException] = {}


class Processes:
    """In place of VariantProcesses."""

    stage: Stage

    def __init__(self, workload, variant, overrides):
        self.workload, self.variant = workload, variant
        self.stage.running.add(variant.name)

    def ask(self, command: str) -> dict:
        self.stage.asked.append((self.variant.name, command))
        self.stage.together = max(self.stage.together, len(self.stage.running))
        fault = self.stage.faults.get((self.variant.name, command))
        if fault is not None:
            raise fault
        word, *others = command.split()
        if word == "build":
            trainable = list(self.variant.trainable or self.workload.trainable)
            return {"build_seconds": 0.1, "trainable": trainable, "transformer_engine": False}
        if word == "profile":
            return {"kernels": [], "path": others[1]}
        number = int(others[0])
        return {
            # The first step pays for everything: it must not count.
            "seconds": 100.0 if number == 0 else SECONDS.get(self.variant.name, 2.0),
            "loss": 10.0 - number,
            "data_wait_seconds": 0.1,
            "sections": {"tower": 0.2, "head": 0.1},
            "counts": {"samples": 8, "tokens": 4000, "supervised_tokens": 1000, "images": 6, "positions": 5000},
            "lengths": [500] * 8,
            "peak_memory": 10**9 * (number + 1),
        }

    def stop(self) -> None:
        self.stage.running.remove(self.variant.name)


@pytest.fixture
def stage(monkeypatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(Processes, "stage", stage, raising=False)
    monkeypatch.setattr(step_speed, "VariantProcesses", Processes)
    monkeypatch.setattr(machine, "matmul_ceiling", lambda dtype: 1e12)
    monkeypatch.setattr(machine, "gpu", lambda: None)
    return stage


def measure(names: list[str], said: list[str] | None = None, profile: dict | None = None, **changes) -> dict:
    report = (lambda line: None) if said is None else said.append
    return benchmark_steps("cpu-small", names, SIZES | changes, profile, report)


def test_rates_are_over_all_measured_steps(stage):
    result = measure(["hf"])
    ours = result["variants"]["ours"]
    assert ours["steps"] == 4
    assert (ours["seconds_per_step"], ours["step_seconds"]) == (1.0, [1.0] * 4)
    assert (ours["samples_per_second"], ours["tokens_per_second"], ours["fill"]) == (8.0, 4000.0, 0.8)
    assert ours["supervised_tokens_per_second"] == 1000.0
    assert ours["first_loss"] == 10.0, "the loss before anything was learnt"
    assert ours["losses"] == [9.0, 8.0, 7.0, 6.0]
    assert ours["peak_memory_gb"] == 5.0
    assert ours["data_wait_share"] == pytest.approx(0.1)
    assert ours["flops_per_second"] == pytest.approx(ours["flops_per_step"]["total"])
    assert ours["share_of_matmul"] == pytest.approx(ours["flops_per_second"] / 1e12)
    parts = {"tower": 0.2, "head": 0.1, "data_wait": 0.1, "language_model_and_rest": 0.6}
    assert ours["share_of_time"] == pytest.approx(parts)
    assert result["workload"]["rounds"] == 2, "overrides are part of the result"
    assert stage.running == set()
    assert as_text(result)


def test_side_by_side_they_take_turns_and_each_stands_first(stage):
    measure(["megatron-plain", "hf"])
    steps = [name for name, command in stage.asked if command.startswith("step") and command != "step 0"]
    # Padded baselines have one step in a round, ours two.
    first = ["ours", "ours", "megatron-plain", "hf"]
    assert steps == [*first, "megatron-plain", "hf", "ours", "ours"]
    assert stage.together == 3
    of_ours = [command for name, command in stage.asked if name == "ours"]
    assert of_ours == ["build", "step 0", "step 1", "step 2", "step 3", "step 4"]
    # The baseline trains on the samples of the same steps.
    assert [c for n, c in stage.asked if n == "hf"] == ["build", "step 0", "step 1", "step 3"]


def test_one_after_another_where_they_do_not_fit_side_by_side(stage):
    result = measure(["hf"], coexist=False, warmup=2)
    assert [name for name, _ in stage.asked] == ["ours"] * 7 + ["hf"] * 4
    of_hf = [command for name, command in stage.asked if name == "hf"]
    # One step shows a plain program what there is to allocate.
    assert of_hf == ["build", "step 0", "step 2", "step 4"]
    assert result["variants"]["hf"]["first_loss"] == result["variants"]["ours"]["first_loss"]
    assert stage.running == set()


def test_the_memory_of_one_is_free_before_the_next_is_built(stage):
    building = []
    ask = Processes.ask

    def watched(self, command):
        if command == "build":
            building.append((self.variant.name, sorted(stage.running)))
        return ask(self, command)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "ask", watched)
        measure(["hf"], coexist=False)
    assert building == [("ours", ["hf", "ours"]), ("hf", ["hf"])]


@pytest.mark.parametrize("coexist", [True, False])
@pytest.mark.parametrize("command", ["build", "step 0", "step 2"])
def test_one_that_fails_is_reported_and_the_others_go_on(stage, coexist, command):
    stage.faults["ours-stage1", command] = UserError(f"ours-stage1, {command}: OutOfMemoryError\nmore of it")
    said = []
    result = measure(["ours-stage1", "hf"], said, coexist=coexist)
    failed = result["variants"]["ours-stage1"]
    assert failed["error"].startswith(f"ours-stage1, {command}: OutOfMemoryError")
    assert "ours-stage1" not in result["compared"]
    assert any(line.startswith("ours-stage1: FAILED\n") for line in said)
    after = [c for n, c in stage.asked if n == "ours-stage1"]
    assert after[-1] == command, "it is not asked any more"
    assert result["variants"]["hf"]["steps"] == 2
    assert result["variants"]["ours"]["steps"] == 4
    assert "hf" in result["compared"]
    assert stage.running == set()
    assert "ours-stage1             failed: " in as_text(result)


def test_without_ours_nothing_is_compared(stage):
    stage.faults["ours", "step 1"] = UserError("ours, step 1: no")
    result = measure(["hf"])
    assert result["compared"] == {}
    assert result["variants"]["hf"]["steps"] == 2
    assert as_text(result)


def test_an_interrupted_run_keeps_what_was_measured(stage):
    stage.faults["hf", "step 3"] = KeyboardInterrupt()
    said = []
    result = measure(["hf"], said)
    assert said[-1].startswith("interrupted")
    assert result["variants"]["ours"]["steps"] == 2
    assert result["variants"]["hf"]["steps"] == 1
    assert result["compared"]["hf"]["of_each_step"] == [4.0]
    assert stage.running == set()


def test_interrupted_before_anything_was_measured(stage):
    stage.faults["hf", "build"] = KeyboardInterrupt()
    result = measure(["hf"])
    assert {of["error"] for of in result["variants"].values()} == {"no step was measured"}
    assert as_text(result)


def test_interrupted_while_the_ceiling_is_measured_beside_a_gpu(stage, monkeypatch):
    def interrupted(dtype: str):
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "gpu", lambda: {"name": "A GPU"})
    monkeypatch.setattr(machine, "matmul_ceiling", interrupted)
    result = measure(["hf"])
    assert result["matmul_flops_per_second"] is None
    assert stage.running == set()
    assert "was not measured" in as_text(result)


def test_an_error_of_our_own_stops_the_processes(stage):
    stage.faults["hf", "step 1"] = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        measure(["hf"])
    assert stage.running == set()


def test_profiles_come_after_the_measured_steps(stage):
    result = measure(["hf"], profile={"ours": "a path/of ours.txt"})
    assert stage.asked[-1] == ("ours", "profile 4 a path/of ours.txt")
    assert result["variants"]["ours"]["kernels"]["kernels"] == []
    assert result["variants"]["hf"]["kernels"] is None


def test_unknown_names_start_nothing(stage):
    with pytest.raises(UserError, match="--baseline hg: unknown"):
        measure(["hg"])
    with pytest.raises(UserError, match="unknown key 'row'"):
        measure(["hf"], row=1)
    assert stage.running == set()


def done(
    seconds: list[float], loss: float = 10.0, trainable=("connector", "llm"), tokens: float = 100.0, **more
) -> dict:
    """A variant's result with steps of these seconds, of 10 samples and ``tokens`` positions each."""
    total, steps = sum(seconds), len(seconds)
    return {
        "step_seconds": seconds,
        "tower_seconds": [0.0] * steps,
        "fill": 1.0,
        "seconds_per_step": total / steps,
        "samples_per_second": 10 * steps / total,
        "tokens_per_second": tokens * steps / total,
        "first_loss": loss,
        "trainable": list(trainable),
        "share_of_time": {},
        **more,
    }


def test_ratios_are_step_by_step():
    rows = compared({"ours": done([1.0, 2.0]), "hf": done([4.0, 4.0], loss=10.25)})
    assert rows["hf"] == {
        "samples_per_second": pytest.approx(8 / 3),
        "median_of_steps": 3.0,
        "of_each_step": [4.0, 2.0],
        "tokens_per_second": pytest.approx(8 / 3),
        "first_loss_difference": 0.25,
    }
    fewer = compared({"ours": done([1.0, 2.0]), "hf": done([4.0])})
    assert fewer["hf"]["of_each_step"] == [4.0]


def test_first_losses_are_compared_where_samples_and_trained_parts_are_the_same():
    others = {
        "ours-stage1": done([1.0], trainable=("connector",), flops_per_step={"total": 2.0}),
        "text-only": done([1.0]),
        "megatron-plain": done([1.0]),
        "hf": done([1.0], trainable=("connector",)),
    }
    rows = compared({"ours": done([1.0], flops_per_step={"total": 3.0}), **others})
    given = {name: rows[name]["first_loss_difference"] for name in others}
    assert given == {"ours-stage1": None, "text-only": None, "megatron-plain": 0.0, "hf": None}


def test_the_two_processes_are_compared_with_hf_as_well():
    rows = compared({"ours": done([1.0]), "hf": done([4.0]), "ours-tp2": done([0.5])})
    assert rows["ours-tp2"]["samples_per_second_over_hf"] == 8.0
    assert "samples_per_second_over_hf" not in rows["hf"]
    assert "samples_per_second_over_hf" not in compared({"ours": done([1.0]), "ours-tp2": done([1.0])})["ours-tp2"]


def test_the_step_without_its_tower_against_text_alone():
    ours = done([2.0, 9.0, 2.0], tower_seconds=[0.5, 0.5, 0.5])
    bars = compared({"ours": ours, "text-only": done([1.0, 1.0, 1.0], fill=0.9)})
    # 1.5 of 2 s for full rows, and 1 s for rows of text alone that are nine tenths full; one slow step counts as one.
    assert bars["without_tower_over_text_only_per_token"] == pytest.approx(1.5 * 0.9)
    assert bars["tokens_per_second_over_text_only"] == pytest.approx(3 / 13)


def test_a_step_of_stage_1_against_its_operations():
    ours = done([1.0, 2.0, 1.0], flops_per_step={"total": 30.0})
    frozen = done([0.8, 1.4, 0.9], trainable=("connector",), flops_per_step={"total": 20.0})
    bar = compared({"ours": ours, "ours-stage1": frozen})["stage1_over_stage2"]
    assert bar["predicted_by_flops"] == pytest.approx(2 / 3)
    assert bar["measured"] == pytest.approx(0.8), "the median of the steps"
    assert bar["excess"] == pytest.approx(0.2)
    ours["trainable"] = ["connector"]
    assert "stage1_over_stage2" not in compared({"ours": ours, "ours-stage1": frozen})


def test_failed_ones_are_left_out():
    assert compared({"ours": {"error": "no"}, "hf": done([1.0])}) == {}
    rows = compared({"ours": done([1.0]), "hf": {"error": "no"}, "text-only": {"error": "no"}})
    assert rows == {}


def test_processes_that_end_at_once_are_one_error_and_stop(monkeypatch, tmp_path):
    """They take no command any more, and ``stop`` must not fall over what could not be sent."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho no such package >&2\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    processes = VariantProcesses(read_workload("cpu-small"), VARIANTS["ours-tp2"], {})
    for process in processes._processes:
        process.wait(timeout=20)
    with pytest.raises(UserError, match=r"ours-tp2, build: the process has ended\n(.*\n)*no such package"):
        processes.ask("build")
    processes.stop()
