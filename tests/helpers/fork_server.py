"""Ranks are forked from one process that has imported the engine, which takes some 15 s, once."""

from __future__ import annotations

import multiprocessing


def fork_context():
    """multiprocessing's context whose processes have all modules; one server serves the whole test process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.preloaded"])
    return context
