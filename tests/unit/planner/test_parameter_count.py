"""Counted parameters against transformers' and PEFT's models of the published shapes, built without memory.

What ranks hold is compared with the engine's model in tests/unit/training/test_dry_run.py.
"""

from __future__ import annotations

from math import prod

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dc_megatron.config import (
    LANGUAGE_PRESETS,
    VISION_PRESETS,
    ConnectorConfig,
    LanguageConfig,
    language_shape,
    layer_table,
    padded_vocab_size,
    vision_shape,
)
from dc_megatron.planner.gradient_buffers import Sharding, laid_out, rank_buffers
from dc_megatron.planner.parameter_count import (
    Model,
    Parameter,
    chunk_parameters,
    learning_parameters,
    rank_parameters,
    total_parameters,
    tower_parameters,
)
from dc_megatron.weights.language_tables import hugging_face_shapes, language_table

CLIP, BOTH = "clip-vit-large-patch14-336", ("connector", "llm")


def hugging_face(content: dict, auto=AutoModelForCausalLM) -> torch.nn.Module:
    content = dict(content)
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    with torch.device("meta"):
        return auto.from_config(config)


def model(language: LanguageConfig, trainable=BOTH, **more) -> Model:
    return Model(language, vision_shape(CLIP), ConnectorConfig("dci"), trainable, **more)


def of_language(parameters) -> int:
    names = ("connector", "vision_tower", "image_newline", "lora")
    return sum(one.elements for one in parameters if not one.name.startswith(names))


@pytest.mark.parametrize("name", LANGUAGE_PRESETS)
def test_language_presets_have_the_parameters_of_transformers_models(name):
    theirs = hugging_face(LANGUAGE_PRESETS[name].config)
    language = language_shape(name)
    parameters = chunk_parameters(model(language), 1, ((language.num_hidden_layers,),), 0, 0)
    padding = padded_vocab_size(language.vocab_size, 1) - language.vocab_size
    assert of_language(parameters) - 2 * padding * language.hidden_size == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", LANGUAGE_PRESETS)
def test_the_weights_table_has_the_names_and_shapes_of_transformers_models(name):
    language = language_shape(name)
    theirs = {
        key: tuple(value.shape) for key, value in hugging_face(LANGUAGE_PRESETS[name].config).state_dict().items()
    }
    table = hugging_face_shapes(language_table(language, padded_vocab_size(language.vocab_size, 8)), 80)
    assert theirs == {key: table[key] for key in theirs}


@pytest.mark.parametrize("name", VISION_PRESETS)
@pytest.mark.parametrize("kind", ["dci", "none"])
def test_tower_presets(name, kind):
    vision, connector = vision_shape(name), ConnectorConfig(kind)
    content = {**VISION_PRESETS[name].config, "num_hidden_layers": layer_table(vision, connector).deepest}
    theirs = hugging_face(content, AutoModel)
    counted = sum(value.numel() for key, value in theirs.named_parameters() if ".head." not in f".{key}")
    assert tower_parameters(vision, connector) == counted


def test_lora_is_pefts_on_all_linears_but_the_head():
    from peft import LoraConfig, get_peft_model

    name = "vicuna-7b"
    with torch.device("meta"):
        theirs = get_peft_model(
            hugging_face(LANGUAGE_PRESETS[name].config), LoraConfig(r=128, target_modules="all-linear")
        )
    learning = sum(one.numel() for one in theirs.parameters() if one.requires_grad)
    lora = model(language_shape(name), ("connector",), lora_rank=128)
    connector = sum(one.elements for one in rank_parameters(lora, 1, ((32,),), 0) if one.name.startswith("connector"))
    assert learning_parameters(lora) == learning + connector
    # Column-parallel: A whole, B divided. Row-parallel: A divided, B whole.
    width, inner, rank = 4096, 11008, 128
    halves = sum(one.elements for one in rank_parameters(lora, 2, ((32,),), 0) if one.name.startswith("lora"))
    column = rank * (3 * (width + width // 2) + 2 * (width + inner // 2))
    row = rank * ((width // 2 + width) + (inner // 2 + width))
    assert halves == 32 * (column + row)


def test_ranks_together_hold_the_model_and_what_is_whole_on_each():
    language = language_shape("llama3-70b")
    whole = model(language)
    stages = ((5, 5), (5, 5), (5, 5), (5, 5), (5, 5), (5, 5), (5, 5), (5, 5))
    held = sum(one.elements for stage in range(8) for one in rank_parameters(whole, 8, stages, stage))
    (everything,) = (chunk_parameters(whole, 1, ((80,),), 0, 0),)
    repeated = [one for one in everything if "norm" in one.name or one.name.startswith(("connector", "vision"))]
    padding = padded_vocab_size(128256, 8) - padded_vocab_size(128256, 1)
    expected = sum(one.elements for one in everything) + 7 * sum(one.elements for one in repeated)
    assert 8 * held == expected + 2 * padding * 8192


def test_totals():
    # As published: 6.74, 13.02, 70.55 billion, beside tower and connector.
    for name, billions in (("vicuna-7b", 6.738), ("vicuna-13b", 13.016), ("llama3-70b", 70.554)):
        whole = model(language_shape(name))
        beside = [one for one in rank_parameters(whole, 1, ((80,),), 0) if one.name.startswith(("conn", "vision"))]
        assert total_parameters(whole) - sum(one.elements for one in beside) == pytest.approx(billions * 1e9, rel=1e-3)


def tensor(*sizes: int, tied: int | None = None) -> list[Parameter]:
    return [Parameter(str(place), size, True, tied=place == tied) for place, size in enumerate(sizes)]


def test_a_buffer_by_hand():
    # From the last to the first: [0, 100) and [128, 328) in a bucket of at least 200, padded to lcm(2, 128); then
    # [384, 434).
    buffer = laid_out(tensor(50, 200, 100), 200, Sharding(2, distributed=True))
    assert buffer.numbers == 384 + 128
    # Pieces of [0, 192), [192, 384) and [384, 448), [448, 512).
    assert buffer.owned == [100 + 64 + 50, 136]
    assert sum(buffer.owned) == buffer.learning == 350


def test_a_tied_table_has_a_bucket_of_its_own():
    buffer = laid_out(tensor(10, 20, 30, tied=1), None, Sharding(1, distributed=True))
    assert buffer.numbers == 3 * 128


def test_without_the_distributed_optimizer_nothing_is_padded_and_all_is_everybodys():
    buffer = laid_out(tensor(50, 200, 100), 200, Sharding(3))
    assert (buffer.numbers, buffer.owned) == (350, [350] * 3)


def test_nothing_learns_nothing_is_buffered():
    frozen = model(language_shape("vicuna-7b"), ("connector",))
    assert rank_buffers(frozen, 1, ((16,), (16,)), 1, Sharding(2, True)) == ()
    first = model(language_shape("vicuna-7b"), ("connector",), newline=True)
    assert learning_parameters(first) == learning_parameters(frozen) + prod((4096,))
