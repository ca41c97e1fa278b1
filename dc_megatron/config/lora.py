"""Low-rank adapters (Hu et al., "LoRA", 2021): their size, and the linears of a language model that get one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoraConfig:
    """y = W x + alpha / r * B A dropout(x), with A [r, inputs] and B [outputs, r]; names and meanings are PEFT's."""

    r: int
    alpha: int
    dropout: float = 0.0

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.r


@dataclass(frozen=True)
class HuggingFaceLinear:
    """``name`` of the module, with ``{layer}`` in it, such as model.layers.{layer}.self_attn.q_proj."""

    name: str
    outputs: int
    inputs: int


@dataclass(frozen=True)
class AdaptedLinear:
    """A Megatron linear of every layer and the Hugging Face linears that it is made of.

    ``module``: its name within the layer. ``row_parallel``: sharded on its inputs; otherwise on its outputs, where the
    rows of ``parts`` lie in ``blocks`` blocks over the whole tensor-parallel group, each with its share of every part;
    0 blocks: one for each rank.
    """

    module: str
    parts: tuple[HuggingFaceLinear, ...]
    row_parallel: bool
    blocks: int = 0
