"""Lengths of samples drawn like those of LLaVA-1.5's two stages, for measuring without its data.

The parts and their shares are the published composition of the 665k mix (558k captions in stage 1). The texts' lengths
are NOT measured on it: they are log-normal with parameters chosen here, so that the means are near 780 (stage 2) and
600 positions (stage 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IMAGE_TOKENS = 576
LONGEST = 2048


@dataclass(frozen=True)
class Part:
    """Samples of one kind: their number in the mix, pictures of each, and the text in tokens, template included.

    The text's length is exp(normal(log(``median``), ``sigma``)), at least ``shortest``; sample and picture together are
    cut at LONGEST positions.
    """

    name: str
    count: int
    pictures: int
    median: float
    sigma: float
    shortest: int


STAGES = {
    1: (Part("captions", 558_128, 1, 22, 0.35, 4),),
    2: (
        Part("instructions in several turns (LLaVA-Instruct)", 157_712, 1, 260, 0.45, 60),
        Part("many short questions (VQAv2, GQA, Visual Genome, RefCOCO)", 289_500, 1, 150, 0.55, 50),
        Part("questions on book covers (OCR-VQA)", 80_000, 1, 140, 0.2, 50),
        Part("single questions and captions (OKVQA, A-OKVQA, TextCaps)", 97_398, 1, 95, 0.25, 50),
        Part("text only (ShareGPT)", 40_688, 0, 1000, 0.9, 60),
    ),
}


def llava_lengths(samples: int, stage: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(lengths, tiles), both int32 [samples], the parts mixed at random in the proportions of ``STAGES[stage]``."""
    parts = STAGES[stage]
    state = np.random.RandomState(seed)
    counts = np.array([part.count for part in parts])
    part = state.choice(len(parts), size=samples, p=counts / counts.sum())

    def of_part(name: str) -> np.ndarray:
        return np.array([getattr(one, name) for one in parts])[part]

    text = np.exp(state.normal(np.log(of_part("median")), of_part("sigma"))).astype(np.int64)
    tiles = of_part("pictures")
    lengths = np.minimum(np.maximum(text, of_part("shortest")) + tiles * IMAGE_TOKENS, LONGEST)
    return lengths.astype(np.int32), tiles.astype(np.int32)
