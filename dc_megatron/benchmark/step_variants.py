"""The sides of a benchmark of training steps: ours in its forms, and the baselines."""

from __future__ import annotations

from dataclasses import dataclass

from dc_megatron.config import nearest
from dc_megatron.errors import UserError


@dataclass(frozen=True)
class Variant:
    """One way of doing the workload's step.

    program: "megatron" (this package) or "hf" (the plain reference). plain: without Transformer Engine, packing and
    the head on supervised rows, with everything recomputed. fp8_recipe: Megatron's name, or None for no FP8.
    """

    name: str
    what: str
    program: str = "megatron"
    trainable: tuple[str, ...] | None = None
    tensor_parallel: int = 1
    fp8_recipe: str | None = None
    text_only: bool = False
    plain: bool = False
    recompute: bool = False
    transformer_engine: bool = True
    whole_last_layer: bool = False

    @property
    def packed(self) -> bool:
        return self.program == "megatron" and not self.plain


_ALL = (
    Variant("ours", "packed rows, head on supervised positions, the fastest kernels here, nothing recomputed"),
    Variant("ours-tp2", "the same over two processes", tensor_parallel=2),
    Variant("ours-stage1", "the same, the connector alone learns", trainable=("connector",)),
    Variant("ours-stage2", "the same, connector and language model learn", trainable=("connector", "llm")),
    Variant("ours-whole-last-layer", "the same, the last layer at all positions", whole_last_layer=True),
    Variant("ours-torch", "the same without Transformer Engine", transformer_engine=False),
    Variant("ours-fp8", "the same in FP8, delayed scaling", fp8_recipe="delayed"),
    Variant("ours-fp8-tensorwise", "the same in FP8, current scaling", fp8_recipe="tensorwise"),
    Variant("ours-fp8-blockwise", "the same in FP8, blockwise scaling", fp8_recipe="blockwise"),
    Variant("text-only", "ours, with words in the places of the pictures", text_only=True),
    Variant(
        "text-only-fp8", "ours in FP8, with words in the places of the pictures", text_only=True, fp8_recipe="delayed"
    ),
    Variant("megatron-plain", "padded, recomputed, all logits, torch kernels", plain=True, recompute=True),
    Variant("hf", "transformers, padded, gradient checkpointing, SDPA, AdamW", program="hf", recompute=True),
    Variant("hf-no-recompute", "transformers, padded, SDPA, AdamW, nothing recomputed", program="hf"),
)
VARIANTS = {variant.name: variant for variant in _ALL}


def variants_of(names: list[str]) -> list[Variant]:
    """The variants of these names, ``ours`` first. UserError for a name that is none."""
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"--baseline {name}: unknown{nearest(name, list(VARIANTS))}; one of: {', '.join(VARIANTS)}")
    return [VARIANTS[name] for name in dict.fromkeys(["ours", *names])]
