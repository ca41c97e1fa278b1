"""Training steps of ours beside named baselines, in one run: speed, where the time goes, and what must hold."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict

from dc_megatron.benchmark import machine
from dc_megatron.benchmark.step_processes import VariantProcesses
from dc_megatron.benchmark.step_variants import Variant, variants_of
from dc_megatron.benchmark.step_workload import Workload, read_workload
from dc_megatron.errors import UserError
from dc_megatron.planner.flops import step_flops


def benchmark_steps(
    name: str,
    baselines: Sequence[str] | None = None,
    overrides: dict | None = None,
    profile: dict[str, str] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict:
    """Measure workload ``name``; returns the result as plain values (see benchmarks/README.md).

    baselines: variants beside ``ours`` (default: the workload's). overrides: values of the workload to replace.
    profile: variant -> file for its most costly kernels. ``report`` is told about every step. A variant that fails is
    reported with its error, and the others go on. UserError: unknown names.
    """
    overrides, profile = overrides or {}, profile or {}
    workload = read_workload(name, overrides)
    variants = variants_of(list(workload.baselines if baselines is None else baselines))
    facts = machine.describe(machine.ROOT) | {"gpu": machine.gpu()}
    # On a GPU they import while the ceiling is measured; on a CPU they would be in its way.
    ceiling = None if facts["gpu"] else machine.matmul_ceiling(workload.dtype)
    sides = {variant.name: _Side(workload, variant, overrides, report) for variant in variants}
    try:
        ceiling = ceiling or machine.matmul_ceiling(workload.dtype)
        _measure(workload, sides, profile)
    except KeyboardInterrupt:
        report("interrupted: the result has what was measured by now")
    finally:
        for side in sides.values():
            side.stop()
    done = {name: side.result(ceiling) for name, side in sides.items()}
    return {
        "benchmark": "steps",
        **facts,
        "workload": asdict(workload),
        "matmul_flops_per_second": ceiling,
        "variants": done,
        "compared": compared(done),
    }


def _measure(workload: Workload, sides: dict[str, _Side], profile: dict[str, str]) -> None:
    """In turns where all fit side by side; else one after another, each in memory of its own."""
    if workload.coexist:
        for side in sides.values():
            side.build()
        for number in range(workload.warmup):
            for side in sides.values():
                side.step(number, counts=False)
    for turn in range(workload.rounds):
        # Who stands first in a round moves on by one.
        order = list(sides.values())
        order = order[turn % len(order) :] + order[: turn % len(order)]
        for side in order if workload.coexist or turn == 0 else []:
            rounds = [turn] if workload.coexist else range(workload.rounds)
            if not workload.coexist:
                side.build()
                # One step shows a plain program what there is to allocate; compilers and caches of ours want more.
                for number in range(workload.warmup if side.variant.packed else 1):
                    side.step(number, counts=False)
            for this in rounds:
                for step in range(workload.steps if side.variant.packed else workload.baseline_steps):
                    side.step(workload.warmup + this * workload.steps + step)
            if not workload.coexist:
                side.profile(profile)
                side.stop()
    if workload.coexist:
        for side in sides.values():
            side.profile(profile)


class _Side:
    """One variant's processes and what they answered."""

    def __init__(self, workload: Workload, variant: Variant, overrides: dict, report: Callable[[str], None]):
        self.workload, self.variant, self._report = workload, variant, report
        self._processes = VariantProcesses(workload, variant, overrides)
        self._built: dict = {}
        self._first: dict | None = None
        self._steps: list[dict] = []
        self._kernels: dict | None = None
        self._error: str | None = None

    def _ask(self, command: str) -> dict | None:
        if self._error is not None:
            return None
        try:
            return self._processes.ask(command)
        except UserError as error:
            self._error = str(error)
            self._report(f"{self.variant.name}: FAILED\n{error}")
            self.stop()
            return None

    def build(self) -> None:
        self._built = self._ask("build") or {}
        if self._built:
            self._report(f"{self.variant.name}: built in {self._built['build_seconds']:.1f} s")

    def step(self, number: int, counts: bool = True) -> None:
        done = self._ask(f"step {number}")
        if done is None:
            return
        self._first = self._first or done
        if counts:
            self._steps.append(done)
        rate = done["counts"]["tokens"] / done["seconds"]
        self._report(
            f"{self.variant.name}: step {number} {done['seconds']:.3f} s, {rate:.0f} tokens/s, loss {done['loss']:.5f},"
            f" {done['peak_memory'] / 1e9:.1f} GB"
        )

    def profile(self, wanted: dict[str, str]) -> None:
        if self.variant.name in wanted:
            after = self.workload.warmup + self.workload.rounds * self.workload.steps - 1
            self._kernels = self._ask(f"profile {after} {wanted[self.variant.name]}")

    def stop(self) -> None:
        if self._processes is not None:
            self._processes.stop()
            self._processes = None

    def result(self, ceiling: float) -> dict:
        """Rates over all measured steps, parts of the step, and the first step's loss."""
        if self._error is not None or not self._steps:
            return {"what": self.variant.what, "error": self._error or "no step was measured"}
        seconds = sum(step["seconds"] for step in self._steps)
        total = {name: sum(s["counts"][name] for s in self._steps) for name in self._steps[0]["counts"]}
        flops = self._flops()
        processes = self.variant.tensor_parallel
        return {
            "what": self.variant.what,
            **self._built,
            "steps": len(self._steps),
            "seconds_per_step": seconds / len(self._steps),
            "step_seconds": [step["seconds"] for step in self._steps],
            "tower_seconds": [step["sections"].get("tower", 0.0) for step in self._steps],
            "samples_per_second": total["samples"] / seconds,
            "tokens_per_second": total["tokens"] / seconds,
            "supervised_tokens_per_second": total["supervised_tokens"] / seconds,
            "fill": total["tokens"] / total["positions"],
            "flops_per_step": {part: value / len(self._steps) for part, value in flops.items()},
            "flops_per_second": flops["total"] / seconds,
            "share_of_matmul": flops["total"] / seconds / ceiling if ceiling else None,
            "first_loss": self._first["loss"],
            "losses": [step["loss"] for step in self._steps],
            "peak_memory_gb": max(step["peak_memory"] for step in self._steps) / 1e9,
            "data_wait_share": sum(step["data_wait_seconds"] for step in self._steps) / seconds,
            "share_of_time": self._parts(seconds),
            "processes": processes,
            "kernels": self._kernels,
        }

    def _flops(self) -> dict[str, float]:
        work, sums = self.workload, {}
        for step in self._steps:
            of_step = step_flops(
                work.language_config,
                work.vision_config,
                work.connector_config,
                lengths=step["lengths"],
                images=step["counts"]["images"],
                supervised_tokens=step["counts"]["supervised_tokens"],
                trainable=self.variant.trainable or work.trainable,
            )
            for part, value in of_step.as_dict().items():
                sums[part] = sums.get(part, 0.0) + value
        return sums

    def _parts(self, seconds: float) -> dict[str, float]:
        parts: dict[str, float] = {}
        for step in self._steps:
            for name, of in step["sections"].items():
                parts[name] = parts.get(name, 0.0) + of / seconds
            parts["data_wait"] = parts.get("data_wait", 0.0) + step["data_wait_seconds"] / seconds
        rest = 1 - sum(share for name, share in parts.items() if name != "communication")
        return {**parts, "language_model_and_rest": rest}


def compared(done: dict[str, dict]) -> dict:
    """Ratios of ours to the others, round by round where they took turns, and how far the first losses lie apart."""
    ours = done["ours"]
    if "error" in ours:
        return {}
    rows = {}
    for name, other in done.items():
        if name == "ours" or "error" in other:
            continue
        # The slow baselines may have had fewer steps.
        pairs = list(zip(other["step_seconds"], ours["step_seconds"], strict=False))
        same_samples = other["trainable"] == ours["trainable"] and name.startswith(("hf", "megatron"))
        rows[name] = {
            "samples_per_second": ours["samples_per_second"] / other["samples_per_second"],
            "median_of_steps": statistics.median(theirs / mine for theirs, mine in pairs),
            "of_each_step": [theirs / mine for theirs, mine in pairs],
            "tokens_per_second": ours["tokens_per_second"] / other["tokens_per_second"],
            "first_loss_difference": abs(ours["first_loss"] - other["first_loss"]) if same_samples else None,
        }
    for name, other in done.items():
        if name.startswith("ours-tp") and "error" not in other and "hf" in rows:
            hf = done["hf"]
            rows[name]["samples_per_second_over_hf"] = other["samples_per_second"] / hf["samples_per_second"]
    return {**rows, **_bars(done)}


def _bars(done: dict[str, dict]) -> dict:
    """The VLM's step without its tower against text alone, and the step of stage 1 against its share of operations."""
    ours, bars = done["ours"], {}
    text = done.get("text-only", {})
    if "tokens_per_second" in text:
        # Step by step, and the median of them: a machine's hiccup is in one.
        pairs = list(zip(ours["step_seconds"], ours["tower_seconds"], text["step_seconds"], strict=True))
        bars["without_tower_over_text_only_per_token"] = statistics.median(
            (seconds - tower) / theirs * text["fill"] / ours["fill"] for seconds, tower, theirs in pairs
        )
        bars["tokens_per_second_over_text_only"] = ours["tokens_per_second"] / text["tokens_per_second"]
    frozen = done.get("ours-stage1", {})
    if "tokens_per_second" in frozen and "llm" in ours["trainable"]:
        predicted = frozen["flops_per_step"]["total"] / ours["flops_per_step"]["total"]
        seen = statistics.median(a / b for a, b in zip(frozen["step_seconds"], ours["step_seconds"], strict=False))
        bars["stage1_over_stage2"] = {"predicted_by_flops": predicted, "measured": seen, "excess": seen / predicted - 1}
    return bars
