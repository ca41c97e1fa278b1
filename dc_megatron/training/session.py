"""What the functions that wrap the engine share during one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron.core.optimizer import MegatronOptimizer

from dc_megatron.data.loader import MicroBatches
from dc_megatron.training.fp8_band import Fp8Band
from dc_megatron.training.fsdp_state import DividedState
from dc_megatron.training.metrics import Clock, MetricsFile, StepCounts
from dc_megatron.training.run import Checked
from dc_megatron.training.sample_pictures import SamplePictures
from dc_megatron.training.saving import Saving
from dc_megatron.training.stall_watch import StallWatch
from dc_megatron.training.step_images import StepImages


@dataclass
class Session:
    """What the hooks share during one run."""

    checked: Checked
    plan_hash: str
    images_of_an_epoch: int
    dropped_samples: int
    counts: StepCounts
    clock: Clock
    stall: StallWatch
    loaders: list[MicroBatches]
    # Where all stages encode images: the iterator of this rank's first chunk.
    step_images: list[StepImages] = field(default_factory=list)
    validation_counts: StepCounts = field(default_factory=StepCounts)
    # The last step of this run, and (step, result) of the last evaluation.
    iteration: int | None = None
    evaluated: tuple[int | None, tuple] | None = None
    metrics: MetricsFile | None = None
    pictures: SamplePictures | None = None
    band: Fp8Band | None = None
    tower_hash: str | None = None
    # Below adapters: file -> hash of the frozen language model's weights.
    base_files: dict[str, str] | None = None
    # Tokens that the run has seen since step 0, over all its resumes.
    consumed_tokens: dict[str, int] = field(default_factory=lambda: {"processed": 0, "supervised": 0})
    # Megatron's, of this rank: its groups say how fast each part learns.
    optimizer: MegatronOptimizer | None = None
    # The save that began last.
    saving: Saving | None = None
    # Under Megatron-FSDP: what this rank keeps of the model.
    divided: DividedState | None = None
    # Called with the folder and the iteration's place after a save, where somebody else wants to hear of it.
    saved_elsewhere: Callable[[str, str], None] | None = None
