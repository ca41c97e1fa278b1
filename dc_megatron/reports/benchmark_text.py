"""The outcome of a benchmark for people."""

from __future__ import annotations


def summary_lines(summary: dict) -> list[str]:
    """Lines for a ``run_benchmark`` summary: what was asked, what could not be, the metrics, the files."""
    before = summary["answered_before"]
    lines = [
        f"{summary['benchmark']}: {summary['questions']} questions" + (f", {before} answered before" if before else "")
    ]
    if summary["faults"]:
        count = sum(summary["faults"].values())
        reasons = ", ".join(f"{reason}: {number}" for reason, number in sorted(summary["faults"].items()))
        lines.append(
            f"not asked, and counted as wrong: {count} ({reasons}); metadata.fault says which,"
            " and the next start asks them again"
        )
    if summary["metrics"] is None:
        lines.append(f"no metric: {summary['why_no_metrics']}")
    else:
        lines += _metric_lines(summary["metrics"], "")
    return [*lines, *summary["files"]]


def _metric_lines(metrics: dict, indent: str) -> list[str]:
    lines = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_metric_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {value:.2f}" if isinstance(value, float) else f"{indent}{name}: {value}")
    return lines
