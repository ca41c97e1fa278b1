"""Messages of the libraries that are expected here and say nothing to the user; each row says why.

Everything else that a library has to say comes through. What is missing on a machine, tools/doctor.py tells.
"""

from __future__ import annotations

import logging
import re
import warnings

# (start of the warning's text, why it is left out)
_WARNINGS = (
    ("Transformer Engine and Apex are not installed", "known; doctor says so once"),
    ("Apex is not installed", "known; doctor says so once"),
    ("Only transformer-engine>=1.7.0 supports MoE", "there are no experts here"),
    ("full scope is deprecated", "megatron-core warns about its own default"),
    ("`torch.jit.script_method` is deprecated", "megatron-core's code, not the user's"),
    ("The following imports from `dynamic_context.py`", "megatron-core's code, not the user's"),
    ("torch.distributed is disabled, unavailable or uninitialized", "megatron-core reads checkpoint metadata so"),
    ("The argument order of load has been changed", "megatron-core's call of torch"),
    ("Please use DTensor instead", "megatron-core's checkpoints are made of ShardedTensor"),
    ("MimoModelConfig is experimental", "megatron-core imports it; nothing here is made of it"),
    ("\n        It is recommended to use a ModelConfig", "a model provider is what joins tower and language model"),
)

# (logger, part of the message, why it is left out)
_LOG_RECORDS = (
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED", "its successor has no output_processor"),
    ("megatron.core.tensor_parallel.random", "CPU RNG state changed", "without CUDA there is one generator only"),
    (
        "megatron.core.dist_checkpointing.strategies.torch",
        "async save is deprecated",
        "its successor is an extra package",
    ),
    ("torch.utils.cpp_extension", "No CUDA runtime is found", "a compiler without a GPU is no fault"),
)


def leave_out_expected() -> None:
    """Filter the rows above. Call it before megatron is imported."""
    for start, _ in _WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(start))
    for name, part, _ in _LOG_RECORDS:
        logging.getLogger(name).addFilter(_Without(part))


class _Without(logging.Filter):
    """Lets pass what does not contain ``part``."""

    def __init__(self, part: str):
        super().__init__()
        self.part = part

    def filter(self, record: logging.LogRecord) -> bool:
        return self.part not in record.getMessage()
