"""The flag table: a frozen set of names, and who reads each name that Megatron has as well."""

from __future__ import annotations

import dataclasses
import shlex

import pytest

from dc_megatron.training.engine_flags import NEUTRAL, REFUSED, engine_flags
from dc_megatron.training.flag_help import help_text
from dc_megatron.training.flag_table import AVAILABLE, FLAGS, NO_MEANING, NOT_YET, flags_by_key
from dc_megatron.training.settings import RunSettings

# Scripts of users depend on these names: one that goes or comes is a change to announce in the CHANGELOG.
AVAILABLE_NAMES = shlex.split("""
model_name_or_path vision_tower mm_dense_connector_type mm_projector_type mm_vision_select_layer
mm_vision_select_feature pretrain_mm_mlp_adapter data_path image_folder version image_aspect_ratio
image_grid_pinpoints mm_patch_merge_type model_max_length
seq_length packing group_by_modality_length video_frames data_order image_backend image_decode_device
max_bad_sample_rate index_folder
dataloader_num_workers seed trainable
tune_mm_mlp_adapter freeze_backbone unfreeze_mm_vision_tower
lora_enable lora_r lora_alpha lora_dropout lora_weight_path lora_bias
num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps
global_batch_size micro_batch_size loss_reduction gradient_checkpointing recompute bf16 fp16
fp8_format fp8_recipe fp8_check_interval learning_rate mm_projector_lr vision_tower_lr min_lr
lr_scheduler_type warmup_ratio warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm output_dir
load verify_checkpoint save_steps save_strategy logging_steps report_to logging_dir log_images dry_run
eval_data_path eval_image_folder evaluation_strategy eval_strategy eval_steps eval_iters
tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size sequence_parallel
pipeline_split vision_tower_stages
""")
EXPLAINED_NAMES = shlex.split("""
deepspeed per_device_eval_batch_size lazy_preprocess tf32
save_total_limit is_multimodal remove_unused_columns cache_dir run_name attn_implementation local_rank
overwrite_output_dir double_quant quant_type
""")
LATER_NAMES = shlex.split("""
mm_use_im_start_end mm_use_im_patch_token freeze_mm_mlp_adapter
bits optim resume_from_checkpoint
""")

# Names that both worlds know, and what happens to them. "as it is": read here and handed on under the same name or
# Megatron's. "computed": read here, what Megatron gets follows from it. "ours": Megatron's parser never gets it.
COLLISIONS = {
    "data_path": "ours",
    "local_rank": "ours",
    "seq_length": "computed",
    "global_batch_size": "computed",
    "micro_batch_size": "computed",
    "train_iters": "computed",
    "lr_decay_style": "computed",
    "lr_warmup_fraction": "computed",
    "lr_warmup_iters": "computed",
    "save": "computed",
    "save_interval": "computed",
    "tensorboard_dir": "computed",
    "num_workers": "as it is",
    "seed": "as it is",
    "bf16": "as it is",
    "fp16": "as it is",
    "fp8_format": "computed",
    "fp8_recipe": "computed",
    "lr": "as it is",
    "min_lr": "as it is",
    "weight_decay": "as it is",
    "adam_beta1": "as it is",
    "adam_beta2": "as it is",
    "adam_eps": "as it is",
    "clip_grad": "as it is",
    "load": "as it is",
    "log_interval": "as it is",
    "eval_interval": "computed",
    "eval_iters": "computed",
    "tensor_model_parallel_size": "as it is",
    "pipeline_model_parallel_size": "as it is",
    "context_parallel_size": "as it is",
    "sequence_parallel": "as it is",
}


def owner(key: str) -> str:
    flag = flags_by_key()[key]
    if flag.engine is None or flag.status != AVAILABLE:
        return "ours"
    return "as it is" if flag.handed_on else "computed"


def test_every_collision_has_its_owner():
    both = set(flags_by_key()) & set(engine_flags())
    assert {key: owner(key) for key in both} == COLLISIONS


@pytest.mark.parametrize(
    ("status", "names"), [(AVAILABLE, AVAILABLE_NAMES), (NO_MEANING, EXPLAINED_NAMES), (NOT_YET, LATER_NAMES)]
)
def test_the_set_of_flags_is_frozen(status, names):
    assert sorted(f.key for f in FLAGS if f.status == status) == sorted(names)


def test_settings_have_a_field_for_every_available_flag_and_only_primitives():
    fields = {f.name for f in dataclasses.fields(RunSettings)}
    assert fields == {f.key for f in FLAGS if f.status == AVAILABLE} | {"uneven_pipeline", "given"}


def test_engine_names_in_the_table_are_the_engines():
    for flag in FLAGS:
        if flag.engine:
            assert flag.engine in engine_flags()[flag.engine[2:].replace("-", "_")].spellings
    for name in [*REFUSED, *NEUTRAL]:
        assert name.replace("-", "_") in engine_flags(), name


def test_defaults_are_among_the_choices():
    for flag in FLAGS:
        if flag.choices and flag.default:
            assert flag.default in flag.choices
            assert flag.default not in flag.refused
        assert set(flag.refused) <= set(flag.choices or ())


def test_help_names_every_flag_and_both_names_of_a_shared_one():
    page = help_text()
    for flag in FLAGS:
        assert f"--{flag.name}" in page
    assert "--output_dir, --save" in page
    assert "not available yet: cls_patch" in page
    assert "--help-megatron" in page
    assert max(map(len, page.splitlines())) <= 120
