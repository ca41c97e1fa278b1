"""What is installed, found out without importing it: the one place that looks for the optional packages.

A package that is found may still fail to import, for example when it was built for another PyTorch. ``import_error``
tries; it is for programs that have time for it.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _distribution_version
from importlib.util import find_spec

# NVIDIA names DALI's distribution after the CUDA version that it is built for.
_DALI_DISTRIBUTIONS = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")


def version_of(*distributions: str) -> str | None:
    """Version of the first of ``distributions`` that is installed, or None."""
    for name in distributions:
        try:
            return _distribution_version(name)
        except PackageNotFoundError:
            continue
    return None


def has_module(name: str) -> bool:
    """Whether ``import name`` would find something. Only for top-level names: nothing is imported."""
    assert "." not in name, f"{name}: looking for a submodule imports its parents"
    return find_spec(name) is not None


def has_transformer_engine() -> bool:
    """Transformer Engine with its PyTorch part: the plain package alone cannot build a layer."""
    return has_module("transformer_engine") and has_module("transformer_engine_torch")


def has_apex() -> bool:
    """NVIDIA's apex with its compiled kernels; the package of the same name on the registry has none."""
    return has_module("apex") and has_module("fused_weight_gradient_mlp_cuda")


def has_flash_attention() -> bool:
    return has_module("flash_attn")


def has_dali() -> bool:
    return version_of(*_DALI_DISTRIBUTIONS) is not None


def dali_version() -> str | None:
    return version_of(*_DALI_DISTRIBUTIONS)


def import_error(module: str, timeout: float = 120.0) -> str | None:
    """None if ``module`` can be imported in a fresh Python, else the last line of what it said."""
    # torch first: the compiled parts of Transformer Engine and flash-attn find their libraries through it.
    code = f"import torch, importlib; importlib.import_module({module!r})"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout:.0f} s"
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else (lines[-1] if lines else f"exit status {done.returncode}")
