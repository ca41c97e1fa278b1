"""Which implementation computes each part of a step on this machine, and why not the faster one.

``doctor`` and the first lines of a run show the same answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from dc_megatron.runtime import device, installed


@dataclass(frozen=True)
class Choice:
    """The implementation of one part, and what speaks against a faster one ("" where there is none)."""

    choice: str
    why: str


@dataclass(frozen=True)
class Machine:
    """What decides: is there a GPU, its compute capability (None: unknown), and for each optional package why it cannot
    be used (None: it can)."""

    cuda: bool
    capability: tuple[int, int] | None
    transformer_engine: str | None
    apex: str | None
    flash_attention: str | None


def this_machine() -> Machine:
    """The facts about this process."""
    return Machine(
        device.has_cuda(),
        device.compute_capability(),
        installed.transformer_engine_error(),
        installed.apex_error(),
        installed.flash_attention_error(),
    )


def chosen_kernels(
    machine: Machine, dtype: str = "bfloat16", fp8: str | None = None, context_parallel: bool = False
) -> dict[str, Choice]:
    """Part -> Choice for attention, norms, products (GEMMs) and optimizer.

    dtype: torch's name of what a run computes in. fp8: the recipe of scaling, or None. context_parallel: rows are
    divided over ranks, for which attention is always ours.
    """
    if not machine.cuda:
        why = "there is no GPU"
        return {
            "attention": Choice("torch SDPA, each sample of a row alone", why),
            "norms": Choice("torch", why),
            "products": Choice(f"torch, {dtype}", why),
            "optimizer": Choice("torch AdamW", why),
        }
    if machine.transformer_engine is None:
        return {
            "attention": _torch_attention(machine, dtype, "--context-parallel-size gathers keys and values itself")
            if context_parallel
            else Choice("Transformer Engine", ""),
            "norms": Choice("Transformer Engine, with the product behind them", ""),
            "products": Choice(f"Transformer Engine, {'FP8, ' + fp8 if fp8 else dtype}", _why_no_fp8(machine, fp8)),
            "optimizer": Choice("Transformer Engine FusedAdam", ""),
        }
    without = f"Transformer Engine: {machine.transformer_engine}"
    return {
        "attention": _torch_attention(machine, dtype, without),
        "norms": Choice("torch", without),
        "products": Choice(f"torch, {dtype}", without),
        "optimizer": Choice("apex FusedAdam", without)
        if machine.apex is None
        else Choice("torch AdamW", f"{without}; apex: {machine.apex}"),
    }


def _why_no_fp8(machine: Machine, fp8: str | None) -> str:
    if fp8:
        return ""
    if machine.capability is not None and machine.capability < (8, 9):
        return f"FP8 needs compute capability 8.9, this GPU has {'.'.join(map(str, machine.capability))}"
    return "--fp8-format hybrid is faster"


def _torch_attention(machine: Machine, dtype: str, without: str) -> Choice:
    """As ``model.attention.packed_kernel`` chooses."""
    if dtype not in ("bfloat16", "float16"):
        return Choice("torch SDPA, each sample of a row alone", f"flash attention takes 16 bits, not {dtype}")
    if machine.capability is not None and machine.capability < (8, 0):
        have = ".".join(map(str, machine.capability))
        return Choice("torch SDPA, each sample of a row alone", f"flash attention needs capability 8.0, not {have}")
    if machine.flash_attention is None:
        return Choice("flash-attn, variable lengths", without)
    return Choice("torch's flash attention, variable lengths", f"{without}; flash-attn: {machine.flash_attention}")


def as_line(kernels: dict[str, Choice]) -> str:
    """One line for the first lines of a run; a reason that several parts share is said once."""
    parts = ", ".join(f"{part}: {choice.choice}" for part, choice in kernels.items())
    reasons = "; ".join(dict.fromkeys(choice.why for choice in kernels.values() if choice.why))
    return f"kernels: {parts}" + (f" ({reasons})" if reasons else "")
