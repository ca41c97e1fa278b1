"""Words on the command line -> settings and Megatron's words."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict

import pytest

from dc_megatron.errors import UserError
from dc_megatron.training.argv import REQUIRED_FOR_TRAINING, translate
from dc_megatron.training.flag_help import requested_help
from dc_megatron.training.flag_table import AVAILABLE, FLAGS

# The launch lines of LLaVA-1.5 / DenseConnector, stage 2, as their users have them in scripts.
LAUNCH_LINE = shlex.split("""
--deepspeed ./scripts/zero3.json --model_name_or_path ./ckpt/vicuna-7b-v1.5 --version v1 --data_path ./mix665k.json
--image_folder ./images --vision_tower openai/clip-vit-large-patch14-336 --pretrain_mm_mlp_adapter ./mm_projector.bin
--mm_projector_type mlp2x_gelu --mm_dense_connector_type dci --mm_vision_select_layer -2 --mm_use_im_start_end False
--mm_use_im_patch_token False --image_aspect_ratio pad --group_by_modality_length True --bf16 True
--output_dir ./checkpoints --num_train_epochs 1 --per_device_train_batch_size 16 --per_device_eval_batch_size 4
--gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy steps --save_steps 50000 --save_total_limit 1
--learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True
--model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
--report_to tensorboard
""")


def settings(line: str):
    return translate(line.split()).settings


def engine(line: str) -> list[str]:
    return translate(line.split()).megatron_argv


def value_of(words: list[str], option: str) -> str:
    assert words.count(option) == 1, words
    return words[words.index(option) + 1]


def test_the_originals_launch_line_is_understood():
    result = translate(LAUNCH_LINE, required=REQUIRED_FOR_TRAINING)
    got = result.settings
    assert (got.version, got.image_aspect_ratio, got.mm_vision_select_layer) == ("v1", "pad", -2)
    assert (got.learning_rate, got.warmup_ratio, got.weight_decay) == (2e-5, 0.03, 0.0)
    assert (got.per_device_train_batch_size, got.save_steps, got.bf16) == (16, 50000, True)
    assert got.trainable == ("connector", "llm")
    assert value_of(result.megatron_argv, "--recompute-granularity") == "full"
    assert "--data-path" not in result.megatron_argv
    # Its batches of one modality and alike lengths are the original's, so they are not packed.
    assert (got.group_by_modality_length, got.packing) == (True, "none")
    assert any(note.startswith("--packing none") for note in result.notes)
    for ignored in ("deepspeed", "save_total_limit", "tf32", "lazy_preprocess"):
        assert any(note.startswith(f"--{ignored} ") for note in result.notes), ignored


def test_defaults_are_the_tables_and_the_recipe_is_pinned():
    got = settings("")
    for flag in FLAGS:
        if flag.status == AVAILABLE and flag.key != "trainable":
            assert getattr(got, flag.key) == flag.default
    words = engine("")
    pinned = {"--adam-beta1": 0.9, "--adam-beta2": 0.999, "--adam-eps": 1e-8, "--weight-decay": 0.0, "--min-lr": 0.0}
    for option, value in (pinned | {"--clip-grad": 1.0}).items():
        assert float(value_of(words, option)) == value
    assert "--calculate-per-token-loss" in words
    assert "--calculate-per-token-loss" not in engine("--loss-reduction microbatch")


@pytest.mark.parametrize("more", ["", " --trainable connector,lora", " --freeze_backbone True"])
def test_adapters_leave_the_language_model_alone(more):
    got = settings("--lora_enable True --lora_r 128 --lora_alpha 256" + more)
    assert (got.trainable, got.lora_r, got.lora_alpha, got.lora_dropout) == (("connector", "lora"), 128, 256, 0.05)
    assert settings("--lora_enable False --lora_r 128").trainable == ("connector", "llm")


def test_settings_are_primitives():
    assert json.loads(json.dumps(asdict(settings("--tune_mm_mlp_adapter True"))))["trainable"] == ["connector"]


@pytest.mark.parametrize(
    "line", ["--data_path d --max_steps 7", "--data-path d --max-steps=7", "--data_path=d --train-iters 7"]
)
def test_names_in_both_cases_with_and_without_equals(line):
    assert (settings(line).data_path, settings(line).max_steps) == (("d",), 7)


@pytest.mark.parametrize(
    ("line", "on"),
    [("--bf16", True), ("--bf16 True", True), ("--bf16=true", True), ("--bf16 False", False), ("", False)],
)
def test_switches_with_and_without_a_value(line, on):
    assert settings(line).bf16 is on
    assert engine(line).count("--bf16") == on
    assert engine(line + " --save x").count("--bf16") == on


def test_the_last_of_several_counts_whatever_its_name():
    got = translate(shlex.split("--output_dir a --lr 1 --learning_rate 2 --save b --bf16 --bf16 False"))
    assert (got.settings.output_dir, got.settings.learning_rate, got.settings.bf16) == ("b", 2.0, False)
    assert value_of(got.megatron_argv, "--lr") == "2.0"


def test_the_engines_flags_pass_through():
    words = engine(
        "--use_distributed_optimizer --overlap-grad-reduce True --recompute-modules core_attn mlp --ddp-bucket-size=7"
    )
    assert words[words.index("--recompute-modules") :][:3] == ["--recompute-modules", "core_attn", "mlp"]
    assert {"--use-distributed-optimizer", "--overlap-grad-reduce"} <= set(words)
    assert "True" not in words
    assert value_of(words, "--ddp-bucket-size") == "7"
    assert "--overlap-grad-reduce" not in engine("--overlap-grad-reduce --overlap-grad-reduce False")
    assert "--override-opt_param-scheduler" in engine("--override-opt_param-scheduler")


def test_the_users_recompute_flags_replace_gradient_checkpointing():
    words = engine("--gradient_checkpointing True --recompute-granularity selective")
    assert value_of(words, "--recompute-granularity") == "selective"
    assert "--recompute-method" not in words


def test_megatrons_constant_keeps_its_warm_up():
    assert settings("--lr-decay-style constant").lr_scheduler_type == "constant_with_warmup"
    assert settings("--lr_scheduler_type constant").lr_scheduler_type == "constant"


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("", ("connector", "llm")),
        ("--trainable connector", ("connector",)),
        ("--trainable llm,connector", ("connector", "llm")),
        ("--tune_mm_mlp_adapter True", ("connector",)),
        ("--freeze_backbone True --trainable connector", ("connector",)),
        ("--tune_mm_mlp_adapter False --trainable connector,llm", ("connector", "llm")),
        ("--trainable vision_tower,llm,connector", ("connector", "llm", "vision_tower")),
        ("--unfreeze_mm_vision_tower True", ("connector", "llm", "vision_tower")),
        ("--unfreeze_mm_vision_tower True --tune_mm_mlp_adapter True", ("connector", "vision_tower")),
        ("--unfreeze_mm_vision_tower False", ("connector", "llm")),
    ],
)
def test_what_learns(line, parts):
    assert settings(line).trainable == parts


@pytest.mark.parametrize(
    ("line", "rates"),
    [
        ("", {}),
        ("--lr 1e-3 --mm_projector_lr 1e-3", {}),
        (
            "--mm_projector_lr 2e-5 --vision_tower_lr 2e-6 --unfreeze_mm_vision_tower True",
            {"connector": 2e-5, "vision_tower": 2e-6},
        ),
        ("--mm-projector-lr 0 --trainable connector", {"connector": 0.0}),
    ],
)
def test_parts_with_a_rate_of_their_own(line, rates):
    assert settings(line).own_rates == rates
    assert not any("projector-lr" in word or "tower-lr" in word for word in engine(line))


def test_uneven_pipeline_is_noticed():
    assert settings("--decoder-first-pipeline-num-layers 3").uneven_pipeline
    assert not settings("--pipeline-model-parallel-size 2").uneven_pipeline


def test_tensorboard_folder():
    assert value_of(engine("--output_dir runs/x/"), "--tensorboard-dir") == "runs/x/tensorboard"
    assert value_of(engine("--output_dir x --logging_dir y"), "--tensorboard-dir") == "y"
    assert "--tensorboard-dir" not in engine("--output_dir x --report_to none")


def test_a_shorter_row_shortens_the_samples_with_a_note():
    result = translate(["--seq-length", "512"])
    assert result.settings.model_max_length == 512
    assert any("512" in note for note in result.notes)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--lerning_rate 1", "--lerning_rate did you mean '--learning_rate'"),
        ("--tensor_model_paralel_size 2", "did you mean '--tensor-model-parallel-size'"),
        ("--learning 1", "--learning unknown flag"),  # an abbreviation
        ("--version vicuna", "--version vicuna one of: plain, v1"),
        ("--version", "--version a value is missing plain"),
        ("--mm_dense_connector_type dcl", "did you mean 'dci'"),
        ("--max_steps many", "--max_steps many whole number"),
        ("--seed 1.5", "--seed 1.5 whole number"),
        ("--ddp-bucket-size big", "--ddp-bucket-size big whole number"),
        ("--ddp-bucket-size", "--ddp-bucket-size a value is missing"),
        ("--recompute-granularity ful", "did you mean 'full'"),
        ("stray --seed 1", "stray a value without a flag"),
        ("--seed 1 2", "2 a value without a flag after 1"),
        ("--overlap-grad-reduce=7", "--overlap-grad-reduce takes no value"),
        ("--packing best", "--packing best unknown did you mean best-fit"),
        ("--packing best-fit --group_by_modality_length True", "--group_by_modality_length contradicts --packing"),
        ("--group_by_modality_length True --data-order sequential", "contradicts --data-order sequential"),
        ("--micro-batch-size 4", "--micro-batch-size 4 a micro-batch is one row --seq-length --packing none"),
        ("--image-decode-device gpu --image-backend pil", "--image-decode-device gpu contradicts --image-backend pil"),
        ("--video-frames 0", "--video-frames 0 must be above 0"),
        ("--mm_patch_merge_type spatial_unpadded", "did you mean 'spatial_unpad'"),
        ("--report_to wandb", "wandb not available yet"),
        ("--save_strategy epoch", "epoch not available yet"),
        ("--lora-r 128", "--lora_r 128 add --lora_enable True"),
        ("--lora_weight_path x", "--lora_weight_path x add --lora_enable True"),
        ("--lora_enable True --lora_r 0", "--lora_r 0 above 0"),
        ("--lora_enable True --lora_dropout 1", "--lora_dropout 1.0 below 1"),
        ("--lora_enable True --lora_bias all", "--lora_bias all not available none"),
        ("--lora_enable True --trainable connector,llm", "--trainable connector,llm contradicts --lora_enable True"),
        ("--lora_enable True --tune_mm_mlp_adapter True", "--tune_mm_mlp_adapter True contradicts --lora_enable True"),
        ("--trainable connector,lora", "--trainable connector,lora add --lora_enable True"),
        ("--lora_enable True --trainable connector", "--trainable connector contradicts --trainable connector,lora"),
        ("--mm_use_im_start_end", "--mm_use_im_start_end True not available yet"),
        ("--bits 4", "--bits 4 not available yet"),
        ("--trainable llm", "the connector always learns; use connector,llm"),
        ("--trainable vision_tower,llm", "the connector always learns; use connector,vision_tower,llm"),
        ("--unfreeze_mm_vision_tower True --trainable connector", "contradicts --unfreeze_mm_vision_tower True"),
        (
            "--unfreeze_mm_vision_tower False --trainable connector,vision_tower",
            "contradicts --unfreeze_mm_vision_tower False",
        ),
        ("--vision_tower_lr 1e-6", "--vision_tower_lr 1e-06 add vision_tower to --trainable"),
        ("--mm_projector_lr -1", "--mm_projector_lr -1.0 must not be negative"),
        (
            "--mm_projector_lr 1e-3 --lr-warmup-init 1e-4",
            "--lr-warmup-init 1e-4 cannot be given beside --mm_projector_lr",
        ),
        (
            "--trainable connector,vision_tower --vision-tower-stages all",
            "stages all takes the vision tower for frozen",
        ),
        ("--trainable conector", "unknown part 'conector' did you mean 'connector'"),
        ("--trainable connector,llm --tune_mm_mlp_adapter True", "contradicts --tune_mm_mlp_adapter"),
        ("--trainable connector,llm --freeze_backbone", "contradicts --freeze_backbone"),
        ("--bf16 --fp16", "--bf16 --fp16 choose one"),
        ("--model_max_length 2048 --seq-length 1024", "2048 longer than --seq-length 1024"),
        ("--min-lr 1 --lr 0.1", "--min-lr 1.0 above --learning_rate 0.1"),
        ("--train-iters 0", "--train-iters 0 above 0"),
        ("--warmup_ratio 3", "--warmup_ratio 3.0 from 0 to 1"),
        ("--weight-decay -1", "--weight-decay -1.0 negative"),
        ("--train-data-path x", "--train-data-path x --data_path"),
        ("--mock-data", "--mock-data --data_path"),
        ("--tokenizer-type GPT2BPETokenizer", "--model_name_or_path"),
        ("--context-parallel-size 0", "--context-parallel-size 0 above 0"),
        ("--context-parallel-size 2 --packing none", "--context-parallel-size 2 --packing none --packing best-fit"),
        ("--context-parallel-size 2 --group_by_modality_length True", "--context-parallel-size 2 --packing best-fit"),
        ("--context-parallel-size 2 --vision-tower-stages all", "--vision-tower-stages all leave it out"),
        ("--context-parallel-size 2 --log-images 3", "--log-images 3 --context-parallel-size 2"),
        ("--cp-comm-type p2p", "--cp-comm-type p2p --context-parallel-size"),
        ("--eval-iters 3", "--eval-iters --eval_data_path FILE"),
        ("--eval_steps 3", "--eval_steps --eval_data_path FILE"),
        ("--evaluation_strategy steps", "--evaluation_strategy steps --eval_data_path FILE"),
        ("--eval_strategy epoch", "--eval_strategy epoch not available yet --eval_steps"),
        ("--eval_data_path v --evaluation_strategy no", "no contradicts --eval_data_path"),
        ("--evaluation_strategy no --eval_strategy steps", "two names differ"),
        ("--eval_data_path v --eval-iters -1", "--eval-iters -1 negative"),
        ("--eval_data_path v --eval-interval 0", "--eval-interval 0 above 0"),
        ("--full-validation", "--full-validation --eval_data_path"),
        ("--rampup-batch-size 1 2 3", "--rampup-batch-size 1 2 3 --global-batch-size"),
        ("--rampup-batch-size 1 2", "--rampup-batch-size a value is missing"),
    ],
)
def test_bad_flags_are_refused_with_one_message_that_helps(line, words):
    with pytest.raises(UserError) as refused:
        translate(line.split())
    message = str(refused.value)
    assert "\n" not in message
    for word in words.split():
        assert word in message, f"{word!r} is not in {message!r}"


@pytest.mark.parametrize(
    "line", ["--context-parallel-size 1 --packing none", "--eval-iters 0", "--bits 16", "--optim adamw_torch"]
)
def test_values_that_ask_for_what_happens_anyway_are_accepted(line):
    translate(line.split())


def test_required_settings():
    with pytest.raises(UserError, match=r"--version is missing: conversation template .*plain"):
        translate(shlex.split("--model_name_or_path m --vision_tower v --data_path d"), required=REQUIRED_FOR_TRAINING)


def test_given_tells_typed_flags_from_defaults():
    got = settings("--mm_dense_connector_type dci --lr 1e-3")
    assert got.given == ("mm_dense_connector_type", "learning_rate")


def test_help_is_asked_for_anywhere():
    assert requested_help(["--seed", "1"]) is None
    assert "usage" in requested_help(["--seed", "1", "--help"])
