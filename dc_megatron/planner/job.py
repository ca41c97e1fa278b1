"""What is to be planned: a model and its data on so many GPUs of a kind, and one way to do it."""

from __future__ import annotations

from dataclasses import dataclass

from dc_megatron.config import ImageTiling
from dc_megatron.planner.assumed_data import Mix
from dc_megatron.planner.memory import Numbers
from dc_megatron.planner.parameter_count import Model


@dataclass(frozen=True)
class Gpu:
    """memory: bytes. flops: dense operations a second in 16 bits, as its maker gives them."""

    name: str
    memory: int
    flops: float
    bf16: bool = True
    fp8: bool = False


# NVIDIA's data sheets: dense tensor-core operations, SXM forms.
GPUS = {
    "v100": Gpu("v100", 32 * 10**9, 125e12, bf16=False),
    "a100": Gpu("a100", 80 * 10**9, 312e12),
    "h100": Gpu("h100", 80 * 10**9, 989e12, fp8=True),
    "h200": Gpu("h200", 141 * 10**9, 989e12, fp8=True),
}

_LEAN_FLAGS = (
    *("--use-precision-aware-optimizer", "--main-grads-dtype", "bf16"),
    *("--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"),
)


@dataclass(frozen=True)
class Precision:
    """Bytes of a number without regard to sharding, the flags that ask for it, and what is to be known."""

    numbers: Numbers
    flags: tuple[str, ...]
    note: str = ""
    # Megatron has the precision-aware optimizer under the distributed one alone.
    needs_sharding: bool = False


PRECISIONS = {
    "bf16": Precision(Numbers(2, 4, 12), ("--bf16", "True")),
    "bf16-lean": Precision(
        Numbers(2, 2, 6),
        ("--bf16", "True", *_LEAN_FLAGS),
        "gradients and moments in bf16; needs Transformer Engine",
        needs_sharding=True,
    ),
    "fp8": Precision(
        Numbers(2, 4, 12, fp8=True), ("--bf16", "True", "--fp8-format", "hybrid"), "needs Transformer Engine"
    ),
    "fp8-lean": Precision(
        Numbers(2, 2, 6, fp8=True),
        ("--bf16", "True", "--fp8-format", "hybrid", *_LEAN_FLAGS),
        "gradients and moments in bf16; needs Transformer Engine",
        needs_sharding=True,
    ),
    "fp16": Precision(Numbers(2, 2, 12), ("--bf16", "False", "--fp16", "True")),
}


@dataclass(frozen=True)
class Job:
    """samples_per_step: LLaVA's global batch. row_lengths: of packed rows, to choose from; one if it is given.

    packed False: rows are one sample, up to the only row length. max_length: of a sample.
    """

    model: Model
    tiling: ImageTiling
    mix: Mix
    gpus: int
    gpu: Gpu
    per_node: int = 8
    samples_per_step: int = 128
    epochs: float = 1.0
    max_length: int = 2048
    row_lengths: tuple[int, ...] = (4096, 8192)
    packed: bool = True
    precisions: tuple[str, ...] = ("bf16", "bf16-lean")


@dataclass(frozen=True)
class Choice:
    """One way: sizes of the groups, virtual stages, rows of a micro-batch and their length, numbers, sharding.

    context: of context parallelism, which the search leaves at 1.
    """

    tensor: int
    pipeline: int
    virtual: int
    rows: int
    row_length: int
    precision: str
    sharded: bool
    context: int = 1
