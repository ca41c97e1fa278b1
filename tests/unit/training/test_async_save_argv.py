"""--async-save brings along what Megatron wants with it."""

from __future__ import annotations

import pytest

from dc_megatron.errors import UserError
from dc_megatron.training.arguments import async_save_argv


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ([], []),
        (["--tensor-model-parallel-size", "2"], []),
        (["--async-save"], ["--use-persistent-ckpt-worker", "--async-strategy", "mcore"]),
        (
            ["--async-strategy", "mcore", "--async-save"],
            ["--use-persistent-ckpt-worker", "--async-strategy", "mcore"],
        ),
    ],
)
def test_what_is_added(typed, expected):
    assert async_save_argv(typed, cuda=False) == expected


@pytest.mark.parametrize(("cuda", "lacks"), [(False, "a GPU"), (True, "nvidia-resiliency-ext, which is not installed")])
def test_a_strategy_that_cannot_work_here_is_refused(cuda, lacks):
    with pytest.raises(UserError, match=f"--async-strategy nvrx: needs .*{lacks}; leave it out"):
        async_save_argv(["--async-save", "--async-strategy", "nvrx"], cuda)
