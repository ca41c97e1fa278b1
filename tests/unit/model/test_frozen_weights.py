"""What does not learn costs neither gradients, nor buffers, nor kept inputs, nor a cast in every step.

How often a frozen weight is cast: test_frozen_casts.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig
from dc_megatron.model.frozen_casts import keep_frozen_casts
from tests.helpers.reference_batches import make_batch
from tests.helpers.tiny_models import tiny_clip, tiny_llama
from tests.multirank import parity
from tests.multirank.job import Job

STEP = "tests.multirank.frozen_worker:step"


@pytest.fixture(scope="module")
def steps(workers, tmp_path_factory) -> dict[str, dict]:
    """The same step with a frozen and with a learning language model."""
    root = tmp_path_factory.mktemp("models")
    language, tower = tiny_llama(root / "llama", vocab=1003, layers=2), tiny_clip(root / "clip")
    vision, connector = VisionConfig.from_folder(tower), ConnectorConfig("dci")
    row = parity.make_rows([1, 0, 2], seed=5)
    job = Job(
        language_folder=language,
        vision_folder=tower,
        micro_batches=[[make_batch([row], 2 * parity.SEQUENCE, tokens_per_image=16, packed=True)]],
        connector_state=parity.connector_state(vision, connector, LanguageConfig.from_folder(language).hidden_size),
        packed=True,
    )
    stages = {"stage 1": "connector", "stage 2": "connector,llm"}
    return {name: workers.run(STEP, 1, replace(job, trainable=parts))[0] for name, parts in stages.items()}


def test_no_linear_of_a_frozen_model_keeps_its_input(steps):
    frozen, trained = steps["stage 1"], steps["stage 2"]
    assert len(frozen["linears"]) == 4 * frozen["layers"]
    assert frozen["saved_inputs"] == []
    assert trained["saved_inputs"] == trained["linears"], "the weight's gradient needs the input"


def test_a_frozen_model_keeps_less_by_the_inputs_of_its_linears(steps):
    frozen, trained = steps["stage 1"], steps["stage 2"]
    assert frozen["input_bytes"] == trained["input_bytes"] > 0
    assert trained["saved_bytes"] - frozen["saved_bytes"] >= trained["input_bytes"]


def test_a_frozen_model_has_no_gradients(steps):
    frozen, trained = steps["stage 1"], steps["stage 2"]
    parts = ["connector.mlp.0.bias", "connector.mlp.0.weight", "connector.mlp.2.bias", "connector.mlp.2.weight"]
    assert frozen["learnt"] == frozen["with_main_grad"] == parts
    assert set(frozen["with_grad"]) <= set(parts)
    assert {name.split(".")[0] for name in trained["learnt"]} == {"connector", "language_model"}


def test_gradient_buffers_are_made_for_what_learns_alone(steps):
    """Bytes: fp32 of the connector in stage 1."""
    frozen, trained = steps["stage 1"], steps["stage 2"]
    assert frozen["buffered"] == frozen["with_main_grad"]
    assert frozen["buffer_bytes"] == 4 * frozen["connector_values"] == 4 * frozen["trained_values"]
    assert trained["buffer_bytes"] == 4 * trained["trained_values"] > 10 * frozen["buffer_bytes"]


class Layer(nn.Module):
    """A layer as Transformer Engine's: casts its weight where it is told that a micro-batch is the first."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.is_first_microbatch = True
        self.casts = 0

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        self.casts += bool(self.is_first_microbatch)
        # As Megatron's wrapper does behind its layer.
        self.is_first_microbatch = False
        return value * self.weight


class Model(nn.Module):
    """Two such layers, one inside of another module, and one of torch's."""

    def __init__(self):
        super().__init__()
        self.outer, self.inner, self.plain = Layer(), nn.Sequential(Layer()), nn.Linear(2, 2)

    def step(self, micro_batches: int = 3) -> None:
        """As Megatron's schedule: every layer is told at the beginning of a step."""
        for layer in self.modules():
            if hasattr(layer, "is_first_microbatch"):
                layer.is_first_microbatch = True
        for _ in range(micro_batches):
            self.plain(self.inner(self.outer(torch.ones(2))))


def test_only_layers_whose_own_weight_is_frozen_keep_their_casts():
    model = Model()
    model.inner.requires_grad_(False)
    keep_frozen_casts(model)
    for _ in range(9):
        model.step()
    assert model.outer.casts == 9
    assert model.inner[0].casts < 9
    # Later steps cast nothing more.
    kept = model.inner[0].casts
    model.step()
    assert (model.outer.casts, model.inner[0].casts) == (10, kept)


def test_choosing_again_and_again_leaves_one_hook():
    model = Model()
    layers = (model.outer, model.inner[0], model.plain)
    for _ in range(3):
        model.requires_grad_(False)
        keep_frozen_casts(model)
    assert [len(layer._forward_pre_hooks) for layer in layers] == [1, 1, 0]
    model.requires_grad_(True)
    keep_frozen_casts(model)
    assert [len(layer._forward_pre_hooks) for layer in layers] == [0, 0, 0]
