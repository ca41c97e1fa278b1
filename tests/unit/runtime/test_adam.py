"""GroupStepAdam against torch's Adam and AdamW, and the state that megatron-core's distributed optimizer expects."""

from __future__ import annotations

import copy

import pytest
import torch

from dc_megatron.runtime.adam import GroupStepAdam

SHAPES = [(5, 3), (7,), (2, 2, 2)]


def make_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups_of(parameters: list[torch.nn.Parameter]) -> list[dict]:
    """Two groups with settings of their own, as weight decay for matrices only."""
    return [
        {"params": parameters[:1], "weight_decay": 0.1, "lr": 3e-3},
        {"params": parameters[1:], "weight_decay": 0.0, "lr": 1e-2},
    ]


def set_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def run(optimizer: torch.optim.Optimizer, parameters: list, steps: range) -> None:
    for step in steps:
        set_gradients(parameters, step)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9  # as a schedule does
        optimizer.step()


def assert_same(ours: list, theirs: list) -> None:
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), f"parameter {number} differs by {(a - b).abs().max()}"


@pytest.mark.parametrize(("decoupled", "theirs"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_every_step_is_torchs_to_the_bit(decoupled, theirs):
    a, b = make_parameters(), make_parameters()
    ours = GroupStepAdam(groups_of(a), betas=(0.9, 0.98), eps=1e-6, adam_w_mode=decoupled)
    reference = theirs(groups_of(b), betas=(0.9, 0.98), eps=1e-6)
    for step in range(8):
        run(ours, a, range(step, step + 1))
        run(reference, b, range(step, step + 1))
        assert_same(a, b)


def test_steps_are_counted_in_the_group_only():
    parameters = make_parameters()
    optimizer = GroupStepAdam(groups_of(parameters))
    assert all("step" not in group for group in optimizer.param_groups)
    run(optimizer, parameters, range(3))
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    assert all(type(group["step"]) is int for group in optimizer.param_groups)
    assert all(set(optimizer.state[p]) == {"exp_avg", "exp_avg_sq"} for p in parameters)
    state = optimizer.state_dict()
    assert all(set(entry) == {"exp_avg", "exp_avg_sq"} for entry in state["state"].values())


def resumed(state: dict, parameters: list) -> tuple[GroupStepAdam, list]:
    """A new optimizer on copies of ``parameters`` that goes on from ``state``."""
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    optimizer = GroupStepAdam(groups_of(copies))
    optimizer.load_state_dict(copy.deepcopy(state))
    return optimizer, copies


def test_a_loaded_state_goes_on_to_the_bit():
    parameters = make_parameters()
    optimizer = GroupStepAdam(groups_of(parameters))
    run(optimizer, parameters, range(4))
    other, copies = resumed(optimizer.state_dict(), parameters)
    run(optimizer, parameters, range(4, 9))
    run(other, copies, range(4, 9))
    assert_same(copies, parameters)
    assert [group["step"] for group in other.param_groups] == [9, 9]


def test_a_checkpoint_of_fused_adam_goes_on():
    """Transformer Engine's groups carry lr, betas, eps, weight_decay, bias_correction and step: nothing of torch's."""
    parameters = make_parameters()
    optimizer = GroupStepAdam(groups_of(parameters))
    run(optimizer, parameters, range(2))
    state = optimizer.state_dict()
    known = ("params", "lr", "betas", "eps", "weight_decay", "step")
    state["param_groups"] = [
        {"bias_correction": True, **{name: group[name] for name in known}} for group in state["param_groups"]
    ]
    other, copies = resumed(state, parameters)
    run(optimizer, parameters, range(2, 6))
    run(other, copies, range(2, 6))
    assert_same(copies, parameters)


def test_a_group_without_parameters_is_no_obstacle():
    """A rank may own no part of a group; the engine makes its counter agree when it saves."""
    parameters = make_parameters()[:1]
    optimizer = GroupStepAdam([{"params": parameters}, {"params": []}])
    run(optimizer, parameters, range(2))
    assert [group.get("step") for group in optimizer.param_groups] == [2, None]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, parameters, range(2, 3))
    assert optimizer.param_groups[0]["step"] == 3


def test_a_parameter_without_gradient_stays_and_keeps_no_counter():
    parameters = make_parameters()
    optimizer = GroupStepAdam(groups_of(parameters))
    before = parameters[2].detach().clone()
    set_gradients(parameters, 0)
    parameters[2].grad = None
    optimizer.step()
    assert torch.equal(parameters[2], before)
    assert "step" not in optimizer.state[parameters[2]]


def test_a_closure_is_called_once_and_its_loss_returned():
    parameters = make_parameters()
    optimizer = GroupStepAdam(groups_of(parameters))
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        set_gradients(parameters, 0)
        return torch.tensor(4.0)

    assert optimizer.step(closure) == 4.0
    assert calls == [True]
