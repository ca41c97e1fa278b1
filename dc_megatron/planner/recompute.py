"""Which activations to compute again in the backward pass: as few as the GPU's memory allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dc_megatron.planner.flops import linear_parameters
from dc_megatron.planner.memory import Recompute, Run, largest_stage

# Left free for what the allocator cannot use of its memory. An allowance, not measured.
SPARE = 0.03


@dataclass(frozen=True)
class RecomputeChoice:
    """words: for Megatron's parser. needed: bytes of the fullest stage with it. fits: by the estimate.

    extra: operations that are done again, as a share of the decoder's forward pass. why: one sentence.
    """

    recompute: Recompute
    words: tuple[str, ...]
    needed: float
    extra: float
    fits: bool
    why: str


def recompute_words(recompute: Recompute, all_layers: bool = False) -> tuple[str, ...]:
    """Megatron's flags (0.19.2). all_layers: no layer is left out, which Megatron calls uniform.

    Selective names the MLP: fused attention keeps no scores, so Megatron's own default, core_attn, would save nothing
    here, and Transformer Engine's norms lie inside its linear layers, so ``layernorm`` would not either.
    """
    if recompute.granularity == "none":
        return ()
    if recompute.granularity == "selective":
        return ("--recompute-granularity", "selective", "--recompute-modules", "mlp")
    method, layers = ("uniform", 1) if all_layers else ("block", recompute.layers)
    return ("--recompute-granularity", "full", "--recompute-method", method, "--recompute-num-layers", str(layers))


def choose_recompute(run: Run, sample_positions: float, gpu_memory_bytes: int) -> RecomputeChoice:
    """The way to recompute that fits into the GPU with the fewest operations; without one that fits, everything.

    sample_positions: positions that attention looks back over, of a sample; what attention costs grows with it.
    """
    usable = (1 - SPARE) * gpu_memory_bytes
    without = largest_stage(run).total
    fitting = []
    for recompute in _ways(run):
        needed = largest_stage(run, recompute).total
        if needed <= usable:
            fitting.append((_extra(run, recompute, sample_positions), needed, recompute))
    if fitting:
        extra, needed, recompute = min(fitting, key=lambda one: one[0])
    else:
        recompute = Recompute("full", _deepest(run))
        extra, needed = 1.0, largest_stage(run, recompute).total
    return RecomputeChoice(
        recompute=recompute,
        words=recompute_words(recompute, all_layers=recompute.layers >= _deepest(run)),
        needed=needed,
        extra=extra,
        fits=bool(fitting),
        why=_why(run, recompute, without, needed, gpu_memory_bytes, bool(fitting)),
    )


def _deepest(run: Run) -> int:
    """Layers of the largest chunk: Megatron counts recomputed layers in each chunk anew."""
    return max(layers for chunks in run.stages for layers in chunks)


def _ways(run: Run) -> Iterator[Recompute]:
    yield Recompute()
    yield Recompute("selective")
    for layers in range(1, _deepest(run) + 1):
        yield Recompute("full", layers)


def _extra(run: Run, recompute: Recompute, sample_positions: float) -> float:
    """Operations done again over those of the decoder's forward pass."""
    if recompute.granularity == "selective":
        language = run.language
        mlp = 2 * 3 * language.hidden_size * language.intermediate_size
        # Causal: half of the square, for scores and weighted sum.
        attention = 2 * sample_positions * language.num_attention_heads * language.head_dim
        return mlp / (2 * linear_parameters(language) / language.num_hidden_layers + attention)
    again = sum(min(recompute.layers, layers) for chunks in run.stages for layers in chunks)
    return again / sum(map(sum, run.stages))


def _why(run: Run, recompute: Recompute, without: float, needed: float, memory: int, fits: bool) -> str:
    have = f"the {memory / 1e9:.1f} GB of this GPU, {SPARE:.0%} of which stay free"
    if recompute.granularity == "none":
        return f"nothing is computed again: about {without / 1e9:.1f} GB fit into {have}"
    if recompute.granularity == "selective":
        what = "the MLP of every layer is"
    elif recompute.layers >= _deepest(run):
        what = "every layer is"
    else:
        place = "a stage" if len(run.stages) == 1 else "each stage" if len(run.stages[0]) == 1 else "each chunk"
        of = f"the {sum(run.stages[0])} layers" if len(run.stages) == 1 else f"the layers of {place}"
        what = f"{recompute.layers} of {of} {'is' if recompute.layers == 1 else 'are'}"
    why = f"{what} computed again: about {needed / 1e9:.1f} GB in place of {without / 1e9:.1f} GB, for {have}"
    if not fits:
        why += "; by this estimate that is still too much: use more GPUs, or a smaller --seq-length"
    return why
