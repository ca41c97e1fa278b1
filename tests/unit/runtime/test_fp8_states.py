"""FP8 scales of a checkpoint on their way into Transformer Engine: read by name, and nothing executed."""

from __future__ import annotations

import os
import pickle
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dc_megatron.runtime import installed, patches
from dc_megatron.runtime.fp8_states import TE_LAYERS, reading_by_name
from tests.helpers.fp8_states import delayed_state


def layers(**more) -> ModuleType:
    """Transformer Engine's module, as far as it matters here: it has ``import pickle``."""
    module = ModuleType(TE_LAYERS)
    vars(module).update(pickle=pickle, **more)
    return module


def refusing(data: bytes, context: str) -> bool:
    """As releases from 2.20 on answer while no variable is set."""
    raise RuntimeError(f"Refusing to load pickled Transformer Engine extra state for {context}.")


class Payload:
    def __init__(self, marker):
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_state_comes_back(monkeypatch):
    data = delayed_state(monkeypatch)
    state = reading_by_name(layers())["pickle"].loads(data)
    assert state["recipe"].amax_history_len == 4
    assert state["scale_fwd"].tolist() == [128.0, 1664.0, 1.0]
    assert state["extra_fp8_variables"]["num_gemms"] == 1


def test_what_was_pickled_is_not_executed(tmp_path):
    marker = tmp_path / "executed"
    loads = reading_by_name(layers())["pickle"].loads
    with pytest.raises(pickle.UnpicklingError, match=r"FP8 state of the checkpoint: .*system"):
        loads(pickle.dumps({"recipe": Payload(marker)}))
    assert not marker.exists()


def test_pickles_are_written_as_before():
    assert reading_by_name(layers())["pickle"].dumps is pickle.dumps


def test_no_variable_is_needed():
    ask = reading_by_name(layers(should_load_extra_state_pickle=refusing))["should_load_extra_state_pickle"]
    assert ask(b"a state", "TERowParallelLinear")


@pytest.mark.parametrize("answer", [True, False])
def test_an_answer_that_is_no_refusal_holds(answer):
    module = layers(should_load_extra_state_pickle=lambda data, context: answer)
    assert reading_by_name(module)["should_load_extra_state_pickle"](b"", "") is answer


def test_older_releases_do_not_ask():
    assert list(reading_by_name(layers())) == ["pickle"]


def test_the_patches_are_put_in_once_and_taken_out_again(monkeypatch):
    module = layers(should_load_extra_state_pickle=refusing)
    monkeypatch.setitem(sys.modules, TE_LAYERS, module)
    monkeypatch.setattr(patches, "_originals", [])
    monkeypatch.setattr(installed, "usable_transformer_engine", lambda: True)
    monkeypatch.setattr(patches.importlib, "import_module", {TE_LAYERS: module}.__getitem__)
    for _ in range(2):
        patches._read_fp8_states_by_name()
    assert isinstance(module.pickle, SimpleNamespace)
    assert len(patches._originals) == 2
    for holder, name, original in patches._originals:
        setattr(holder, name, original)
    assert module.pickle is pickle
    assert module.should_load_extra_state_pickle is refusing


def test_without_transformer_engine_nothing_is_imported(monkeypatch):
    monkeypatch.setattr(installed, "usable_transformer_engine", lambda: False)
    monkeypatch.delitem(sys.modules, TE_LAYERS, raising=False)
    patches._read_fp8_states_by_name()
    assert TE_LAYERS not in sys.modules


def test_tensors_in_it_are_data(monkeypatch):
    """Each tensor is a pickle in the pickle, which torch reads: by torch's list of names."""
    state = reading_by_name(layers())["pickle"].loads(delayed_state(monkeypatch))
    assert torch.equal(state["amax_history_bwd"], torch.arange(8.0).view(4, 2))
