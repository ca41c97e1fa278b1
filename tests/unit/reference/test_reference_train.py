"""The oracle's training steps: what moves, what stays, and that splitting a global batch changes nothing."""

import pytest
import torch

from dc_megatron.config import ConnectorConfig, VisionConfig
from dc_megatron.reference.model import ReferenceModel
from dc_megatron.reference.train import Recipe, train
from tests.helpers.reference_batches import make_batch
from tests.helpers.tiny_models import tiny_clip, tiny_llama

SEEING = [[("text", [5, 6]), ("image", 0), ("text", [7, 8, 9])], [("image", 1), ("text", [10, 11])]]
TEXT = [[("text", [12, 13, 14, 15])]]


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(1)
    tower = tiny_clip(tmp_path / "clip", layers=4)
    vision = VisionConfig.from_folder(tower)
    return ReferenceModel(tower, tiny_llama(tmp_path / "llama", layers=2), vision, ConnectorConfig("dci"))


def batch(rows):
    return make_batch(rows, 24, tokens_per_image=16)


def test_connector_alone_learns_and_nothing_else_moves(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = train(model, [[batch(SEEING)]] * 20, Recipe(learning_rate=1e-2))
    assert steps[-1].loss < steps[0].loss - 0.5
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"connector.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert not model.vision_tower.training
    assert model.language_model.training


def test_language_model_trains_too_when_asked(model):
    step = train(model, [[batch(SEEING)]], Recipe(learning_rate=1e-3, trainable="connector,llm"))[0]
    assert any(name.startswith("language_model.model.layers.1.") for name in step.grads)
    assert all(torch.isfinite(grad).all() and grad.abs().sum() > 0 for grad in step.grads.values())
    total = torch.sqrt(sum(grad.double().square().sum() for grad in step.grads.values()))
    assert step.grad_norm == pytest.approx(total.item(), rel=1e-5)


def test_micro_batches_are_weighted_by_their_supervised_tokens(model):
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = Recipe(learning_rate=1e-3)
    together = train(model, [[batch(SEEING + TEXT)]], recipe)[0]
    model.load_state_dict(parameters)
    apart = train(model, [[batch(SEEING[:1]), batch(SEEING[1:]), batch(TEXT)]], recipe)[0]
    assert apart.supervised_tokens == together.supervised_tokens == 9
    assert apart.loss == pytest.approx(together.loss, abs=1e-5)
    for name, grad in together.grads.items():
        torch.testing.assert_close(apart.grads[name], grad, atol=1e-6, rtol=1e-4)


def test_a_batch_without_pictures_gives_the_connector_zero_gradients(model):
    step = train(model, [[batch(TEXT)]], Recipe(learning_rate=1e-3))[0]
    assert step.supervised_tokens == 3
    assert step.grad_norm == 0
    assert set(step.grads) == {f"connector.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


def test_first_step_is_that_of_adamw_with_clipping_and_decay(model):
    recipe = Recipe(learning_rate=1.0, weight_decay=0.1, clip_grad=1e-3, epsilon=1e-4)
    before = {name: value.clone() for name, value in model.connector.named_parameters()}
    step = train(model, [[batch(SEEING)]], recipe, learning_rates=[1e-2])[0]
    scale = recipe.clip_grad / (step.grad_norm + 1e-6)
    for name, value in model.connector.named_parameters():
        grad = step.grads[f"connector.{name}"] * scale
        decay = recipe.weight_decay if value.ndim > 1 else 0.0
        # After one step the bias-corrected moments are the gradient and its square.
        expected = before[name] * (1 - 1e-2 * decay) - 1e-2 * grad / (grad.abs() + recipe.epsilon)
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
