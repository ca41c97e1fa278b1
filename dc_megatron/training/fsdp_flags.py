"""Megatron-FSDP (ZeRO-3) on the command line: what it does not go with here, and what Megatron gets. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dc_megatron.errors import UserError

SWITCH = "--use-megatron-fsdp"
_STRATEGY = "--data-parallel-sharding-strategy"
_WHOLE = "optim_grads_params"
# Megatron's options that change how weights or states are kept: (option, reason).
_REFUSED = {
    "--num-distributed-optimizer-instances": "weights are divided over all data-parallel ranks",
    "--init-model-with-meta-device": "weights are read into the model before it is divided",
    "--use-precision-aware-optimizer": "checkpoints hold fp32 weights and states, which this optimizer does not keep",
    "--megatron-fsdp-main-params-dtype": "checkpoints hold fp32 weights and states",
    "--fp8-param-gather": "weights travel in bf16",
    "--overlap-param-gather-with-optimizer-step": "weights are gathered layer by layer",
}


def asks_for_fsdp(words: Collection[str]) -> bool:
    """Whether Megatron's options, ``words`` among them, divide the weights over data-parallel ranks."""
    return SWITCH in words


def refuse_impossible_fsdp(
    values: Mapping, engine: Mapping[str, list[str]], switched_off: Collection[str] = ()
) -> None:
    """UserError for flags that contradict Megatron-FSDP. values: of our flags; engine: Megatron's options as typed."""
    if not asks_for_fsdp(engine):
        return
    for flag, wanted, advice in (
        ("pipeline_model_parallel_size", values["pipeline_model_parallel_size"] > 1, "leave it out"),
        ("context_parallel_size", values["context_parallel_size"] > 1, "leave one of them out"),
        ("vision_tower_stages", values["vision_tower_stages"] == "all", "leave it out"),
        ("lora_enable", values["lora_enable"], "use --use-distributed-optimizer alone, adapters are small"),
        ("fp16", values["fp16"], "use --bf16 True"),
        ("fp8_format", values["fp8_format"] is not None, "leave it out to train in bf16"),
        ("recompute", values["recompute"] == "auto", "say --recompute none, selective or full"),
        ("dry_run", values["dry_run"], "leave --use-megatron-fsdp out: what it saves is not planned yet"),
    ):
        if wanted:
            name = flag if flag in ("lora_enable", "fp16") else flag.replace("_", "-")
            raise UserError(f"--{name} {values[flag]}: not available with {SWITCH}; {advice}")
    if "--use-distributed-optimizer" in switched_off:
        raise UserError(f"--use-distributed-optimizer False contradicts {SWITCH}, which goes beyond it; leave one out")
    for option, reason in _REFUSED.items():
        if option in engine:
            given = " ".join([option, *engine[option]])
            raise UserError(f"{given}: not available with {SWITCH}: {reason}; leave it out")
    if engine.get(_STRATEGY, [_WHOLE]) != [_WHOLE]:
        raise UserError(
            f"{_STRATEGY} {engine[_STRATEGY][0]}: {SWITCH} stands for {_WHOLE} here; leave it out, or use"
            " --use-distributed-optimizer alone, which divides the optimizer's part"
        )


def fsdp_words(words: Collection[str], cuda: bool) -> list[str]:
    """What Megatron gets in front of ``words`` where they ask for it. Fused accumulation is not tried with it."""
    if not asks_for_fsdp(words):
        return []
    ours = [_STRATEGY, _WHOLE, "--no-gradient-accumulation-fusion"]
    if "--grad-reduce-in-bf16" not in words:
        # As without it; Megatron-FSDP would add up bf16 gradients in bf16.
        ours += ["--megatron-fsdp-main-grads-dtype", "fp32"]
    if not cuda:
        # Gloo sums, and does nothing else on the way.
        ours.append("--no-gradient-reduce-div-fusion")
    return ours


def parsed_words(words: Collection[str]) -> list[str]:
    """What Megatron's parser gets behind ``words``.

    It insists on the checkpoint format of its own Megatron-FSDP, and is given another one when it has parsed: trees are
    the same torch_dist ones as those of any other run (see ``fsdp_state.py``).
    """
    return ["--ckpt-format", "fsdp_dtensor"] if asks_for_fsdp(words) else []
