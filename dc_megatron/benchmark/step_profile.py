"""Where a step's time goes, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch


def profile_step(run: Callable[[], dict], cuda: bool, path: str, top: int = 25) -> dict:
    """``run()`` under torch's profiler. Writes a table to ``path``; returns the ``top`` kernels (operators on a CPU).

    Each as {"name", "calls", "seconds", "share"} of the device's (or the CPU's own) time.
    """
    # On a GPU its own events alone: those of the host are a hundred thousand, and say nothing about kernels.
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CUDA if cuda else activity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        done = run()
    averages = profile.key_averages()
    if cuda:
        # Kernels alone: an operator's own line repeats the time of the kernels that it starts.
        rows = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA and e.self_device_time_total]
        cost = lambda event: event.self_device_time_total  # noqa: E731
    else:
        rows = [e for e in averages if e.self_cpu_time_total]
        cost = lambda event: event.self_cpu_time_total  # noqa: E731
    rows.sort(key=cost, reverse=True)
    total = sum(cost(event) for event in rows) or 1
    shown = [{"name": e.key, "calls": e.count, "seconds": cost(e) / 1e6, "share": cost(e) / total} for e in rows[:top]]
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"step {done['seconds']:.3f} s, {total / 1e6:.3f} s of kernels\n")
        file.writelines(
            f"{100 * row['share']:5.1f} % {row['seconds'] * 1e3:10.1f} ms {row['calls']:7} x  {row['name'][:150]}\n"
            for row in shown
        )
    return {"kernels": shown, "step_seconds": done["seconds"], "kernel_seconds": total / 1e6}
