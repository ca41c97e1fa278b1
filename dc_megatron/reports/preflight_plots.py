"""The page's plots as data URIs of PNG files. No text out of the data is drawn."""

from __future__ import annotations

import base64
import io

import numpy as np
from matplotlib.figure import Figure

from dc_megatron.reports.preflight_columns import Columns

_SIZE = (5.6, 2.9)
_INK, _SECOND, _GRID = "#2b5c8a", "#d9822b", "#d5d9de"
_MOST_POINTS = 20_000
# Sizes that differ more are drawn on a logarithmic axis.
_WIDE_RANGE = 20


def plots(columns: Columns, packing: dict, model_max_length: int) -> dict[str, str]:
    """{"lengths", "supervised", "pictures", "sizes", "fill"}: data URIs; what has nothing to show is left out."""
    if not len(columns.length):
        return {}
    found = {
        "lengths": _lengths(columns, model_max_length),
        "supervised": _supervised(columns),
        "fill": _fill(packing),
    }
    if len(columns.width):
        found |= {"pictures": _pictures(columns), "sizes": _sizes(columns)}
    return found


def _figure(title: str, across: str, up: str):
    figure = Figure(figsize=_SIZE, dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(across, fontsize=8)
    axes.set_ylabel(up, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _uri(figure: Figure) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _edges(values: np.ndarray, bins: int = 60) -> np.ndarray:
    """Edges of at most ``bins`` equally wide bins of whole numbers."""
    low, high = int(values.min()), int(values.max()) + 1
    width = max(1, -(-(high - low) // bins))
    return np.arange(low, high + width, width) - 0.5


def _lengths(columns: Columns, model_max_length: int) -> str:
    figure, axes = _figure("Length of samples", "positions", "samples")
    edges = _edges(np.concatenate([columns.length, columns.text]))
    axes.hist(columns.length, edges, color=_INK, alpha=0.85, label="whole sample")
    if len(columns.width):
        axes.hist(columns.text, edges, histtype="step", color=_SECOND, linewidth=1.4, label="text of it")
    if columns.length.max() >= 0.6 * model_max_length:
        axes.axvline(model_max_length, color="#a33", linewidth=1, linestyle="--", label="--model_max_length")
    axes.legend(fontsize=8, frameon=False)
    return _uri(figure)


def _supervised(columns: Columns) -> str:
    figure, axes = _figure("Supervised tokens a sample", "targets", "samples")
    axes.hist(columns.supervised, _edges(columns.supervised), color=_INK)
    return _uri(figure)


def _pictures(columns: Columns) -> str:
    figure, axes = _figure("Pictures a sample (a frame of a video is a picture)", "pictures", "samples")
    # From 0 on, so that a data set with one number of pictures has an axis.
    axes.hist(columns.pictures, _edges(np.append(columns.pictures, 0)), color=_INK, rwidth=0.9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_yscale("log", nonpositive="clip")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return _uri(figure)


def _sizes(columns: Columns) -> str:
    figure, axes = _figure("Size of pictures", "width in pixels", "height in pixels")
    numbers = columns.different_pictures
    if len(numbers) > _MOST_POINTS:
        numbers = np.random.RandomState(0).choice(numbers, _MOST_POINTS, replace=False)
    width, height = columns.width[numbers], columns.height[numbers]
    strength = 0.9 if len(numbers) < 200 else 0.25
    axes.scatter(width, height, s=9, color=_INK, alpha=strength, linewidths=0)
    axes.grid(axis="x", color=_GRID, linewidth=0.6)
    for axis, values in ((axes.xaxis, width), (axes.yaxis, height)):
        if values.max() > _WIDE_RANGE * values.min():
            axis.axes.set(**{f"{axis.axis_name}scale": "log"})
            axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        else:
            axis.axes.set(**{f"{axis.axis_name}lim": (0, 1.08 * values.max())})
    return _uri(figure)


def _fill(packing: dict) -> str:
    figure, axes = _figure("How full rows are", "", "% of the positions")
    rows = packing["rows"]
    names = ["unpacked"] + [str(row["seq_length"]) for row in rows]
    fills = [100 * packing["padded"]["fill"], *(100 * row["fill"] for row in rows)]
    bars = axes.bar(names, fills, width=0.6, color=["#9aa5b1", *[_INK] * len(rows)])
    axes.bar_label(bars, [f"{fill:.1f}" for fill in fills], fontsize=8)
    axes.set_ylim(0, 110)
    axes.set_xlabel(f"--seq-length (unpacked: padded to the longest of {packing['padded']['batch']})", fontsize=8)
    return _uri(figure)
