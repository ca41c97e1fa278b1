"""The description of one training run of a parity test, light enough for the test process itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from dc_megatron.config import ImageTiling


@dataclass(frozen=True)
class Job:
    """One training run on one layout. ``micro_batches`` holds all micro-batches of the global batch, a list a step.

    ``connector_state`` holds an ``image_newline`` as well where ``tiling`` has one.
    """

    language_folder: str
    vision_folder: str
    micro_batches: list
    connector_type: str = "dci"
    trainable: str = "connector,llm"
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    lr: float = 1e-3
    packed: bool = False
    bf16: bool = False
    # "full" or "selective" (the MLPs).
    recompute: str = ""
    loss_reduction: str = "token"
    connector_state: dict = field(default_factory=dict)
    fault: str | None = None
    # In place of the head's own limit.
    chunk_bytes: int | None = None
    tiling: ImageTiling | None = None
