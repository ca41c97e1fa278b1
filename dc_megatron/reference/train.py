"""The training recipe in plain PyTorch: AdamW, gradient clipping, mean over the supervised tokens of a global batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dc_megatron.reference.model import ReferenceModel


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters; what decays is decided by Hugging Face's Trainer, as in the original.

    rates: learning rate of the parts that have one of their own, by the start of their parameters' names.
    """

    learning_rate: float
    rates: Mapping[str, float] = field(default_factory=dict)
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

    ``learning_rates``, where given, holds one value a step in place of the recipe's constant one; parts with a rate of
    their own follow in proportion. ``model`` is changed in place.
    """
    model.set_trainable(recipe.trainable)
    model.train()
    optimizer = _optimizer(model, recipe)
    steps = []
    for index, micro_batches in enumerate(global_batches):
        if learning_rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rates[index] * group["initial_lr"] / recipe.learning_rate
        steps.append(_step(model, optimizer, micro_batches, recipe.clip_grad))
    return steps


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer moves, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _optimizer(model: ReferenceModel, recipe: Recipe) -> torch.optim.AdamW:
    decaying = _decaying(model) if recipe.weight_decay else ()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable_parameters(model).items():
        rate = next((r for start, r in recipe.rates.items() if name.startswith(start)), recipe.learning_rate)
        groups.setdefault((rate, recipe.weight_decay if name in decaying else 0.0), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "lr": rate, "initial_lr": rate, "weight_decay": decay}
            for (rate, decay), members in groups.items()
        ],
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        foreach=False,
    )


def _decaying(model: ReferenceModel) -> set[str]:
    from transformers import Trainer  # takes seconds

    return set(Trainer.get_decay_parameter_names(None, model))


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
