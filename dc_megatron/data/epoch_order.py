"""Which samples an epoch has, and in which order: integers that depend on the seed and the epoch only.

RandomState, because numpy promises that its streams never change: a run must resume under a later numpy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Changes with every change of the order that ``grouped_by_modality_length`` gives.
GROUPER_VERSION = 1
# Words beside seed and epoch that different draws start from.
_PART_DRAWS, _GROUP_DRAWS = 1, 2


def random_state(*words: int) -> np.random.RandomState:
    """The stream of random numbers that belongs to these words (seed, epoch, ...), all >= 0.

    A zero at the end changes nothing while there are four words or fewer.
    """
    return np.random.RandomState(np.random.SeedSequence(words).generate_state(4))


def epoch_samples(sources: np.ndarray, weights: Sequence[float], seed: int, epoch: int, order: str) -> np.ndarray:
    """int64 [m]: the samples of ``epoch`` in their order: shuffled anew every epoch, or sequential as in the files.

    ``sources``: int [n], the source of every sample. Source s counts ``weights[s]`` times: whole copies, and of the
    fraction a part that is drawn anew every epoch (rounded, at least one sample). m is the same for every epoch.
    """
    times = _times_of_samples(sources, weights, seed, epoch)
    rounds = [np.flatnonzero(times > number) for number in range(int(times.max(initial=0)))]
    samples = np.concatenate([np.zeros(0, dtype=np.int64), *rounds]).astype(np.int64)
    if order == "sequential":
        return samples
    return samples[random_state(seed, epoch).permutation(len(samples))]


def _times_of_samples(sources: np.ndarray, weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """int64 [n]: how often each sample stands in the epoch."""
    times = np.zeros(len(sources), dtype=np.int64)
    for source, weight in enumerate(weights):
        own = np.flatnonzero(np.asarray(sources) == source)
        copies = int(weight)
        times[own] = copies
        if weight > copies and len(own):
            part = max(1, int((weight - copies) * len(own) + 0.5))
            times[own[random_state(seed, epoch, _PART_DRAWS, source).permutation(len(own))[:part]]] += 1
    return times


def grouped_by_modality_length(
    order: np.ndarray, lengths: np.ndarray, tiles: np.ndarray, batch: int, seed: int, epoch: int
) -> np.ndarray:
    """``order`` rearranged as LLaVA's sampler does it for --group_by_modality_length; int64, same samples.

    Batches of ``batch`` samples (the global batch) that all have pictures or all have none, the longest first, in
    random order. The last batches of either kind, whole or not, come at the end together, in the order of the files.
    With one kind of samples only there is no such end.
    """
    with_pictures = np.asarray(tiles)[order] > 0
    kinds = [kind for kind in (order[with_pictures], order[~with_pictures]) if len(kind)]
    batches = [[_longest_first(kind[i : i + batch], lengths) for i in range(0, len(kind), batch)] for kind in kinds]
    if len(kinds) < 2:
        return np.concatenate([np.zeros(0, dtype=np.int64), *(batches[0] if batches else [])])
    whole = [one for kind in batches for one in kind[:-1]]
    whole = [whole[number] for number in random_state(seed, epoch, _GROUP_DRAWS).permutation(len(whole))]
    return np.concatenate([*whole, np.sort(np.concatenate([kind[-1] for kind in batches]))])


def _longest_first(samples: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return samples[np.argsort(-np.asarray(lengths)[samples].astype(np.int64), kind="stable")]
