"""Where Transformer Engine is found, and the conditions of the patches that hang on it and on a GPU."""

from __future__ import annotations

import pytest

from dc_megatron.runtime import device, installed, patches

TOP, PART = "transformer_engine", "transformer_engine_torch"


@pytest.fixture
def machine(monkeypatch):
    """A Python that has these top-level modules and these distributions."""

    def pretend(modules: set[str], distributions: dict[str, str]) -> None:
        monkeypatch.setattr(installed, "has_module", lambda name: name in modules)
        monkeypatch.setattr(
            installed, "version_of", lambda *names: next((distributions[n] for n in names if n in distributions), None)
        )

    return pretend


@pytest.mark.parametrize(
    ("modules", "distributions", "found"),
    [
        ({TOP}, {"transformer-engine": "2.11", "transformer-engine-torch": "2.11"}, True),
        ({TOP, PART}, {"transformer-engine": "2.11"}, True),
        ({TOP}, {"transformer-engine": "2.11"}, False),
        ({PART}, {"transformer-engine-torch": "2.11"}, False),
        (set(), {"transformer-engine-torch": "2.11"}, False),
        (set(), {}, False),
    ],
    ids=["wheels", "from source", "without its part", "the part alone", "the part's name alone", "nothing"],
)
def test_transformer_engine_with_its_part_for_torch(machine, modules, distributions, found):
    """The wheel of the part puts its library inside of the first package's folder: there is no module of its name."""
    machine(modules, distributions)
    assert installed.has_transformer_engine() is found


@pytest.mark.parametrize("cuda", [True, False])
def test_the_condition_of_a_gpu(monkeypatch, cuda):
    device.has_cuda.cache_clear()
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.delenv("DC_DEVICE", raising=False)
    try:
        assert patches.CONDITIONS["cuda"]() is cuda
        assert patches.CONDITIONS["no_cuda"]() is not cuda
    finally:
        device.has_cuda.cache_clear()


@pytest.mark.parametrize(
    ("engine", "apex", "holds", "neither"),
    [(True, False, True, False), (True, True, False, False), (False, True, False, False), (False, False, False, True)],
)
def test_the_condition_of_transformer_engine_without_apex(monkeypatch, engine, apex, holds, neither):
    monkeypatch.setattr(installed, "usable_transformer_engine", lambda: engine)
    monkeypatch.setattr(installed, "usable_apex", lambda: apex)
    assert patches.CONDITIONS["te_without_apex"]() is holds
    assert patches.CONDITIONS["no_te_and_no_apex"]() is neither


def test_the_rows_that_have_these_conditions():
    rows = {row.target.rpartition(":")[2]: row.condition for row in patches.CORE_ROWS}
    assert rows["_grad_accum_fusion_available"] == "te_without_apex"
    assert rows["_ParamAndGradBuffer.scale_gradients"] == "cuda"
    replaced = next(row for row in patches.CORE_ROWS if row.condition == "te_without_apex")
    assert replaced.replacement(False) is True
