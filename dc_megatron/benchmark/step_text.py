"""The result of a benchmark of training steps in words, and its settings from words."""

from __future__ import annotations

import json

from dc_megatron.errors import UserError


def read_settings(words: list[str]) -> dict:
    """``KEY=VALUE`` words as a dict; values are JSON, or text where they are none. UserError: no '='."""
    settings = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--set {word}: write KEY=VALUE, such as --set steps=5")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


def as_text(result: dict) -> str:
    """Tables of the variants and of the time's parts, and the ratios."""
    work, ceiling = result["workload"], result["matmul_flops_per_second"]
    where = (result["gpu"] or {}).get("name") or result["machine"]["processor"]
    # An interrupted run may have ended before it was measured.
    reaches = f"reaches {ceiling / 1e12:.4g} TFLOP/s" if ceiling else "was not measured"
    lines = [
        f"{work['name']} on {where}: {work['rows']} rows of {work['seq_length']} a step, {work['dtype']};"
        f" a large matrix product {reaches}",
        "",
        f"{'':24}{'samples/s':>11}{'tokens/s':>11}{'targets/s':>11}{'TFLOP/s':>10}{'of matmul':>10}{'s/step':>9}"
        f"{'peak GB':>9}{'fill':>7}  first loss",
    ]
    for name, of in result["variants"].items():
        if "error" in of:
            lines.append(f"{name:24}failed: {of['error'].splitlines()[0]}")
            continue
        lines.append(
            f"{name:24}{of['samples_per_second']:11.3f}{of['tokens_per_second']:11.0f}"
            f"{of['supervised_tokens_per_second']:11.0f}{of['flops_per_second'] / 1e12:10.4g}"
            f"{100 * of['share_of_matmul']:9.1f}%{of['seconds_per_step']:9.3f}{of['peak_memory_gb']:9.2f}"
            f"{100 * of['fill']:6.1f}%  {of['first_loss']:.5f}"
        )
    lines += ["", "Where the time of a step goes"]
    for name, of in result["variants"].items():
        if "error" not in of:
            parts = sorted(of["share_of_time"].items(), key=lambda part: -part[1])
            lines.append(f"  {name:24}" + ", ".join(f"{part} {100 * share:.1f} %" for part, share in parts))
    lines += ["", "Ours over ..."]
    for name, of in result["compared"].items():
        if isinstance(of, dict) and "of_each_step" in of:
            each = " ".join(f"{ratio:.2f}" for ratio in of["of_each_step"])
            difference = of["first_loss_difference"]
            shown = "" if difference is None else f"; first losses differ by {difference:.1e}"
            lines.append(f"  {name:24}{of['samples_per_second']:.2f} times the samples a second (steps: {each}){shown}")
            if "samples_per_second_over_hf" in of:
                lines.append(f"  {name:24}itself {of['samples_per_second_over_hf']:.2f} times hf's samples a second")
        elif isinstance(of, dict):
            lines.append(
                f"  a step of stage 1 takes {of['measured']:.3f} of one of stage 2; operations predict"
                f" {of['predicted_by_flops']:.3f} ({100 * of['excess']:+.1f} %)"
            )
        else:
            lines.append(f"  {name.replace('_', ' ')}: {of:.3f}")
    return "\n".join(lines)
