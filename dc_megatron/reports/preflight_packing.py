"""How samples fill rows of several lengths, and what --model_max_length would cut: the two numbers that are advised."""

from __future__ import annotations

import math

import numpy as np

from dc_megatron.config import DataConfig
from dc_megatron.data.epoch_order import epoch_samples
from dc_megatron.data.packing import pack, statistics
from dc_megatron.reports.words import count, percent, several

LENGTHS = (1024, 2048, 4096, 8192, 16384)
GOOD_FILL = 0.98
PADDED_BATCH = 16
# A cut that costs no more than this share of the samples is advised.
CUT_SHARE = 0.01
# Of fewer rows, the last one alone keeps them from being full.
_FEW_ROWS = 50
# Rows are packed window by window, so that more samples than this fill them no better.
MOST_PACKED = 200_000


def packing_table(
    lengths: np.ndarray, tiles: np.ndarray, sources: np.ndarray, config: DataConfig, samples_per_step: int
) -> dict:
    """Rows of one epoch at every length of LENGTHS that holds the longest sample, and at the run's default.

    {"rows": [{"seq_length", "fill", "rows", "samples_per_row", "rows_per_step", "steps", "tiles_per_row_mean",
    "tiles_per_row_max"}], "padded": the same for rows padded to the longest of PADDED_BATCH samples, "samples":
    of an epoch, "longest", "estimated": True where a random part of the epoch was packed}.
    """
    weights = [source.weight for source in config.sources]
    order = epoch_samples(sources, weights, config.seed, 0, config.order)
    part = order
    if len(order) > MOST_PACKED:
        part = order[np.sort(np.random.RandomState(config.seed).permutation(len(order))[:MOST_PACKED])]
    longest = int(lengths.max(initial=1))
    table = [
        _packed(part, lengths, tiles, length, config, len(order), samples_per_step)
        for length in _candidates(longest, config.seq_length)
    ]
    return {
        "rows": table,
        "padded": _padded(part, lengths, len(order), samples_per_step),
        "samples": len(order),
        "longest": longest,
        "estimated": len(part) < len(order),
    }


def suggested_length(table: dict) -> tuple[int, str]:
    """(--seq-length, why)."""
    rows, padded = table["rows"], table["padded"]
    good = [row for row in rows if row["fill"] >= GOOD_FILL]
    if good:
        row = good[0]
        why = f"the shortest rows that are at least {percent(GOOD_FILL)} full ({percent(row['fill'])})"
    else:
        row = max(rows, key=lambda one: one["fill"])
        why = f"the fullest rows, {percent(row['fill'])}; no length reaches {percent(GOOD_FILL)}"
        if row["rows"] < _FEW_ROWS:
            why += f", because the data makes only {several(row['rows'], 'row')}"
    full = f"padded to the longest of {PADDED_BATCH} samples they would be {percent(padded['fill'])} full"
    return row["seq_length"], f"{why}; {full}"


def cut_shares(uncut: np.ndarray, doubtful: np.ndarray, doubtful_samples: int, limit: int) -> list[dict]:
    """What share of the samples other values of --model_max_length would cut, ``limit`` being the one of this index.

    uncut: lengths of samples that are whole. doubtful: full lengths of the others, or of a fair choice of them, 0 where
    that does not help to a target; doubtful_samples: how many they stand for. [{"model_max_length", "share"}] for
    LENGTHS and ``limit``.
    """
    each = doubtful_samples / max(len(doubtful), 1)
    samples = max(len(uncut) + each * float((doubtful > 0).sum()), 1)
    return [
        {
            "model_max_length": candidate,
            "share": float((uncut > candidate).sum() + each * (doubtful > candidate).sum()) / samples,
        }
        for candidate in sorted({*LENGTHS, limit})
    ]


def suggested_maximum(
    shares: list[dict], limit: int, longest: int, seq_length: int | None, positions: int | None
) -> tuple[int, str]:
    """(--model_max_length, why): ``limit`` while that is enough.

    longest: of all samples, uncut. seq_length: the one that is suggested, None: nothing is kept. positions: the
    language model's limit, None: not known.
    """
    of = {one["model_max_length"]: one["share"] for one in shares}
    words = f"the longest sample has {count(longest)} positions"
    if seq_length is not None and seq_length < limit:
        # Rows hold the longest sample, so nothing was cut.
        return seq_length, f"not above --seq-length; cuts no sample, {words}"
    if of[limit] <= CUT_SHARE:
        return limit, f"enough: cuts {_share(of[limit])}, {words}"
    longer = [length for length in of if length > limit and (positions is None or length <= positions)]
    enough = [length for length in longer if of[length] <= CUT_SHARE]
    chosen = (enough or longer[-1:] or [limit])[0]
    if chosen == limit:
        return limit, f"cuts {_share(of[limit])}, {words}, and the language model has {positions} positions"
    return chosen, f"cuts {_share(of[chosen])}, {limit} cuts {_share(of[limit])}; {words}; rows have to be as long"


def _share(share: float) -> str:
    return f"{percent(share)} of the samples" if share else "no sample"


def _candidates(longest: int, usual: int) -> list[int]:
    """Row lengths to try; ``usual``: of a run without --seq-length."""
    fitting = {length for length in (*LENGTHS, usual) if length >= longest}
    return sorted(fitting or {math.ceil(longest / 1024) * 1024})


def _packed(
    part: np.ndarray,
    lengths: np.ndarray,
    tiles: np.ndarray,
    seq_length: int,
    config: DataConfig,
    samples: int,
    samples_per_step: int,
) -> dict:
    rows = pack(part, lengths, tiles, seq_length, seed=(config.seed, 0, 0))
    # As training does where the batch is given in samples.
    rows_per_step = max(1, round(samples_per_step * float(lengths[part].mean()) / seq_length))
    figures = statistics(rows, lengths, tiles, seq_length, rows_per_step)
    epoch_rows = round(figures.rows * samples / len(part))
    return {
        "seq_length": seq_length,
        "fill": figures.fill,
        "rows": epoch_rows,
        "samples_per_row": figures.samples_per_row,
        "rows_per_step": rows_per_step,
        "steps": math.ceil(epoch_rows / rows_per_step),
        "tiles_per_row_mean": figures.tiles_mean,
        "tiles_per_row_max": figures.tiles_max,
    }


def _padded(part: np.ndarray, lengths: np.ndarray, samples: int, samples_per_step: int) -> dict:
    own = lengths[part].astype(np.int64)
    starts = np.arange(0, len(own), PADDED_BATCH)
    sizes = np.diff(np.append(starts, len(own)))
    return {
        "batch": PADDED_BATCH,
        "fill": float(own.sum() / (np.maximum.reduceat(own, starts) * sizes).sum()),
        "rows": samples,
        "steps": math.ceil(samples / samples_per_step),
    }
