"""Nodes that found other samples are refused before the first step, on every rank alike."""

from __future__ import annotations


def test_different_plans_are_refused_on_every_rank(workers):
    target = "tests.multirank.plan_worker:compare"
    assert workers.run(target, 2, ["same", "same"]) == ["", ""]
    first, second = workers.run(target, 2, ["these", "those"])
    assert first == second
    assert "ranks 1 found other usable samples than rank 0" in first
