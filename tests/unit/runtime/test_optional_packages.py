"""Transformer Engine and apex that are installed and cannot be used: on a CPU, and built for another PyTorch.

Stand-ins on sys.path, each in a Python of its own, because megatron looks for the packages when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FUSED = "class FusedAdam: pass\nclass FusedSGD: pass\n"
KERNELS = (
    "def multi_tensor_applier(*a): raise RuntimeError('CUDA kernel')\nmulti_tensor_l2norm = multi_tensor_scale = 0\n"
)
SOURCES = {
    "transformer_engine/__init__.py": "__version__ = '2.20.2'\n",
    "transformer_engine/pytorch/__init__.py": "",
    "transformer_engine/pytorch/optimizers.py": FUSED + KERNELS,
    "transformer_engine_torch.py": "",
    "transformer_engine-2.20.2.dist-info/METADATA": "Name: transformer-engine\nVersion: 2.20.2\n",
    "apex/__init__.py": "",
    "apex/optimizers.py": FUSED,
    "apex/multi_tensor_apply.py": KERNELS,
    "amp_C.py": "multi_tensor_l2norm = multi_tensor_scale = 0\n",
    "fused_weight_gradient_mlp_cuda.py": "",
}
BROKEN = {
    "transformer_engine/pytorch/__init__.py": "raise OSError('libtransformer_engine.so: undefined symbol: _ZN2')\n"
}


@pytest.fixture
def python(tmp_path):
    """Runs code in a fresh Python that finds the stand-ins, and returns the JSON that it prints."""

    def run(code: str, broken: bool = False) -> dict:
        for path, source in (SOURCES | (BROKEN if broken else {})).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(source)
        environment = os.environ | {"DC_DEVICE": "cpu", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


# As if there were a GPU: only the question is answered so, and nothing that needs one is called.
WITH_CUDA = "from dc_megatron.runtime import device, installed\ndevice.has_cuda = lambda: True\n"

ON_THE_CPU = """
import json, sys
from dc_megatron.runtime import installed, patches
found = [installed.has_transformer_engine(), installed.has_apex()]
usable = [installed.usable_transformer_engine(), installed.usable_apex()]
patches.apply(training=True)
import torch
import transformers, accelerate, peft
import accelerate.utils, peft.import_utils
import megatron.core.optimizer as optimizer
import megatron.core.optimizer.clip_grads as clip_grads
import megatron.training.utils.common_utils as common_utils
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import layers
from megatron.core.utils import get_te_version, is_te_min_version
norm = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, torch.zeros(1), [[torch.tensor([3.0, 4.0])]], False)
report = {
    "found": found,
    "usable": usable,
    "adam": optimizer.Adam.__module__,
    "have": [HAVE_TE, gpt_layer_specs.HAVE_APEX, layers._grad_accum_fusion_available],
    "version": str(get_te_version()),
    "min": is_te_min_version("0.1"),
    "norm": float(norm[0]),
    "others": [
        accelerate.utils.is_transformer_engine_available(),
        peft.import_utils.is_te_available(),
        peft.import_utils.is_te_pytorch_available(),
        transformers.utils.is_apex_available(),
    ],
    "loaded": [name for name in sys.modules if name.startswith(("transformer_engine", "apex")) and sys.modules[name]],
}
patches.undo()
import transformer_engine.pytorch.optimizers, apex.optimizers, amp_C
report["after undo"] = transformer_engine.__version__
print(json.dumps(report))
"""


def test_without_cuda_megatron_and_others_do_not_find_them(python):
    got = python(ON_THE_CPU)
    assert got["found"] == [True, True]
    assert got["usable"] == [False, False]
    assert got["adam"] == "dc_megatron.runtime.adam"
    assert got["have"] == [False, False, False]
    assert (got["version"], got["min"]) == ("0.0.0", False)
    assert got["norm"] == 5
    assert not any(got["others"])
    assert got["loaded"] == []
    assert got["after undo"] == "2.20.2"


IMPORTED_BEFORE = """
import json, sys
import transformer_engine.pytorch.optimizers as before
from dc_megatron.runtime import patches
patches.apply()
try:
    import transformer_engine.pytorch.optimizers
    found = True
except ModuleNotFoundError:
    found = False
patches.undo()
print(json.dumps([found, sys.modules["transformer_engine.pytorch.optimizers"] is before]))
"""


def test_what_was_imported_before_is_hidden_and_comes_back(python):
    assert python(IMPORTED_BEFORE) == [False, True]


BESIDE_A_GPU = (
    WITH_CUDA
    + """
import json
from dc_megatron.reports import doctor
from dc_megatron.runtime import patches
optional = {
    "transformer-engine": doctor._optional(installed.has_transformer_engine(), installed.transformer_engine_error),
    "apex": doctor._optional(installed.has_apex(), installed.apex_error),
    "dali": {"version": None, "found": False, "error": "not installed"},
}
backends = doctor._backends(True, optional)
condition = patches.CONDITIONS["no_te_and_no_apex"]()
patches._hide_unusable()
from importlib.util import find_spec
print(json.dumps({
    "usable": [installed.usable_transformer_engine(), installed.usable_apex()],
    "error": installed.transformer_engine_error(),
    "condition": condition,
    "backends": {part: backends[part]["choice"] for part in ("layers", "optimizer")},
    "why": backends["layers"]["why"],
    "visible": [find_spec("transformer_engine") is not None, find_spec("apex") is not None],
}))
"""
)


def test_beside_a_gpu_they_are_used(python):
    got = python(BESIDE_A_GPU)
    assert got["usable"] == got["visible"] == [True, True]
    assert got["error"] is None
    assert got["condition"] is False
    assert got["backends"] == {"layers": "transformer_engine", "optimizer": "Transformer Engine FusedAdam"}


def test_one_that_does_not_import_is_unusable_for_doctor_and_training_alike(python):
    got = python(BESIDE_A_GPU, broken=True)
    assert got["usable"] == got["visible"] == [False, True]
    assert got["error"] == "OSError: libtransformer_engine.so: undefined symbol: _ZN2"
    assert got["error"] in got["why"]
    assert got["backends"] == {"layers": "local", "optimizer": "apex FusedAdam"}
    assert got["condition"] is False, "apex's FusedAdam is there"
