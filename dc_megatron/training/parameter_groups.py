"""Which parameters learn at which rate and which of them decay: the groups of Megatron's optimizer.

The tower is no part of a group while it is frozen. A parameter is told by its name in the model, whatever wraps that.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, ParamKey, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import nn

# Parameters with one dimension that are neither a bias nor of a norm, so that Hugging Face's Trainer decays them.
_DECAYING_VECTORS = ("image_newline", "class_embedding")


def part_of(name: str) -> str:
    """``vision_tower``, ``connector`` (image_newline with it) or ``llm``, as ``--trainable`` names them."""
    path = name.split(".")
    if "vision_tower" in path:
        return "vision_tower"
    return "connector" if "connector" in path or path[-1] == "image_newline" else "llm"


def decays(parameter: nn.Parameter, name: str) -> bool:
    """Whether weight decay acts on a parameter: not on biases and norms.

    The rule of Hugging Face's Trainer, which LLaVA's has too (``get_decay_parameter_names``). Megatron's own leaves out
    everything with one dimension: ``image_newline`` and CLIP's class embedding as well.
    """
    if name.endswith(".bias"):
        return False
    return parameter.ndim > 1 or name.rpartition(".")[2] in _DECAYING_VECTORS


def group_overrides(
    config: OptimizerConfig,
    rates: dict[str, float],
    given: dict[ParamKey, ParamGroupOverride] | None = None,
) -> dict[ParamKey, ParamGroupOverride]:
    """``config_overrides`` of megatron-core's ``get_megatron_optimizer``, made of its own (by default the usual ones).

    rates: peak learning rate of the parts of the model (see ``part_of``) that have one of their own. Their schedule is
    that of ``config.lr``, scaled: Megatron's ends at a rate that is given, so that one is scaled with the peak.
    """
    (skipping, change), *others = (given or get_standard_config_overrides(config)).items()
    assert change == {"wd_mult": 0.0}, "megatron-core's first override is not the one on weight decay any more"
    if not config.apply_wd_to_qk_layernorm:
        rule = ParamWithNamePredicate("biases_and_norms", lambda parameter, name: not decays(parameter, name))
        skipping = ParamKey(with_name_predicate=rule)
    overrides = {skipping: change, **dict(others)}
    for part, rate in rates.items():
        # The same rate is the same group: two that differ in nothing would take each other's place on loading.
        if rate == config.lr:
            continue
        lowest = (config.min_lr or 0.0) * rate / config.lr if config.lr else 0.0
        belongs = ParamWithNamePredicate(part, lambda parameter, name, part=part: part_of(name) == part)
        overrides[ParamKey(with_name_predicate=belongs)] = ParamGroupOverride(max_lr=rate, min_lr=lowest)
    return overrides


def present_rates(groups: Sequence[dict], base: float, rates: dict[str, float]) -> tuple[float | None, dict]:
    """The learning rates of now: of what has none of its own (None: there is no such group), and part by part."""
    by_peak = {group["max_lr"]: float(group["lr"]) for group in groups if "lr" in group}
    return by_peak.get(base), {part: by_peak[rate] for part, rate in rates.items() if rate in by_peak}


def fill_moments(optimizer: MegatronOptimizer | None) -> None:
    """Give Adam, where there is one, the zero moments that it makes in its first step, where none was taken yet.

    In fp16 the first steps may all overflow and be skipped; megatron-core's distributed optimizer then finds nothing
    where it looks for moments to save, and the run would end there.
    """
    parts = [] if optimizer is None else getattr(optimizer, "chained_optimizers", [optimizer])
    for part in parts:
        if part.optimizer is not None and not part.optimizer.state and part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)
