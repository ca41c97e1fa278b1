"""Pictures decoded whole, as training decodes them: a header that can be read says nothing about what follows it."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import batched, groupby

import numpy as np

from dc_megatron.data.image_loading import LOAD_ERRORS
from dc_megatron.data.image_reference import as_rgb
from dc_megatron.data.image_store import ImageStore
from dc_megatron.data.index import SampleIndex
from dc_megatron.data.picture import Picture
from dc_megatron.reports.preflight_columns import Columns

# Failures that a report lists; all are counted.
MOST_LISTED = 10_000
_AT_ONCE = 256
_MOST_THREADS = 8


@dataclass(frozen=True)
class Wanted:
    """A picture, and the first sample that has it."""

    picture: Picture
    record: int
    identifier: str


def check_decoding(
    index: SampleIndex,
    columns: Columns,
    stores: Sequence[ImageStore],
    number: int | None,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Decode ``number`` random different pictures, or all (None). progress(done, total).

    {"pictures": different ones there are, "checked", "failed", "resized": counts, "failures", "other_sizes": entries
    {"source", "record", "id", "name", "frame", "reason"} of the first MOST_LISTED}. resized: the size is not the one
    that the index has.
    """
    different = columns.different_pictures
    chosen = different
    if number is not None and number < len(different):
        chosen = np.sort(np.random.RandomState(seed).choice(different, number, replace=False))
    result = {"pictures": len(different), "checked": 0, "failed": 0, "resized": 0, "failures": [], "other_sizes": []}
    # PIL warns of large pictures, and of much that is odd in a file; what counts here is whether it decodes.
    with warnings.catch_warnings(), ThreadPoolExecutor(_threads()) as threads:
        warnings.simplefilter("ignore")
        for some in batched(_wanted(index, columns, chosen), _AT_ONCE):
            groups = [list(group) for _, group in groupby(some, _file)]
            for group, reasons in zip(groups, threads.map(lambda one: _decode(one, stores), groups), strict=True):
                for one, (reason, is_size) in zip(group, reasons, strict=True):
                    _count(result, one, reason, is_size)
            progress(result["checked"], len(chosen))
    return result


def _threads() -> int:
    return min(len(os.sched_getaffinity(0)), _MOST_THREADS)


def _wanted(index: SampleIndex, columns: Columns, numbers: np.ndarray) -> Iterator[Wanted]:
    first = columns.first_pictures
    ends = first + columns.pictures
    for number in numbers.tolist():
        owner = int(np.searchsorted(ends, number, side="right"))
        sample = index[owner]
        yield Wanted(sample.images[number - int(first[owner])], sample.record, sample.identifier)


def _file(one: Wanted) -> tuple:
    """Frames of one video are decoded together, pictures one by one."""
    picture = one.picture
    return (picture.source, picture.name) if picture.frame >= 0 else (picture.source, picture.name, id(one))


def _decode(group: list[Wanted], stores: Sequence[ImageStore]) -> list[tuple[str, bool]]:
    """(what is wrong, whether that is the size alone) of every picture; "" where nothing is."""
    pictures = [one.picture for one in group]
    store = stores[pictures[0].source]
    try:
        if pictures[0].frame >= 0:
            from dc_megatron.data.video import read_frames

            frames = read_frames(store, pictures[0].name, [picture.frame for picture in pictures])
            sizes = [(frame.shape[1], frame.shape[0]) for frame in frames]
        else:
            sizes = [as_rgb(io.BytesIO(store.read(pictures[0].name))).size]
    except LOAD_ERRORS as error:
        return [(f"{type(error).__name__}: {error}", False)] * len(group)
    except MemoryError:
        return [("not enough memory to decode it", False)] * len(group)
    return [_size_fault(picture, size) for picture, size in zip(pictures, sizes, strict=True)]


def _size_fault(picture: Picture, size: tuple[int, int]) -> tuple[str, bool]:
    if size == (picture.width, picture.height):
        return "", False
    return f"decodes to {size[0]} x {size[1]} pixels, the index has {picture.width} x {picture.height}", True


def _count(result: dict, one: Wanted, reason: str, is_size: bool) -> None:
    result["checked"] += 1
    if not reason:
        return
    counter, entries = ("resized", "other_sizes") if is_size else ("failed", "failures")
    result[counter] += 1
    if len(result[entries]) < MOST_LISTED:
        picture = one.picture
        where = {"source": picture.source, "record": one.record, "id": one.identifier}
        result[entries].append(where | {"name": picture.name, "frame": picture.frame, "reason": reason[:500]})
