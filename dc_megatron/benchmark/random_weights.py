"""Random weights that depend on a tensor's Hugging Face name alone: every implementation starts from the same model."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor, nn

DEVIATION = 0.02


def random_tensor(name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 ``shape`` on ``device``: ones for norms, zeros for biases, else normal with deviation DEVIATION."""
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    if "norm" in name.rsplit(".", 2)[-2]:
        return torch.ones(shape, device=device)
    generator = torch.Generator(device).manual_seed(xxhash.xxh32_intdigest(name.encode()))
    return torch.empty(shape, device=device).normal_(0.0, DEVIATION, generator=generator)


@torch.no_grad()
def fill_randomly(module: nn.Module, prefix: str = "") -> None:
    """Every parameter of ``module``, by its name behind ``prefix``."""
    for name, parameter in module.named_parameters():
        parameter.copy_(random_tensor(prefix + name, tuple(parameter.shape), parameter.device))
