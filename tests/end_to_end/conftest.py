"""The tiny models and pictures that the runs of this folder train on."""

from __future__ import annotations

import pytest

from tests.helpers.forked_runs import ForkedRuns
from tests.helpers.workspace import make_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> dict[str, str]:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def forked() -> ForkedRuns:
    """Runs whose ranks are forked from a process that has imported everything: for what is not about launching."""
    return ForkedRuns()
