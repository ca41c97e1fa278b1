"""What is installed, found out without importing it: the one place that looks for the optional packages.

A package that is found may still fail to import, for example when it was built for another PyTorch. The functions
``usable_*`` try it, once in a process and in this process: training, inference and doctor all decide by them.
``import_error`` tries in another process; it is for programs that have time for it.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from functools import cache
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
    """Transformer Engine with its PyTorch part: the plain package alone cannot build a layer.

    The part is a package of its own whose library lies inside the first one's folder, or beside it (built from source).
    """
    if not has_module("transformer_engine"):
        return False
    return has_module("transformer_engine_torch") or version_of("transformer-engine-torch") is not None


def has_apex() -> bool:
    """NVIDIA's apex with its compiled kernels; the package of the same name on the registry has none."""
    return has_module("apex") and has_module("fused_weight_gradient_mlp_cuda")


@cache
def transformer_engine_error() -> str | None:
    """Why layers and optimizer of Transformer Engine cannot be used in this process, or None if they can."""
    return _usability_error(has_transformer_engine(), "transformer_engine.pytorch")


@cache
def apex_error() -> str | None:
    """Why apex's optimizer and kernels cannot be used in this process, or None if they can."""
    # amp_C and the last are compiled: what the optimizer and the fused accumulation of gradients call.
    return _usability_error(has_apex(), "apex.optimizers", "amp_C", "fused_weight_gradient_mlp_cuda")


@cache
def flash_attention_error() -> str | None:
    """Why flash-attn's kernels cannot be used in this process, or None if they can."""
    return _usability_error(has_flash_attention(), "flash_attn")


def usable_flash_attention() -> bool:
    return flash_attention_error() is None


def usable_transformer_engine() -> bool:
    return transformer_engine_error() is None


def usable_apex() -> bool:
    return apex_error() is None


def _usability_error(found: bool, *modules: str) -> str | None:
    if not found:
        return "not installed"
    # Not at the top: asking what is installed must not import torch, which the next line does.
    from dc_megatron.runtime import device

    if not device.has_cuda():
        return "not used: there is no GPU, or DC_DEVICE=cpu is set"
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a package for another PyTorch raises: ImportError, OSError, RuntimeError
            said = str(error).strip().splitlines() or ["no message"]
            return f"{type(error).__name__}: {said[0]}"
    return None


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
