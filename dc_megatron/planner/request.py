"""What a user asks ``tools/plan.py`` for, as a job; names and numbers that cannot be are refused here."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from dc_megatron.config import (
    LANGUAGE_PRESETS,
    TEMPLATES,
    VISION_PRESETS,
    ConnectorConfig,
    language_preset,
    language_shape,
    one_of,
    tiling_of_flags,
    vision_shape,
)
from dc_megatron.errors import UserError
from dc_megatron.planner.assumed_data import CAPTIONS, INSTRUCTIONS
from dc_megatron.planner.job import GPUS, PRECISIONS, Gpu, Job
from dc_megatron.planner.launch import Launch, launch_of
from dc_megatron.planner.parameter_count import Model
from dc_megatron.planner.search import Plan

# Parts that learn, and samples a step: the original's recipes.
STAGES = {
    "pretrain": (("connector",), 256),
    "finetune": (("connector", "llm"), 128),
    "lora": (("connector",), 128),
}


@dataclass(frozen=True)
class Request:
    """The tool's options. gpu_memory: GB. seq_length, samples_per_step, samples: 0 for the usual ones."""

    model: str
    vision: str
    gpus: int
    stage: str = "finetune"
    connector: str = "dci"
    gpu: str = "h100"
    gpu_memory: float = 0
    gpus_per_node: int = 8
    samples_per_step: int = 0
    samples: int = 0
    epochs: float = 1.0
    model_max_length: int = 2048
    seq_length: int = 0
    packing: str = "best-fit"
    image_aspect_ratio: str = "pad"
    precision: tuple[str, ...] = ()
    lora_r: int = 128


def gpu_of(name: str, memory: float) -> Gpu:
    """A GPU by name, with ``memory`` GB in place of its own where that is above 0."""
    gpu = GPUS[one_of(name, GPUS, "--gpu")]
    return replace(gpu, memory=round(memory * 1e9)) if memory > 0 else gpu


def job_of(request: Request) -> Job:
    """UserError: unknown names, sizes that contradict each other."""
    trainable, usual = STAGES[one_of(request.stage, STAGES, "--stage")]
    language, vision = language_shape(request.model, "--model"), vision_shape(request.vision, "--vision")
    connector = ConnectorConfig(request.connector)
    tiling = tiling_of_flags(vision, connector, request.image_aspect_ratio)
    _refuse_sizes(request, tiling.most_tokens)
    gpu = gpu_of(request.gpu, request.gpu_memory)
    mix = INSTRUCTIONS if request.stage != "pretrain" else CAPTIONS
    if request.samples:
        mix = replace(mix, name="your data, taken to be like " + mix.name, samples=request.samples)
    packed = request.packing != "none"
    samples = request.samples_per_step or usual
    if samples % request.gpus:
        raise UserError(
            f"--samples-per-step {samples}: the recipes give every process as many; use a multiple of --gpus"
            f" {request.gpus}, such as {-(-samples // request.gpus) * request.gpus}"
        )
    lengths = (4096, 8192) if packed else (request.model_max_length,)
    lengths = tuple(length for length in lengths if length >= request.model_max_length) or (request.model_max_length,)
    return Job(
        model=Model(
            language,
            vision,
            connector,
            trainable,
            newline=tiling.has_newline,
            lora_rank=request.lora_r if request.stage == "lora" else 0,
        ),
        tiling=tiling,
        mix=mix,
        gpus=request.gpus,
        gpu=gpu,
        per_node=request.gpus_per_node,
        samples_per_step=samples,
        epochs=request.epochs,
        max_length=request.model_max_length,
        row_lengths=(request.seq_length,) if request.seq_length else lengths,
        packed=packed,
        precisions=_precisions(request, gpu),
    )


def _precisions(request: Request, gpu: Gpu) -> tuple[str, ...]:
    usual = ("bf16", "bf16-lean") if gpu.bf16 else ("fp16",)
    for name in request.precision:
        one_of(name, PRECISIONS, "--precision")
        if (name.startswith("bf16") and not gpu.bf16) or (name.startswith("fp8") and not gpu.fp8):
            raise UserError(f"--precision {name}: a {gpu.name} has no {name[:4]}; use {' or '.join(usual)}")
    return request.precision or usual


def _refuse_sizes(request: Request, picture: int) -> None:
    for name in ("gpus", "gpus_per_node", "model_max_length", "lora_r", "epochs"):
        if getattr(request, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(request, name)}: must be above 0")
    for name in ("gpu_memory", "samples_per_step", "samples", "seq_length"):
        if getattr(request, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(request, name)}: must not be negative")
    if request.gpus > request.gpus_per_node and request.gpus % request.gpus_per_node:
        raise UserError(
            f"--gpus {request.gpus}: no multiple of the {request.gpus_per_node} GPUs of a machine; say --gpus-per-node"
        )
    one_of(request.packing, ("best-fit", "none"), "--packing")
    if request.seq_length and request.seq_length < request.model_max_length:
        raise UserError(f"--seq-length {request.seq_length}: below --model-max-length {request.model_max_length}")
    if picture > request.model_max_length:
        raise UserError(
            f"--model-max-length {request.model_max_length}: a picture takes up to {picture} positions; raise it"
        )


def launch_of_request(request: Request, job: Job, plan: Plan) -> Launch:
    """The command; a preset's folder is where README's recipes have it."""
    preset = language_preset(request.model)
    template = preset.template if preset and preset.template in TEMPLATES else ""
    return launch_of(
        job,
        plan,
        request.stage,
        _folder(request.model, preset),
        _folder(request.vision, _vision_preset(job)),
        template,
    )


def _vision_preset(job: Job):
    return VISION_PRESETS.get(job.model.vision.path.removeprefix("preset "))


def _folder(name: str, preset) -> str:
    if os.path.isdir(name) or preset is None:
        return name
    return f"checkpoints/{preset.source.split('/')[-1]}"


def presets() -> str:
    """Names for --model and --vision, for help pages."""
    return f"{', '.join(LANGUAGE_PRESETS)}; towers {', '.join(VISION_PRESETS)}"
