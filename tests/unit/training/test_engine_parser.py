"""Against the engine itself: the frozen list, its parser, its checks and its schedule. The only slow imports here."""

from __future__ import annotations

import shlex
import sys
from types import SimpleNamespace

import pytest
import torch

from dc_megatron.training.arguments import backend_argv, engine_argv, plan_steps
from dc_megatron.training.argv import translate
from dc_megatron.training.engine_flags import FROZEN_LIST
from tests.helpers.freeze_megatron_flags import frozen_text
from tests.helpers.language_shapes import LLAMA

LINE = """
--output_dir o --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_ratio 0.03 --tensor-model-parallel-size 2
--sequence-parallel --model_max_length 255 --per_device_train_batch_size 2 --bf16 True --weight_decay 0.1
--gradient_checkpointing True --packing none --num_train_epochs 2 --use_distributed_optimizer --num-layers 4
--save_steps 7
"""


def test_the_frozen_list_is_the_installed_engines():
    """After a change of megatron-core: python -m tests.helpers.freeze_megatron_flags, and read the difference."""
    assert FROZEN_LIST.read_text(encoding="utf-8") == frozen_text()


@pytest.fixture
def engine_args(monkeypatch):
    """The engine's arguments after its own checks, for two processes on a GPU of the Hopper generation."""
    from megatron.training import arguments

    def parse(line: str):
        translation = translate(shlex.split(line))
        steps = plan_steps(translation.settings, 2000, 2)
        words = engine_argv(translation, LLAMA, steps, backend_argv(False, False, False))
        monkeypatch.setattr(sys, "argv", ["pretrain", *words])
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")  # rank 0 would print all arguments
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        monkeypatch.setattr(arguments, "get_device_arch_version", lambda: 9)
        args = arguments.parse_args()
        arguments.validate_args(args)
        return args

    return parse


def test_the_engine_takes_every_flag_and_reads_what_was_meant(engine_args):
    args = engine_args(LINE)
    got = (args.num_layers, args.ffn_hidden_size, args.kv_channels, args.num_query_groups, args.vocab_size)
    assert got == (4, 96, 16, 2, 1003)
    assert (args.normalization, args.swiglu, args.add_bias_linear, args.add_qkv_bias) == ("RMSNorm", True, False, False)
    assert (args.use_rope_scaling, args.rope_scaling_factor, args.rotary_base) == (True, 8.0, 500000)
    assert (args.seq_length, args.max_position_embeddings) == (256, 256)
    assert (args.micro_batch_size, args.global_batch_size, args.data_parallel_size) == (2, 4, 1)
    assert (args.train_iters, args.lr_warmup_iters, args.lr_decay_iters) == (500, 15, 500)
    assert (args.lr, args.min_lr, args.lr_decay_style, args.lr_warmup_init) == (1e-3, 0.0, "cosine", 0.0)
    assert (args.adam_beta1, args.adam_beta2, args.adam_eps, args.clip_grad) == (0.9, 0.999, 1e-8, 1.0)
    assert (args.start_weight_decay, args.end_weight_decay) == (0.1, 0.1)
    assert (args.params_dtype, args.calculate_per_token_loss) == (torch.bfloat16, True)
    assert (args.recompute_granularity, args.recompute_method, args.recompute_num_layers) == ("full", "uniform", 1)
    assert (args.save, args.save_interval, args.data_path, args.dataloader_type) == ("o", 7, None, "external")
    assert (args.hidden_dropout, args.attention_dropout, args.exit_signal.name) == (0.0, 0.0, "SIGUSR1")
    assert (args.transformer_impl, args.distributed_backend) == ("local", "gloo")


@pytest.mark.parametrize("style", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(("steps", "ratio"), [(40, 0.03), (50, 0.1), (20, 0.0), (1, 0.03)])
def test_the_engines_schedule_is_hugging_faces(style, steps, ratio):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from transformers import get_scheduler

    settings = translate(
        shlex.split(f"--max_steps {steps} --warmup_ratio {ratio} --lr_scheduler_type {style} --learning_rate 1e-3")
    ).settings
    plan = plan_steps(settings, None, 1)
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.learning_rate)
    hugging_face = get_scheduler(style, theirs, num_warmup_steps=-int(-ratio * steps // 1), num_training_steps=steps)
    ours = SimpleNamespace(param_groups=[{}])
    megatron = OptimizerParamScheduler(
        ours,
        init_lr=0.0,
        max_lr=settings.learning_rate,
        min_lr=settings.min_lr,
        lr_warmup_steps=plan.warmup_iters * plan.global_batch_size,
        lr_decay_steps=plan.decay_iters * plan.global_batch_size,
        lr_decay_style=style.removesuffix("_with_warmup"),
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=steps * plan.global_batch_size,
        wd_incr_style="constant",
    )
    for step in range(steps):
        expected = theirs.param_groups[0]["lr"]
        assert ours.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-12), f"step {step}"
        theirs.step()
        hugging_face.step()
        megatron.step(plan.global_batch_size)
