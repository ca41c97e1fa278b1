"""The checks before anything heavy starts: what a command line and the files it names can be refused for."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from dc_megatron.errors import UserError
from dc_megatron.training import data_plan, run
from dc_megatron.training.resume import Start
from tests.helpers.workspace import make_workspace, training_flags

ANYRES = {"image_aspect_ratio": "anyres"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"), records=3)


@pytest.fixture
def check(workspace, tmp_path):
    def call(world_size: int = 1, **more) -> run.Checked:
        return run.check(training_flags(workspace, tmp_path / "run", **more), world_size)

    return call


@pytest.fixture
def language_folder(workspace, tmp_path):
    """A folder with the language model's config.json, changed."""

    def make(**changes) -> str:
        folder = tmp_path / "language"
        folder.mkdir()
        with open(os.path.join(workspace["llama"], "config.json"), encoding="utf-8") as file:
            content = json.load(file)
        (folder / "config.json").write_text(json.dumps({**content, **changes}))
        return str(folder)

    return make


def test_a_good_command_line(check, workspace):
    checked = check()
    assert checked.language.path == workspace["llama"]
    assert (checked.vision.family, checked.connector.dense_connector_type) == ("clip", "dci")
    assert checked.settings.model_max_length == 128
    assert not checked.start.loads


def test_a_sliding_window_shorter_than_the_samples_is_refused(check, language_folder):
    folder = language_folder(model_type="mistral", sliding_window=64)
    with pytest.raises(UserError, match=r"--model_max_length 128: .*sliding_window 64.*at most that"):
        check(model_name_or_path=folder)
    assert check(model_name_or_path=folder, model_max_length=64).language.sliding_window == 64


def test_a_qwen2_folder_is_taken_with_its_unused_window(check, language_folder):
    folder = language_folder(model_type="qwen2", sliding_window=64, use_sliding_window=False)
    assert check(model_name_or_path=folder).language.qkv_bias


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("data_path", r"--data_path /absent/thing: no such file"),
        ("image_folder", r"--image_folder /absent/thing: no such folder"),
        ("pretrain_mm_mlp_adapter", r"--pretrain_mm_mlp_adapter /absent/thing: no such file"),
        ("model_name_or_path", r"--model_name_or_path /absent/thing: no such folder"),
        ("vision_tower", r"--vision_tower /absent/thing: no such folder"),
        ("load", r"--load /absent/thing: no such folder"),
    ],
)
def test_what_is_not_there_is_refused_by_its_flag(check, flag, message):
    with pytest.raises(UserError, match=message):
        check(**{flag: "/absent/thing"})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mm_dense_connector_type": "dcj"}, r"dcj.*did you mean 'dci'"),
        ({"version": "v2"}, r"--version v2"),
        ({"mm_vision_select_layer": -9}, r"--mm_vision_select_layer -9: the tower has 6 layers; choose from -7 to 6"),
        ({"tensor_model_parallel_size": 8, "world_size": 8}, r"--tensor-model-parallel-size 8.*1, 2, 4"),
        ({"pipeline_model_parallel_size": 3, "world_size": 3}, r"--pipeline-model-parallel-size 3.*1, 2, 4"),
        ({"tensor_model_parallel_size": 2}, r"1 processes cannot be divided"),
        ({"per_device_train_batch_size": 3}, r"contradicts"),
        ({"fp8_format": "hybrid"}, r"--fp8-format hybrid: FP8 stands beside bf16, .* add --bf16 True"),
        ({"fp8_recipe": "blockwise"}, r"--fp8-recipe blockwise: says how to train in FP8; add --fp8-format hybrid"),
        ({"fp8_format": "hybrd", "bf16": True}, r"--fp8_format hybrd: unknown .*'hybrid'"),
        (
            {"fp8_format": "hybrid", "bf16": True, "seq_length": 300},
            r"--seq-length 300: --fp8-format hybrid needs a multiple of 16; use 304",
        ),
        ({"save_retain_interval": 2}, r"--save-retain-interval 2: not available yet"),
        ({"mm_patch_merge_type": "spatial"}, r"--mm_patch_merge_type spatial: needs --image_aspect_ratio anyres"),
        ({"image_grid_pinpoints": "[(28, 56)]"}, r"--image_grid_pinpoints .*: --image_aspect_ratio pad cuts no tiles"),
        ({**ANYRES, "image_grid_pinpoints": "[(28, 50)]"}, r"no multiple of the tower's 28 pixels"),
        ({**ANYRES, "mm_dense_connector_type": "sti", "mm_patch_merge_type": "spatial"}, r"spatial: sti adds pooled"),
        ({**ANYRES, "model_max_length": 80}, r"--model_max_length 80: a picture takes up to 88 positions"),
        ({"model_max_length": 15}, r"--model_max_length 15: a picture takes up to 16 positions"),
    ],
)
def test_contradictions_are_refused(check, more, message):
    with pytest.raises(UserError, match=message):
        check(**more)


def test_the_data_config_follows_model_and_flags(check, workspace):
    checked = check(mm_dense_connector_type="sti", seed=7)
    config = data_plan.data_config(checked)
    assert (config.tiling.tile_tokens, config.seq_length, config.model_max_length) == (16 + 2 * 2, 128, 128)
    assert config.vocab_size == checked.language.vocab_size == 1003
    assert (config.tokenizer_path, config.image_aspect_ratio, config.seed) == (workspace["llama"], "pad", 7)


def test_anyres_comes_with_the_defaults_of_llava(check):
    tiling = check(**ANYRES).tiling
    assert tiling.pinpoints == ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
    assert (tiling.merge, tiling.most_tokens) == ("spatial_unpad", 16 + 8 * 9)
    assert check(**ANYRES, mm_dense_connector_type="sti").tiling.merge == "flat"
    chosen = check(**ANYRES, image_grid_pinpoints="[(56, 28)]", mm_patch_merge_type="spatial").tiling
    assert (chosen.pinpoints, chosen.merge) == (((56, 28),), "spatial")


def test_where_the_index_lies(check, tmp_path, monkeypatch):
    settings = check().settings
    assert run.index_folder(settings) == str(tmp_path / "run" / "index")
    assert run.index_folder(replace(settings, index_folder="here")) == "here"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    nowhere = run.index_folder(replace(settings, output_dir=""))
    assert nowhere.startswith(str(tmp_path / "cache"))
    assert run.index_folder(replace(settings, output_dir="", data_path=("other.json",))) != nowhere


def test_the_plan_hash_follows_index_and_rows():
    first = data_plan.plan_hash("key", "rows")
    assert len({first, data_plan.plan_hash("other key", "rows"), data_plan.plan_hash("key", "other rows")}) == 3


def test_a_changed_plan_is_refused_only_where_the_position_counts(check):
    settings = check().settings
    resuming = Start([], [], loads=True, resumes=True, plan_hash="old")
    with pytest.raises(UserError, match=r"pictures found.*not those the checkpoint.*--load DIR --finetune"):
        data_plan.refuse_changed_plan(resuming, "new", settings)
    data_plan.refuse_changed_plan(resuming, "old", settings)
    data_plan.refuse_changed_plan(replace(resuming, plan_hash=None), "new", settings)  # saved without a hash
    data_plan.refuse_changed_plan(replace(resuming, resumes=False), "new", settings)


def test_the_resolved_config_is_plain_json(check):
    content = json.loads(json.dumps(run.resolved(check(), ["--num-layers", "4"])))
    assert content["megatron_argv"] == ["--num-layers", "4"]
    assert content["language"]["hidden_size"] == 64
    assert content["settings"]["version"] == "v1"
