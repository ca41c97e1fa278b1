"""What a benchmark of training steps trains: a file of ``benchmarks/workloads/``, read and checked."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields

from dc_megatron.benchmark.llava_lengths import STAGES
from dc_megatron.benchmark.machine import ROOT
from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig, nearest
from dc_megatron.errors import UserError

FOLDER = os.path.join(ROOT, "benchmarks", "workloads")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Workload:
    """Shapes, data, number formats and sizes; everything that two machines have to share.

    language, vision: contents of ``config.json``, with the source they were typed from in ``source``. trainable: parts
    that learn. stage: whose lengths the samples have (see llava_lengths). rows: packed rows of ``seq_length`` in a
    step; the padded baselines get the samples of those rows in micro-batches of ``padded_batch``. supervised_share: of
    a sample's text. steps: measured in each of ``rounds``, after ``warmup``; of padded baselines ``baseline_steps``.
    threads: of all processes together, on a CPU. coexist: the variants live side by side and take turns; without, each
    has the machine's memory for itself. baselines: variants that are measured beside ``ours`` where none is named.
    optimizer: "fp32" (gradients, master weights and moments) or "bf16" (gradients and moments in bf16 beside fp32
    master weights), where Transformer Engine is. learning_rate: small, so that losses stay comparable.
    """

    name: str
    source: str
    language: dict
    vision: dict
    connector: str
    trainable: tuple[str, ...]
    stage: int
    seq_length: int
    rows: int
    padded_batch: int
    supervised_share: float
    dtype: str
    steps: int
    rounds: int
    warmup: int
    threads: int
    coexist: bool
    baselines: tuple[str, ...]
    optimizer: str = "fp32"
    baseline_steps: int = 1
    learning_rate: float = 1e-5
    seed: int = 1

    @property
    def language_config(self) -> LanguageConfig:
        return LanguageConfig.from_config(self.language, f"workload {self.name}")

    @property
    def vision_config(self) -> VisionConfig:
        return VisionConfig.from_config(self.vision, f"workload {self.name}")

    @property
    def connector_config(self) -> ConnectorConfig:
        return ConnectorConfig(self.connector)


def workload_names() -> list[str]:
    """The workloads that have a file."""
    return sorted(name.removesuffix(".json") for name in os.listdir(FOLDER) if name.endswith(".json"))


def read_workload(name: str, overrides: dict | None = None) -> Workload:
    """The workload of file ``benchmarks/workloads/NAME.json``; ``overrides`` replaces values of it
    (``language.num_hidden_layers``: one inside).

    UserError: no such workload, keys missing or unknown, sizes below 1.
    """
    path = os.path.join(FOLDER, f"{name}.json")
    if not os.path.exists(path):
        names = workload_names()
        raise UserError(f"workload {name}: there is none{nearest(name, names)}; one of: {', '.join(names)}")
    with open(path, encoding="utf-8") as file:
        try:
            values = json.load(file)
        except ValueError as error:
            raise UserError(f"{path}: no JSON: {error}") from None
    for key, value in (overrides or {}).items():
        part, dot, inner = key.partition(".")
        if dot and part in values and not isinstance(values[part], dict):
            raise UserError(f"--set {key}: {part} has no values inside; language and vision have")
        values[part] = {**values.get(part, {}), inner: value} if dot else value
    values["name"] = name
    known = {field.name: field for field in fields(Workload)}
    for key in values:
        if key not in known:
            raise UserError(f"{path}: unknown key '{key}'{nearest(key, list(known))}")
    try:
        workload = Workload(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except TypeError as error:
        raise UserError(f"{path}: {error}") from None
    _check(workload, path)
    return workload


def _check(workload: Workload, path: str) -> None:
    sizes = ("seq_length", "rows", "padded_batch", "steps", "rounds", "threads", "baseline_steps")
    for key in sizes:
        if not isinstance(getattr(workload, key), int) or getattr(workload, key) < 1:
            raise UserError(f"{path}: {key} is {getattr(workload, key)!r}; it must be a whole number above 0")
    if workload.stage not in STAGES:
        raise UserError(f"{path}: stage {workload.stage!r}; use one of {', '.join(map(str, STAGES))}")
    if workload.dtype not in DTYPES:
        raise UserError(
            f"{path}: dtype '{workload.dtype}'{nearest(workload.dtype, DTYPES)}; one of {', '.join(DTYPES)}"
        )
    if workload.optimizer not in ("fp32", "bf16"):
        raise UserError(f"{path}: optimizer '{workload.optimizer}'; use fp32 or bf16")
