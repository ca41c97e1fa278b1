"""Imported by the fork server alone: everything that ranks need, megatron under the patches that they will have."""

from __future__ import annotations

import importlib
import os
import warnings

os.environ |= {"DC_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    importlib.import_module("dc_megatron.runtime.patches").apply()
    for name in ("transformers", "megatron.training", "dc_megatron.training.engine", "tests.helpers.forked_runs"):
        importlib.import_module(name)
