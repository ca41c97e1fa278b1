"""What is remembered of a save between its beginning and its completion, which with --async-save are steps apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dc_megatron.weights.staged_iteration import StagedIteration


@dataclass
class Saving:
    """A save that has begun: what its completion needs of the moment when it began."""

    staged: StagedIteration
    # What the manifest says besides the files.
    position: dict
    tower_trained: bool
    # The connector's tensors, where it is trained and on the rank that has it.
    projector: dict[str, torch.Tensor] | None = None
