"""Records that are there more than once, from the hashes of their contents and of their ids."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Groups, and places of each, that a report lists; all are counted.
MOST_GROUPS = 1000
MOST_PLACES = 8

Place = Callable[[int], tuple[int, int]]


def same_content(content: np.ndarray, place: Place) -> dict:
    """Records with the same messages and pictures.

    content: uint64 [n], 0: not compared. ``extra``: records beyond the first of each group; ``groups``: how many;
    ``examples``: [{"records": count, "places": [(source, record), ...]}], the first ones.
    """
    numbers = np.flatnonzero(content)
    order = numbers[np.argsort(content[numbers], kind="stable")]
    starts = _starts(content[order])
    sizes = np.diff(np.append(starts, len(order)))
    repeated = np.flatnonzero(sizes > 1)
    # In the order of their first record, which the stable sort left in front.
    repeated = repeated[np.argsort(order[starts[repeated]], kind="stable")]
    return {
        "groups": len(repeated),
        "extra": int((sizes[repeated] - 1).sum()),
        "examples": [
            {
                "records": int(sizes[group]),
                "places": _places(order[starts[group] : starts[group] + sizes[group]], place),
            }
            for group in repeated[:MOST_GROUPS]
        ],
    }


def same_id(ids: np.ndarray, content: np.ndarray, place: Place) -> dict:
    """Ids that stand for different contents; ``ids``: how many, ``examples`` as above with one place a content."""
    numbers = np.flatnonzero((ids != 0) & (content != 0))
    order = numbers[np.lexsort((numbers, content[numbers], ids[numbers]))]
    # The first record of every (id, content).
    first = np.union1d(_starts(ids[order]), _starts(content[order]))
    order = order[first]
    keys = ids[order]
    starts = _starts(keys)
    sizes = np.diff(np.append(starts, len(order)))
    several = np.flatnonzero(sizes > 1)
    groups = [np.sort(order[starts[group] : starts[group] + sizes[group]]) for group in several[:MOST_GROUPS]]
    return {
        "ids": len(several),
        "examples": [{"records": len(group), "places": _places(group, place)} for group in groups],
    }


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Where each run of equal values begins."""
    if not len(ordered):
        return np.zeros(0, dtype=np.int64)
    return np.concatenate([[0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1])


def _places(numbers: np.ndarray, place: Place) -> list[tuple[int, int]]:
    return [place(int(number)) for number in numbers[:MOST_PLACES]]
