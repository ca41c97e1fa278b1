"""The planner's bytes of a decoder layer on the CPU are those that autograd keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dc_megatron.config import ConnectorConfig, vision_shape
from dc_megatron.planner.memory import Numbers, Run, stage_memory
from tests.helpers.language_shapes import LLAMA

LENGTH = 64
WORKER = "tests.multirank.saved_worker:bytes_of_a_layer"


def planned(layers: int, learns: bool, bf16: bool) -> float:
    run = Run(
        language=replace(LLAMA, num_hidden_layers=layers),
        vision=vision_shape("clip-vit-large-patch14-336"),
        connector=ConnectorConfig("dci"),
        trainable=("connector", "llm") if learns else ("connector",),
        numbers=Numbers(2 if bf16 else 4),
        positions=LENGTH,
        images=1,
        stages=((layers,),),
        local_layers=True,
    )
    return stage_memory(run, 0).activations


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("learns", [True, False])
def test_what_autograd_keeps(workers, learns, bf16):
    (kept,) = workers.run(WORKER, 1, LLAMA, LENGTH, learns, bf16)
    assert kept == planned(3, learns, bf16) - planned(2, learns, bf16)
