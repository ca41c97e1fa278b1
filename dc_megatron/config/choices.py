"""The words that settings may be, and what is said of others."""

from __future__ import annotations

import difflib

from dc_megatron.errors import UserError

CONNECTOR_TYPES = ("sti", "sci", "dci", "none")
PROJECTOR_TYPES = ("mlp2x_gelu",)
TEMPLATES = ("plain", "v1", "llama_3", "llama_3_chat", "mpt", "chatml_direct", "phi")
IMAGE_ASPECT_RATIOS = ("square", "pad", "anyres")


def nearest(value: str, choices) -> str:
    """`` (did you mean 'x'?)`` for the closest of ``choices``, or an empty string."""
    match = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.4)
    return f" (did you mean '{match[0]}'?)" if match else ""


def one_of(value: str, choices, flag: str) -> str:
    """``value`` if it is among ``choices``; otherwise a UserError that names ``flag`` and the nearest choice."""
    if value not in choices:
        raise UserError(f"{flag} {value}: unknown{nearest(value, choices)}; one of: {', '.join(choices)}")
    return value
