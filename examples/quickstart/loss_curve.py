"""The loss curve of a run of several stages, one panel a stage, as a PNG."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot as plt


def draw_loss_curve(stages: dict[str, list[dict]], path: str) -> None:
    """Draw ``{title: metrics}`` to ``path``; metrics are objects with ``iteration`` and ``loss`` (nats a token).

    Panels share a logarithmic loss axis, so that a later stage is seen to start where an earlier one ended.
    """
    figure, panels = plt.subplots(1, len(stages), figsize=(4.2 * len(stages), 3.4), sharey=True, squeeze=False)
    for panel, (title, metrics) in zip(panels[0], stages.items(), strict=True):
        points = [(entry["iteration"], entry["loss"]) for entry in metrics if entry.get("loss") is not None]
        steps, losses = zip(*points, strict=True)
        panel.plot(steps, losses, linewidth=0.8, alpha=0.35, color="tab:blue")
        panel.plot(steps, _smooth(losses), linewidth=1.8, color="tab:blue")
        panel.set_yscale("log")
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("loss (nats per token)")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _smooth(losses: tuple[float, ...]) -> list[float]:
    """Running mean over the last ten steps."""
    return [sum(losses[max(0, i - 9) : i + 1]) / min(10, i + 1) for i in range(len(losses))]
