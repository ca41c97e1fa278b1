"""The optimizer of stage 2 is spread over the data-parallel ranks unless the user says otherwise."""

from __future__ import annotations

import pytest

from dc_megatron.training.arguments import sharding_argv
from dc_megatron.training.argv import translate

SHARDED, GRADIENTS, PARAMETERS = "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"


@pytest.mark.parametrize(
    ("flags", "ranks", "cuda", "expected"),
    [
        ([], 1, False, [SHARDED]),
        ([], 4, False, [SHARDED]),
        ([], 4, True, [SHARDED, GRADIENTS]),
        (["--log-images", "0"], 4, True, [SHARDED, GRADIENTS, PARAMETERS]),
        (["--trainable", "connector"], 4, True, []),
        (["--use-distributed-optimizer", "False"], 4, True, []),
        (["--use-distributed-optimizer"], 4, False, []),
        (["--overlap-grad-reduce", "False", "--log-images", "0"], 4, True, [SHARDED]),
        (["--overlap-grad-reduce", "False", "--overlap-grad-reduce"], 2, True, [SHARDED]),
    ],
)
def test_what_is_added(flags, ranks, cuda, expected):
    assert sharding_argv(translate(flags), ranks, cuda) == expected
