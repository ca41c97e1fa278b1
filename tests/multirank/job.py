"""The description of one training run of a parity test, light enough for the test process itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from dc_megatron.config import ImageTiling, LoraConfig


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
    context: int = 1
    # Who encodes images, as --vision-tower-stages says.
    tower_stages: str = "first"
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    lr: float = 1e-3
    # Peak learning rate of parts with one of their own, and each step's share of the peak.
    rates: dict[str, float] = field(default_factory=dict)
    shares: tuple[float, ...] = ()
    weight_decay: float = 0.0
    packed: bool = False
    bf16: bool = False
    # "full" or "selective" (the MLPs).
    recompute: str = ""
    fp16: bool = False
    initial_loss_scale: float = 2.0**16
    loss_reduction: str = "token"
    connector_state: dict = field(default_factory=dict)
    fault: str | None = None
    # In place of the head's own limit.
    chunk_bytes: int | None = None
    tiling: ImageTiling | None = None
    # Adapters beside the linears, and their whole factors by name (model.layers.0. ... .lora_A.weight) to start from.
    lora: LoraConfig | None = None
    lora_state: dict = field(default_factory=dict)
