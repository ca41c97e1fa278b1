"""Megatron's own options, known without importing Megatron: from a frozen list that a test compares with the engine.

The list is written by ``python -m tests.helpers.freeze_megatron_flags``. One line an option: its spellings, how many
values it takes (0, 1, 3, ``+``, ``*``), the type of a value, and the values allowed, if they are listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dc_megatron.config import nearest
from dc_megatron.errors import UserError

FROZEN_LIST = Path(__file__).with_name("megatron_flags.txt")


@dataclass(frozen=True)
class EngineFlag:
    """One option of Megatron's parser."""

    spellings: tuple[str, ...]
    arity: str
    type: str
    choices: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.spellings[0]


@cache
def engine_flags() -> dict[str, EngineFlag]:
    """Spelling in snake_case without dashes -> option, for every spelling of every option."""
    table = {}
    for line in FROZEN_LIST.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        spellings, arity, type_name, choices = (part.strip() for part in line.split("|"))
        flag = EngineFlag(tuple(spellings.split()), arity, type_name, tuple(choices.split()))
        for spelling in flag.spellings:
            table[spelling[2:].replace("-", "_")] = flag
    return table


def spelling_of(flag: EngineFlag, key: str) -> str:
    """The way Megatron's parser spells ``key`` (snake_case, without dashes)."""
    return next(s for s in flag.spellings if s[2:].replace("-", "_") == key)


_DATA = "the data of this program comes from --data_path"
_TOKENIZER = "the tokenizer comes from the folder of --model_name_or_path"
_STEPS = "this program counts in optimizer steps: use --max_steps or --num_train_epochs"
_BATCH = "the batch size is fixed over a run: use --per_device_train_batch_size or --global-batch-size"
_EVALUATION = "--eval_data_path is evaluated as one set, in batches of the training's size; --eval-iters shortens it"
_ARCHITECTURE = "the language model is the dense decoder that --model_name_or_path describes"
_CONTEXT = "keys and values are gathered over the ranks of --context-parallel-size, which is all that is to be said"

# Options that Megatron would read and this program could not honour: (option, reason). Given, they are refused,
# because running on as if they had not been given would be worse.
REFUSED = {
    **dict.fromkeys(
        ("train-data-path", "valid-data-path", "test-data-path", "data-args-path", "per-split-data-args-path"), _DATA
    ),
    **dict.fromkeys(("mock-data", "split", "data-cache-path", "dataloader-type", "sft", "fim-data"), _DATA),
    **dict.fromkeys(
        ("tokenizer-type", "tokenizer-model", "vocab-file", "merge-file", "tokenizer-metadata"), _TOKENIZER
    ),
    **dict.fromkeys(("train-samples", "lr-decay-samples", "lr-warmup-samples", "lr-wsd-decay-samples"), _STEPS),
    **dict.fromkeys(("rampup-batch-size", "step-batch-size-schedule", "batch-size"), _BATCH),
    **dict.fromkeys(("full-validation", "multiple-validation-sets", "validation-set-names"), _EVALUATION),
    **dict.fromkeys(("eval-global-batch-size", "eval-micro-batch-size"), _EVALUATION),
    **dict.fromkeys(("num-experts", "multi-latent-attention", "spec", "hybrid-layer-pattern"), _ARCHITECTURE),
    **dict.fromkeys(("heterogeneous-layers-config-path", "encoder-num-layers", "mtp-num-layers"), _ARCHITECTURE),
    "use-torch-fsdp2": "use --use-megatron-fsdp, which divides weights, gradients and optimizer as well (ZeRO-3)",
    **dict.fromkeys(("cp-comm-type", "hierarchical-context-parallel-sizes", "hybrid-context-parallel"), _CONTEXT),
    "expert-model-parallel-size": _ARCHITECTURE,
    "save-retain-interval": "not available yet; every checkpoint is kept",
    "ckpt-format": "checkpoints are torch_dist trees, which the tools read at any layout",
    **dict.fromkeys(
        ("non-persistent-save-interval", "non-persistent-ckpt-type"), "not available yet; use --save_steps"
    ),
    "inprocess-restart": "not available; MAX_RESTARTS=3 in a recipe's environment lets torchrun start again",
    "fp8-param-gather": "not available yet: checkpoints hold bf16 weights, which are cast to FP8 and kept so",
    "fp4-format": "not available yet; train in bf16",
    "yaml-cfg": "flags are the configuration of this program; metrics and resolved_config.json record them",
    "encoder-seq-length": "use --seq-length",
    "decoder-seq-length": "use --seq-length",
    "calculate-per-token-loss": "use --loss-reduction token",
}
# ... unless the value asks for what happens anyway.
NEUTRAL = {
    "ckpt-format": "torch_dist",
    "expert-model-parallel-size": "1",
}


def check_engine_flag(flag: EngineFlag, spelling: str, values: list[str]) -> None:
    """UserError for an option that is refused here, or for a value that Megatron's parser would not take."""
    reason = REFUSED.get(flag.name[2:])
    if reason and (len(values) != 1 or values[0] != NEUTRAL.get(flag.name[2:])):
        raise UserError(f"{' '.join([spelling, *values])}: {reason}")
    for value in values:
        if flag.choices and value not in flag.choices:
            raise UserError(
                f"{spelling} {value}: unknown{nearest(value, flag.choices)}; one of: {', '.join(flag.choices)}"
            )
        if flag.type in ("int", "float"):
            try:
                {"int": int, "float": float}[flag.type](value)
            except ValueError:
                what = "whole number" if flag.type == "int" else "number"
                raise UserError(f"{spelling} {value}: not a {what}") from None
