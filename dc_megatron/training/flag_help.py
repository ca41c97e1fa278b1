"""The help page: our table, grouped; the engine's own page on request."""

from __future__ import annotations

import textwrap

from dc_megatron.training.flag_table import AVAILABLE, FLAGS, OTHER, Flag

_INTRODUCTION = """\
usage: python -m dc_megatron.pretrain [flags]      (one process of many: start it with torchrun or examples/*.sh)

Trains a Dense Connector model. Flags of LLaVA and of Megatron are both understood, in snake_case and kebab-case.

example, stage 1 on two processes:
  torchrun --nproc-per-node 2 -m dc_megatron.pretrain --tensor-model-parallel-size 2 \\
    --model_name_or_path checkpoints/vicuna-7b-v1.5 --vision_tower checkpoints/clip-vit-large-patch14-336 \\
    --version plain --data_path data/pretrain.json --image_folder data/images --trainable connector \\
    --per_device_train_batch_size 8 --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_ratio 0.03 \\
    --bf16 True --output_dir runs/stage1
"""
_END = """\
--help shows this page; --help-megatron shows the 800 flags of the engine (takes seconds). They work as they do there;
the few that make no sense here are refused with the reason."""


def _entry(flag: Flag) -> str:
    name = f"--{flag.name}"
    if flag.engine and flag.engine[2:].replace("-", "_") != flag.key:
        name += f", {flag.engine}"
    if flag.status != AVAILABLE:
        text = f"{flag.status}: {flag.help}"
    else:
        kind = "{" + ",".join(flag.choices) + "}" if flag.choices else {bool: "[True|False]"}.get(flag.type, "")
        name += f" {kind}" if kind else ""
        text = flag.help if flag.default in (None, "", ()) else f"{flag.help} (default: {flag.default})"
        if flag.refused:
            text += f"; not available yet: {', '.join(flag.refused)}"
    return "\n".join(["  " + name, textwrap.fill(text, 108, initial_indent=" " * 6, subsequent_indent=" " * 6)])


def help_text() -> str:
    """The page of ``--help``."""
    parts = [_INTRODUCTION]
    for group in dict.fromkeys(flag.group for flag in FLAGS):
        entries = [_entry(flag) for flag in FLAGS if flag.group == group]
        if group == OTHER:
            group += ", or may only say what happens anyway"
        parts.append("\n".join([f"{group}:", *entries, ""]))
    return "\n".join([*parts, _END])


def _megatron_help() -> str:
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments

    parser = ArgumentParser(prog="dc_megatron.pretrain", allow_abbrev=False, add_help=False)
    return (
        "Flags of Megatron's engine. --help shows the flags of this program; where a name is in both, --help counts.\n"
        + add_megatron_arguments(parser).format_help()
    )


def requested_help(argv: list[str]) -> str | None:
    """The page that ``argv`` asks for, or None."""
    if "--help-megatron" in argv or "--help_megatron" in argv:
        return _megatron_help()
    return help_text() if {"-h", "--help"} & set(argv) else None
