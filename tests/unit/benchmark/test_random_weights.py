"""Random weights by name: the same for whoever asks, and no two alike."""

from __future__ import annotations

import torch
from torch import nn

from dc_megatron.benchmark.random_weights import DEVIATION, fill_randomly, random_tensor

CPU = torch.device("cpu")


def test_a_tensor_depends_on_its_name_alone():
    name, shape = "model.layers.0.mlp.up_proj.weight", (64, 32)
    first = random_tensor(name, shape, CPU)
    torch.rand(3)
    assert torch.equal(random_tensor(name, shape, CPU), first)
    other = random_tensor("model.layers.1.mlp.up_proj.weight", shape, CPU)
    assert (other - first).abs().max() > DEVIATION
    assert first.dtype == torch.float32


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    random_tensor("a.weight", (4, 4), CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_deviation_and_mean():
    """Of 10^5 values: both are known to three parts in a thousand of the deviation, and get five times that."""
    values = random_tensor("lm_head.weight", (1000, 100), CPU)
    assert abs(float(values.std()) / DEVIATION - 1) < 0.015
    assert abs(float(values.mean())) < 0.015 * DEVIATION


def test_norms_are_ones_and_biases_zeros():
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight", "vision_tower.pre_layrnorm.weight"):
        assert torch.equal(random_tensor(name, (5,), CPU), torch.ones(5)), name
    for name in ("connector.mlp.0.bias", "vision_tower.pre_layrnorm.bias"):
        assert torch.equal(random_tensor(name, (5,), CPU), torch.zeros(5)), name


def test_a_module_is_filled_by_the_names_behind_its_prefix():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).requires_grad_(False)
    fill_randomly(module, "connector.mlp.")
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, random_tensor(f"connector.mlp.{name}", tuple(parameter.shape), CPU)), name


def test_a_module_in_sixteen_bits_is_the_same_rounded():
    module = nn.Sequential(nn.Linear(3, 4)).bfloat16()
    fill_randomly(module)
    assert torch.equal(module[0].weight, random_tensor("0.weight", (4, 3), CPU).bfloat16())
    assert module[0].weight.requires_grad
