"""``--recompute`` and ``--pipeline-split`` on the command line: what contradicts them, what Megatron gets. No torch.

What ``auto`` stands for is decided where data and GPU are known: see ``auto_choices``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dc_megatron.errors import UserError
from dc_megatron.planner.memory import Recompute
from dc_megatron.planner.recompute import recompute_words
from dc_megatron.training.settings import RunSettings

# Megatron's options that divide the layers over the pipeline stages.
UNEVEN_PIPELINE = (
    "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
    "--pipeline-model-parallel-layout",
    "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split",
)
# What --recompute selective and full say; the others only add to it.
_GRANULARITY = ("--recompute-granularity", "--recompute-activations")


def refuse_contradicted_layout(values: Mapping, given: Collection[str], typed: Mapping[str, list[str]]) -> None:
    """UserError where two flags say how to recompute, or how to divide the layers. typed: Megatron's options."""
    if "recompute" in given:
        _refuse_contradicted_recompute(values["recompute"], values["gradient_checkpointing"], typed)
    if "pipeline_split" in given:
        what = f"--pipeline-split {values['pipeline_split']}"
        for name in UNEVEN_PIPELINE:
            if name in typed:
                raise UserError(
                    f"{what} beside {_spelled(name, typed)}: both divide the layers over the stages; leave one of them"
                    " out"
                )


def _refuse_contradicted_recompute(recompute: str, checkpointing: bool, typed: Mapping[str, list[str]]) -> None:
    what = f"--recompute {recompute}"
    if checkpointing and recompute != "full":
        raise UserError(
            f"{what} contradicts --gradient_checkpointing True, which is --recompute full; leave one of them out"
            " (--gradient_checkpointing False takes back a recipe's)"
        )
    for name in typed:
        if name in _GRANULARITY or (name.startswith("--recompute-") and recompute in ("none", "auto")):
            raise UserError(
                f"{what} beside {_spelled(name, typed)}: both say what is computed again; leave one of them out"
            )


def _spelled(name: str, typed: Mapping[str, list[str]]) -> str:
    return " ".join([name, *typed[name]])


def recompute_argv(settings: RunSettings, typed: Mapping[str, list[str]], notes: list[str]) -> list[str]:
    """Megatron's flags for what is computed again, without those that were typed; none yet for auto."""
    if settings.recompute in ("selective", "full"):
        selective = settings.recompute == "selective"
        words = recompute_words(Recompute(settings.recompute), all_layers=not selective)
        pairs = zip(words[::2], words[1::2], strict=True)
        return [word for name, value in pairs if name not in typed for word in (name, value)]
    if settings.gradient_checkpointing:
        if any(name.startswith("--recompute-") for name in typed):
            notes.append("--gradient_checkpointing True gives way to the --recompute-... flags")
        else:
            return list(recompute_words(Recompute("full"), all_layers=True))
    return []
