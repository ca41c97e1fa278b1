"""The formulas for a step's operations against PyTorch's own counter on tiny models of transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from dc_megatron.benchmark.step_workload import read_workload
from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig, layer_table
from dc_megatron.model.dense_connector import DenseConnector, join_features
from dc_megatron.model.vision_tower import VisionTower
from dc_megatron.planner.flops import linear_parameters, step_flops, tower_flops

LENGTH, TARGETS = 24, 7
CONNECTOR = ConnectorConfig("dci")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,  # not hidden / heads: the two must not be confused
    "vocab_size": 101,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
TOWERS = {
    "clip": {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
        "hidden_act": "quick_gelu",
    },
    "siglip": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "image_size": 35,
        "patch_size": 7,
        "hidden_act": "gelu_pytorch_tanh",
    },
}
LANGUAGE = LanguageConfig.from_config(LLAMA, "test")
CLIP = VisionConfig.from_config(TOWERS["clip"], "test")


def step(lengths=(LENGTH,), images=0, targets=TARGETS, trainable=("connector", "llm"), language=LANGUAGE):
    settings = {"lengths": lengths, "images": images, "supervised_tokens": targets, "trainable": trainable}
    return step_flops(language, CLIP, CONNECTOR, **settings)


def make_llama(attention: str = "eager") -> LlamaForCausalLM:
    """Attention as two products of matrices, whose operations the counter sees: the whole square."""
    values = {name: value for name, value in LLAMA.items() if name != "model_type"}
    return LlamaForCausalLM(LlamaConfig(**values, attn_implementation=attention))


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def rotary_angles() -> int:
    """transformers makes the angles by a product of frequencies and positions; we do not count them."""
    return 2 * LENGTH * (LLAMA["head_dim"] // 2)


def run_llama(trained: bool) -> int:
    """Operations of a forward and a backward pass over one sample, with a head at TARGETS positions."""
    model = make_llama().requires_grad_(trained)
    embeddings = torch.randn(1, LENGTH, LLAMA["hidden_size"], requires_grad=True)

    def passes() -> None:
        hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        model.lm_head(hidden[:, :TARGETS]).sum().backward()

    return counted(passes) - rotary_angles()


def test_weights_of_the_linear_layers():
    model = make_llama()
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert linear_parameters(LANGUAGE) == sum(linear.weight.numel() for linear in linears)


def test_weights_of_phi_2():
    """Two linears in the MLP: 32 layers of 4 * 2560^2 + 2 * 2560 * 10240."""
    assert linear_parameters(read_workload("phi-2").language_config) == 2_516_582_400


def test_weights_of_vicuna_7b():
    """32 layers of 4 * 4096^2 + 3 * 4096 * 11008."""
    assert linear_parameters(read_workload("7b-stage2").language_config) == 6_476_005_376


def test_a_forward_pass_is_twice_weights_times_tokens():
    """Exactly: only linear layers, attention's two products and the angles are products of matrices."""
    model = make_llama().requires_grad_(False)
    ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    seen = counted(lambda: model.model(ids, use_cache=False)) - rotary_angles()
    width = LLAMA["num_attention_heads"] * LLAMA["head_dim"]
    squares = LLAMA["num_hidden_layers"] * 4 * LENGTH**2 * width
    assert seen - squares == 2 * linear_parameters(LANGUAGE) * LENGTH
    ours = step()
    assert ours.language_model == 3 * (seen - squares)
    # Causal: half of the square, forward once and backward twice.
    assert ours.attention == 3 * squares / 2


@pytest.mark.parametrize(("trainable", "passes"), [(("connector", "llm"), 3), (("connector",), 2)])
def test_passes_of_what_learns_and_of_what_is_frozen(trainable, passes):
    """A frozen layer has no gradient of its weight, but that of its input; attention has both operands' always."""
    ours = step(trainable=trainable)
    # The counter sees attention's whole square.
    assert ours.language_model + 2 * ours.attention + ours.head == run_llama("llm" in trainable)
    assert ours.language_model == passes * 2 * linear_parameters(LANGUAGE) * LENGTH
    assert ours.head == passes * 2 * LLAMA["vocab_size"] * LLAMA["hidden_size"] * TARGETS


def test_attention_counts_each_sample_alone():
    together, apart = step(lengths=(16,)), step(lengths=(8, 8))
    assert apart.attention == together.attention / 2
    assert apart.language_model == together.language_model


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("kind", ["dci", "none"])
def test_towers(family, kind):
    """Exactly: patch embedding and the layers that are built; CLS counts as a position, and is no patch."""
    vision, connector = VisionConfig.from_config(TOWERS[family], "test"), ConnectorConfig(kind)
    tower = VisionTower(vision, layer_table(vision, connector))
    tower.model.config._attn_implementation = "eager"  # the counter knows no fused attention of a CPU
    size = TOWERS[family]["image_size"]
    assert counted(lambda: tower(torch.zeros(1, 3, size, size))) == tower_flops(vision, connector)
    # No layer above the one that is read: the last of six is never built for CLIP.
    assert len(tower.model.encoder.layers) == layer_table(vision, connector).deepest < 6


@pytest.mark.parametrize("family", TOWERS)
def test_a_tower_that_learns(family):
    vision = VisionConfig.from_config(TOWERS[family], "test")
    tower = VisionTower(vision, layer_table(vision, CONNECTOR))
    tower.model.config._attn_implementation = "eager"
    tower.set_learning(True)
    module = DenseConnector(vision, CONNECTOR, LLAMA["hidden_size"], seed=1)
    size = TOWERS[family]["image_size"]

    def passes() -> None:
        states = tower(torch.zeros(1, 3, size, size))
        module(join_features(states, layer_table(vision, CONNECTOR), "dci")).sum().backward()

    done = step_flops(
        LANGUAGE, vision, CONNECTOR, lengths=[1], images=1, supervised_tokens=1, trainable=("connector", "vision_tower")
    )
    assert done.tower + done.connector == counted(passes)


@pytest.mark.parametrize(("trainable", "trained"), [(("connector", "llm"), True), (("llm",), False)])
def test_the_connector_needs_no_gradient_of_its_input(trainable, trained):
    images, tokens = 2, 16
    module = DenseConnector(CLIP, CONNECTOR, LLAMA["hidden_size"], seed=1).requires_grad_(trained)
    features = torch.zeros(images, tokens, CONNECTOR.input_size(CLIP))

    def passes() -> None:
        projected = module(features)
        if trained:
            projected.sum().backward()

    assert step(images=images, trainable=trainable).connector == counted(passes)


def test_the_total_is_the_sum_of_the_parts():
    done = step(images=3)
    parts = done.as_dict()
    assert parts.pop("total") == done.total == sum(parts.values())
    assert set(parts) == {"tower", "connector", "language_model", "attention", "head"}
    assert done.tower == 3 * tower_flops(CLIP, CONNECTOR) > 0
    assert step(language=replace(LANGUAGE, vocab_size=202)).head == 2 * done.head
