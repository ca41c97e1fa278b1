"""What ranks do for the tests of ``image_newline``'s life: built, saved, loaded at another layout, given by a file."""

from __future__ import annotations

import os

import torch

from dc_megatron.runtime import parallel
from tests.multirank.job import Job
from tests.multirank.parity_worker import build


def _first(job: Job):
    parallel.start(job.tensor, job.pipeline)
    _, (model,) = build(job)
    return model


def start(job: Job) -> torch.Tensor:
    """The vector as built, or as ``job`` fills it."""
    return _first(job).image_newline.detach()


def newline_state(job: Job, save: str, load: str) -> dict:
    """Load from ``load`` where given, add 1, save to ``save``; the vector before and after, and when it trains."""
    from megatron.core import dist_checkpointing

    from dc_megatron.inference.assemble import load_checkpoint

    model = _first(job)
    newline = model.image_newline
    found = {"start": None if newline is None else newline.detach().clone()}
    if load:
        load_checkpoint(model, load)
    found["loaded"] = None if newline is None else newline.detach().clone()
    if newline is not None:
        newline.data += 1
    if torch.distributed.get_rank() == 0:
        os.makedirs(save)
    torch.distributed.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, save)
    found["trained"] = {}
    for choice in ("connector", "connector,llm", "llm"):
        model.set_trainable(set(choice.split(",")))
        found["trained"][choice] = newline is not None and newline.requires_grad
    return found


def given_newline(job: Job) -> dict:
    """What the next two loads make of a vector that was given by a projector file."""
    model = _first(job)
    state = {n: v if v is None else v.clone() for n, v in model.state_dict_for_save_checkpoint().items()}
    state["image_newline"].fill_(3.0)
    without = {name: value for name, value in state.items() if name != "image_newline"}
    given = model.image_newline.detach().clone()
    model.newline_is_given = True
    key = "image_newline" in model.sharded_state_dict()
    model.load_state_dict(without)
    kept = torch.equal(model.image_newline, given)
    model.load_state_dict(state)
    counts = bool((model.image_newline == 3.0).all())
    try:
        model.load_state_dict(without)
        refused = False
    except RuntimeError as error:
        refused = "image_newline" in str(error)
    return {"key_while_given": key, "kept": kept, "the_next_load_counts": counts, "missing_is_refused": refused}
