"""What this machine has, which backends a run would use on it, and why."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable

from dc_megatron.runtime import installed
from dc_megatron.runtime.kernels import Machine, chosen_kernels

_DISTRIBUTIONS = (
    "torch",
    "megatron-core",
    "transformers",
    "safetensors",
    "sentencepiece",
    "datasets",
    "numpy",
    "pillow",
)


def examine() -> dict:
    """The report as plain values: ``machine``, ``versions``, ``optional``, ``backends``. Imports torch (seconds).

    ``optional`` maps a package to {"version", "found", "error"}; ``error`` is None where a run here can use it.
    For Transformer Engine and apex, training and inference ask the same functions of ``installed``.
    ``backends`` maps a part to {"choice", "why"}.
    """
    from dc_megatron.runtime.device import compute_capability

    machine = _machine()
    optional = {
        "transformer-engine": _optional(installed.has_transformer_engine(), installed.transformer_engine_error),
        "flash-attn": _optional(installed.has_flash_attention(), lambda: installed.import_error("flash_attn")),
        "apex": _optional(installed.has_apex(), installed.apex_error),
        "dali": _optional(installed.has_dali(), lambda: installed.import_error("nvidia.dali")),
    }
    optional["transformer-engine"]["version"] = installed.version_of("transformer-engine", "transformer_engine")
    optional["flash-attn"]["version"] = installed.version_of("flash-attn")
    optional["apex"]["version"] = installed.version_of("apex")
    optional["dali"]["version"] = installed.dali_version()
    return {
        "machine": machine,
        "versions": {name: installed.version_of(name) for name in _DISTRIBUTIONS},
        "optional": optional,
        "backends": _backends(machine["cuda"], optional, compute_capability()),
    }


def _machine() -> dict:
    import torch

    from dc_megatron.runtime.device import has_cuda

    return {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "cuda": has_cuda(),
        "cuda_of_torch": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if has_cuda() else [],
        "cuda_compiler": shutil.which("nvcc"),
    }


def _optional(found: bool, error: Callable[[], str | None]) -> dict:
    return {"version": None, "found": found, "error": error() if found else "not installed"}


def _usable(package: dict) -> bool:
    return package["found"] and package["error"] is None


def _backends(cuda: bool, optional: dict, capability: tuple[int, int] | None = None) -> dict:
    engine, dali = optional["transformer-engine"], optional["dali"]
    transformer_engine = cuda and _usable(engine)
    without = "there is no GPU" if not cuda else f"Transformer Engine: {engine['error']}"
    backends = {
        "device": ("cuda", "torch sees a GPU") if cuda else ("cpu", _why_no_cuda()),
        "communication": ("nccl", "GPUs") if cuda else ("gloo", "tensors are on the CPU"),
        "layers": ("transformer_engine", "installed, and there is a GPU") if transformer_engine else ("local", without),
        "images": _images(cuda, dali),
    }
    found = {part: {"choice": choice, "why": why} for part, (choice, why) in backends.items()}
    flash = optional.get("flash-attn", {"error": "not installed"})
    facts = Machine(cuda, capability, engine["error"], optional["apex"]["error"], flash["error"])
    kernels = {
        part: {"choice": c.choice, "why": c.why or "the fastest here"} for part, c in chosen_kernels(facts).items()
    }
    images = found.pop("images")
    return {**found, **kernels, "images": images}


def _why_no_cuda() -> str:
    if os.environ.get("DC_DEVICE") == "cpu":
        return "DC_DEVICE=cpu is set"
    return "torch sees no GPU" + ("" if shutil.which("nvidia-smi") else ", and there is no nvidia-smi")


def _images(cuda: bool, dali: dict) -> tuple[str, str]:
    if not _usable(dali):
        return "pil", f"DALI: {dali['error']}"
    return "dali on the CPU", "installed; training decodes on the CPU" + ("" if cuda else ", and there is no GPU")


def as_text(report: dict) -> str:
    """The report for a terminal."""
    machine = report["machine"]
    gpus = ", ".join(machine["gpus"]) or "none"
    lines = [
        f"Python {machine['python']}, {machine['cores']} cores, GPUs: {gpus}, torch built for CUDA"
        f" {machine['cuda_of_torch']}, CUDA compiler: {machine['cuda_compiler'] or 'none'}",
        "",
        "Installed",
        *(
            f"  {name:20} {version or 'MISSING: run bash tools/setup_env.sh'}"
            for name, version in report["versions"].items()
        ),
        "",
        "Optional",
    ]
    for name, package in report["optional"].items():
        state = "usable" if package["error"] is None else package["error"]
        lines.append(f"  {name:20} {package['version'] or '-':14} {state}")
    lines += ["", "A run here uses"]
    lines += [f"  {part:20} {backend['choice']:40} ({backend['why']})" for part, backend in report["backends"].items()]
    if report.get("engine_flags"):
        lines += ["", "Flags given to Megatron's engine", "  " + " ".join(report["engine_flags"])]
    return "\n".join(lines)
