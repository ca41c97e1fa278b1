"""The tiny models and pictures that the runs of this folder train on."""

from __future__ import annotations

import pytest

from tests.helpers.workspace import make_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> dict[str, str]:
    return make_workspace(tmp_path_factory.mktemp("workspace"))
