"""What ranks do to find out that their nodes read different data."""

from __future__ import annotations

import torch

from dc_megatron.errors import UserError
from dc_megatron.runtime import parallel
from dc_megatron.training.dataset_provider import _refuse_different_plans


def compare(plans: list[str]) -> str:
    """What this rank is told: nothing, or the words of the refusal."""
    parallel.start()
    try:
        _refuse_different_plans(plans[torch.distributed.get_rank()], "--data_path")
    except UserError as error:
        return str(error)
    return ""
