"""The training recipe in plain PyTorch: AdamW, gradient clipping, mean over the supervised tokens of a global batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dc_megatron.reference.model import ReferenceModel


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters; weight decay acts on matrices only, as in Megatron and in the original's Trainer."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    # Largest 2-norm of all gradients together; 0 does not clip.
    clip_grad: float = 1.0
    trainable: str = "connector"


@dataclass
class TrainingStep:
    """``loss``: mean over the supervised tokens before the step. ``grads``: by parameter name, before clipping."""

    loss: float
    supervised_tokens: int
    grad_norm: float
    grads: dict[str, Tensor]


def train(
    model: ReferenceModel,
    global_batches: Sequence[Sequence[dict]],
    recipe: Recipe,
    learning_rates: Sequence[float] | None = None,
) -> list[TrainingStep]:
    """One optimizer step for each global batch, which is the list of all its micro-batches over all data ranks.

    ``learning_rates``, where given, holds one value a step in place of the recipe's constant one. ``model`` is
    changed in place.
    """
    model.set_trainable(recipe.trainable)
    model.train()
    optimizer = _optimizer(model, recipe)
    steps = []
    for index, micro_batches in enumerate(global_batches):
        if learning_rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rates[index]
        steps.append(_step(model, optimizer, micro_batches, recipe.clip_grad))
    return steps


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer moves, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _optimizer(model: ReferenceModel, recipe: Recipe) -> torch.optim.AdamW:
    parameters = list(trainable_parameters(model).values())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), eps=recipe.epsilon, foreach=False
    )


def _step(model: ReferenceModel, optimizer, micro_batches: Sequence[dict], clip_grad: float) -> TrainingStep:
    parameters = trainable_parameters(model)
    for parameter in parameters.values():
        # A batch without images leaves the connector without gradients; zero is what the sharded model has there.
        parameter.grad = torch.zeros_like(parameter)
    loss_sum, tokens = 0.0, 0
    for batch in micro_batches:
        output = model(batch)
        if output.loss_sum.requires_grad:
            output.loss_sum.backward()
        loss_sum += output.loss_sum.item()
        tokens += output.supervised_tokens
    divisor = max(tokens, 1)
    for parameter in parameters.values():
        parameter.grad /= divisor
    grads = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    limit = clip_grad if clip_grad > 0 else float("inf")
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters.values(), limit).item()
    optimizer.step()
    return TrainingStep(loss_sum / divisor, tokens, grad_norm, grads)
