"""Whether two folders compute the same: fp32 logits of one input, whatever the formats.

Bits can be equal where a configuration is wrong (a rotary base, the layers of the tower, the order of channels); this
runs both models. They are loaded one after the other, never at once.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from dc_megatron.errors import UserError
from dc_megatron.evaluation.logit_inputs import LogitInput, picture_input, text_input
from dc_megatron.evaluation.logit_sides import Side, open_side
from dc_megatron.runtime import device

# Of the largest logit. Two orders of fp32 sums differ by some units of 6e-8; a value that was rounded to 16 bits on
# the way differs by 5e-4 or more.
TOLERANCE = 2e-5
# Units of rounding that logits may differ by where the weights themselves were rounded differently.
ROUNDED_UNITS = 16
# Room for activations, logits and libraries beside the weights.
_BESIDE = 1 << 30
_SPARE = 1.1


@dataclass(frozen=True)
class LogitDifference:
    """Of one input (``text`` or ``picture``), over ``places`` positions and the common vocabulary.

    ``same_tokens``: positions at which both have the largest logit at the same token. ``why``: what ``tolerance`` is.
    """

    input: str
    largest: float
    tolerance: float
    places: int
    same_tokens: int
    why: str

    @property
    def equal(self) -> bool:
        return self.largest <= self.tolerance  # False for nan and inf


@dataclass(frozen=True)
class LogitComparison:
    """``notes``: what was not compared, and why."""

    differences: list[LogitDifference]
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return all(difference.equal for difference in self.differences)

    def lines(self) -> list[str]:
        """For people, one for each input."""
        return [
            f"logits of {d.input}: the largest difference is {d.largest:.3g}, {'within' if d.equal else 'OVER'} the"
            f" tolerance of {d.tolerance:.3g} ({d.why}); same first token at {d.same_tokens} of {d.places} positions"
            for d in self.differences
        ]

    def as_entries(self) -> dict:
        """For JSON, which has no numbers beyond the finite ones: None stands for them."""
        found = [
            {**asdict(d), "equal": d.equal, "largest": d.largest if math.isfinite(d.largest) else None}
            for d in self.differences
        ]
        return {"logits_equal": self.equal, "logits": found, "logits_notes": self.notes}


def compare_logits(a: str, b: str, *, step: int | None = None, vision_tower: str = "") -> LogitComparison:
    """Run the models in ``a`` and ``b``: checkpoints of training or import, text, LLaVA or llava-hf folders.

    ``step``: of the checkpoints. ``vision_tower``: for folders that do not carry their tower. Seeded words go through
    both, and words around one picture where both can see. UserError: folders that cannot be opened or run, models that
    do not fit into the free memory.
    """
    sides = [open_side(a, "A", step, vision_tower), open_side(b, "B", step, vision_tower)]
    for side in sides:
        _refuse_large(side)
    columns = min(side.vocab_size for side in sides)
    inputs, notes = _inputs(sides, columns)
    logits = [side.compute(list(inputs.values()), columns) for side in sides]
    differences = [
        _difference(name, left, right, _rounding(sides, name))
        for name, left, right in zip(inputs, logits[0], logits[1], strict=True)
    ]
    return LogitComparison(differences, notes)


def _inputs(sides: list[Side], vocab_size: int) -> tuple[dict[str, LogitInput], list[str]]:
    special = set().union(*(side.special_ids for side in sides))
    inputs = {"text": text_input(vocab_size, special)}
    why = next((side.no_picture for side in sides if side.no_picture), "")
    shapes = [(side.tokens, side.vision.image_size if side.vision else 0) for side in sides]
    if not why and shapes[0] != shapes[1]:
        seen = [
            f"{side.what} gives a picture of {size} pixels {n} positions"
            for side, (n, size) in zip(sides, shapes, strict=True)
        ]
        why = ", ".join(seen)
    if why:
        return inputs, [f"logits are compared of words alone: {why}"]
    inputs["picture"] = picture_input(vocab_size, special, sides[0].tokens, sides[0].vision)
    return inputs, []


def _rounding(sides: list[Side], name: str) -> torch.dtype:
    """The coarsest dtype that one side's weights went through and the other's did not; fp32 where there is none.

    That is where dtypes differ, and where the means of a connector were folded into a projector of 16 bits.
    """
    kinds = [side.dtypes[name == "picture"] for side in sides]
    folded = name == "picture" and sides[0].folded != sides[1].folded
    if kinds[0] == kinds[1] and not folded:
        return torch.float32
    return max((kind for side in kinds for kind in side), key=lambda kind: torch.finfo(kind).eps)


def _difference(name: str, a: Tensor, b: Tensor, rounded: torch.dtype) -> LogitDifference:
    finite = torch.cat([a, b]).abs().nan_to_num(0.0, 0.0, 0.0)
    scale = max(1.0, finite.max().item())
    share, why = TOLERANCE, f"{TOLERANCE:g} x the largest logit, {scale:.3g}"
    if rounded != torch.float32:
        unit = torch.finfo(rounded).eps / 2
        share = ROUNDED_UNITS * unit
        kind = str(rounded).removeprefix("torch.")
        why = f"{ROUNDED_UNITS} roundings of {kind} x the largest logit, {scale:.3g}: weights were rounded on the way"
    return LogitDifference(
        input=name,
        largest=(a - b).abs().max().item(),
        tolerance=share * scale,
        places=len(a),
        same_tokens=int((a.argmax(dim=1) == b.argmax(dim=1)).sum()),
        why=why,
    )


def _refuse_large(side: Side) -> None:
    needed = int(4 * side.parameters * _SPARE) + _BESIDE
    free = {"memory": _available_memory()}
    if device.has_cuda():
        free["memory of the GPU"] = torch.cuda.mem_get_info()[0]
    for where, bytes_free in free.items():
        if needed > bytes_free:
            raise UserError(
                f"{side.what}: --logits: in fp32 it has {4 * side.parameters / 1e9:.2f} GB of weights and needs"
                f" {needed / 1e9:.1f} GB, and {bytes_free / 1e9:.1f} GB of {where} are free; without --logits bits are"
                " compared in little memory" + ("; DC_DEVICE=cpu leaves the GPU out" if "GPU" in where else "")
            )


def _available_memory() -> int:
    """Bytes that this machine can give without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
