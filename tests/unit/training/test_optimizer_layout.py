"""A run that would not find the optimizer's state in the form in which it reads it is refused."""

from __future__ import annotations

import pytest

from dc_megatron.errors import UserError
from dc_megatron.training import optimizer_layout
from dc_megatron.training.resume import Start

PLAIN, SHARDED = {}, {"distrib_optim_sharding_type": "fully_reshardable"}


def check(monkeypatch, about: dict | None, distributed: bool, resumes: bool = True) -> None:
    class Tree:
        def __init__(self, folder: str):
            self.folder = folder

        def common_state(self) -> dict:
            return {} if about is None else {"content_metadata": about}

    monkeypatch.setattr(optimizer_layout, "TorchDistTree", Tree)
    start = Start([], [], loads=True, resumes=resumes, folder="run", iteration=4)
    optimizer_layout.refuse_other_layout(start, distributed)


@pytest.mark.parametrize(
    ("about", "distributed", "advice"), [(PLAIN, True, "go on without the two"), (SHARDED, False, "add one of them")]
)
def test_another_layout(monkeypatch, about, distributed, advice):
    with pytest.raises(UserError, match=f"run/iter_0000004: .*{advice}, or take the weights alone: --load run"):
        check(monkeypatch, about, distributed)


def test_the_same_layout_weights_alone_and_a_tree_that_does_not_say(monkeypatch):
    check(monkeypatch, SHARDED, True)
    check(monkeypatch, PLAIN, False)
    check(monkeypatch, PLAIN, True, resumes=False)
    check(monkeypatch, None, True)
