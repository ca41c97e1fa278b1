"""A preflight's flags are training's: names, defaults, and the DataConfig that follows."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from dc_megatron.data.index import index_key
from dc_megatron.errors import UserError
from dc_megatron.reports.preflight_settings import PreflightSettings, data_config, decode_count, read_shapes
from dc_megatron.training import data_plan
from dc_megatron.training.flag_table import AVAILABLE, flags_by_key
from dc_megatron.training.run import check
from tests.helpers.data_files import caption_records, sentencepiece_tokenizer, write_records
from tests.helpers.tiny_models import tiny_clip, tiny_llama

OWN = {"decode", "html", "samples_per_step"}


def test_names_and_defaults_are_those_of_training():
    table = flags_by_key()
    for setting in fields(PreflightSettings):
        if setting.name in OWN:
            assert setting.name not in table
            continue
        flag = table[setting.name]
        required = setting.name in ("data_path", "model_name_or_path", "vision_tower", "version")
        if flag.status == AVAILABLE and not required:
            assert setting.default == flag.default, setting.name


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"image_aspect_ratio": "pad", "mm_dense_connector_type": "sti", "model_max_length": 1000},
        {"seed": 7, "video_frames": 3, "max_bad_sample_rate": 0.5, "model_max_length": 5000},
        {"image_aspect_ratio": "anyres"},
        {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[(28, 56)]", "mm_patch_merge_type": "flat"},
    ],
)
def test_the_data_config_is_the_one_of_training(tmp_path, more):
    folder = tiny_llama(tmp_path / "llama", layers=1)
    sentencepiece_tokenizer(folder)
    tower = tiny_clip(tmp_path / "clip")
    data = write_records(tmp_path / "a.json", caption_records(tmp_path / "images", 2))
    given = {
        "model_name_or_path": str(folder),
        "vision_tower": str(tower),
        "data_path": (f"{data}:2",),
        "image_folder": (str(tmp_path / "images"),),
        "version": "v1",
        **more,
    }
    settings = PreflightSettings(**given)
    words = [
        word
        for name, value in given.items()
        for word in (f"--{name}", *(value if isinstance(value, tuple) else (str(value),)))
    ]
    training = data_plan.data_config(check([*words, "--output_dir", str(tmp_path / "run")], world_size=1))
    own = data_config(settings, read_shapes(settings))
    assert own == training
    assert index_key(own) == index_key(replace(training, seq_length=8192, packing="none"))


def test_a_tokenizer_alone_is_enough(tmp_path):
    settings = PreflightSettings(
        data_path=("a.json",),
        model_name_or_path=sentencepiece_tokenizer(tmp_path / "tokenizer"),
        vision_tower=str(tiny_clip(tmp_path / "clip")),
        version="v1",
        image_aspect_ratio="anyres",
    )
    shapes = read_shapes(settings)
    assert shapes.language is None
    config = data_config(settings, shapes)
    assert config.vocab_size == 0
    assert config.tiling.has_newline


@pytest.mark.parametrize(("word", "count"), [("all", None), ("none", 0), ("0", 0), ("12", 12)])
def test_decode(word, count):
    assert decode_count(word) == count


@pytest.mark.parametrize("word", ["", "-1", "some", "1.5"])
def test_decode_refuses(word):
    with pytest.raises(UserError, match="--decode"):
        decode_count(word)
