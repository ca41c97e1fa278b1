"""Fixtures of all tests: the shared multi-rank workers, and what --all switches on."""

from __future__ import annotations

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the long tests as well")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all"):
        return
    skip = pytest.mark.skip(reason="long: runs with tests/run.sh --all")
    for item in items:
        if "long" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def workers():
    """A pool of up to four ranks on CPU with Gloo; see tests/helpers/worker_pool.py."""
    from tests.helpers.worker_pool import WorkerPool

    pool = WorkerPool()
    yield pool
    pool.stop()
