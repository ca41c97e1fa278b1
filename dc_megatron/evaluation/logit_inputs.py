"""The input that two models are compared on: seeded words, and where both see, words around one picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dc_megatron.config import VisionConfig

ROWS, LENGTH = 4, 48
# Words in front of the picture; the others follow it.
_IN_FRONT = 4
_SEED = 20


@dataclass(frozen=True)
class LogitInput:
    """``ids`` int64 [b, s], 0 where ``image_mask`` [b, s] says that the picture's features go.

    ``pixel_values`` fp32 [1, 3, H, W] in the range that the tower's processor makes, None without a picture.
    """

    ids: Tensor
    image_mask: Tensor
    pixel_values: Tensor | None = None

    @property
    def word_places(self) -> Tensor:
        """Indices into the flattened b * s of what is no picture: there logits are compared."""
        return (~self.image_mask).flatten().nonzero().squeeze(-1)

    def to(self, place: torch.device) -> LogitInput:
        pixels = None if self.pixel_values is None else self.pixel_values.to(place)
        return LogitInput(self.ids.to(place), self.image_mask.to(place), pixels)


def text_input(vocab_size: int, special: set[int]) -> LogitInput:
    """[ROWS, LENGTH] ids below ``vocab_size`` and not in ``special``."""
    ids = _words((ROWS, LENGTH), vocab_size, special, _SEED)
    return LogitInput(ids, torch.zeros_like(ids, dtype=torch.bool))


def picture_input(vocab_size: int, special: set[int], tokens: int, vision: VisionConfig) -> LogitInput:
    """One row of LENGTH words around a picture of noise that takes ``tokens`` positions."""
    words = _words((1, LENGTH), vocab_size, special, _SEED + 1)
    hole = words.new_zeros(1, tokens)
    ids = torch.cat([words[:, :_IN_FRONT], hole, words[:, _IN_FRONT:]], dim=1)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, _IN_FRONT : _IN_FRONT + tokens] = True
    generator = torch.Generator().manual_seed(_SEED + 2)
    noise = torch.rand(1, 3, vision.image_size, vision.image_size, generator=generator)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (vision.image_mean, vision.image_std))
    return LogitInput(ids, mask, (noise - mean) / std)


def _words(shape: tuple[int, int], vocab_size: int, special: set[int], seed: int) -> Tensor:
    allowed = torch.tensor([number for number in range(vocab_size) if number not in special])
    generator = torch.Generator().manual_seed(seed)
    return allowed[torch.randint(len(allowed), shape, generator=generator)]
