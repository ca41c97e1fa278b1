"""Whether the optimizer's part of a checkpoint is laid out as the run that resumes it reads it."""

from __future__ import annotations

from dc_megatron.errors import UserError
from dc_megatron.training.resume import Start
from dc_megatron.weights.torch_dist_tree import TorchDistTree

_KIND = "distrib_optim_sharding_type"


def refuse_other_layout(start: Start, distributed: bool) -> None:
    """UserError where one of the two runs has the distributed optimizer (or Megatron-FSDP) and the other has not.

    Stage 1 has none by default. A tree that does not say is left to the engine.
    """
    if not start.resumes:
        return
    about = TorchDistTree(start.tree).common_state().get("content_metadata")
    if about is None or (_KIND in about) == distributed:
        return
    advice = "go on without the two" if distributed else "add one of them"
    raise UserError(
        f"{start.tree}: its optimizer was saved with{'out' if distributed else ''} --use-distributed-optimizer, which"
        f" --use-megatron-fsdp includes; {advice}, or take the weights alone: --load {start.folder} --finetune, into"
        " another --output_dir"
    )
