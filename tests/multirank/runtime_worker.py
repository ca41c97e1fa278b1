"""What ranks do for the tests of the runtime: install and take out the patches, save and load checkpoints."""

from __future__ import annotations

import inspect
import queue
import threading
import time
from functools import partial

import torch

from dc_megatron.runtime import parallel, patches
from dc_megatron.runtime.adam import GroupStepAdam
from tests.multirank.job import Job
from tests.multirank.parity_worker import _named_tensors, build


def _current(target: str):
    holder, name = patches.resolve(target)
    return getattr(holder, name)


def table() -> list[dict]:
    """Rows of the patch table, with what the import system and the engine say about their targets."""
    rows = patches.CORE_ROWS + patches.TRAINING_ROWS
    found = []
    for row in rows:
        holder, name = patches.resolve(row.target)
        found.append(
            {
                "target": row.target,
                "condition": row.condition,
                "why": row.why,
                "exists": hasattr(holder, name),
                "known_condition": row.condition in patches.CONDITIONS,
            }
        )
    return found


def apply_and_undo() -> dict[str, list[str]]:
    """Targets that misbehave while the whole table is installed twice and taken out again; this rank's state stays."""
    targets = [row.target for row in patches.CORE_ROWS + patches.TRAINING_ROWS]
    patches.undo()
    try:
        originals = {target: _current(target) for target in targets}
        first = patches.apply(training=True)
        patched = {target: _current(target) for target in first}
        second = patches.apply(training=True)
        report = {
            "targets": targets,
            "applied": first,
            "not replaced": [t for t in first if patched[t] is originals[t]],
            "replaced twice": [t for t in first if _current(t) is not patched[t]],
            "applied the second time": second,
        }
        patches.undo()
        report["left behind"] = [t for t in targets if _current(t) is not originals[t]]
        return report
    finally:
        patches.apply()


def applied_under(**holds: bool) -> dict[str, list[str]]:
    """Targets that are patched, without and with megatron.training's, where the conditions hold as told."""
    patches.undo()
    conditions = dict(patches.CONDITIONS)
    try:
        patches.CONDITIONS.update({name: lambda value=value: value for name, value in holds.items()})
        core = patches.apply()
        whole = patches.apply(training=True)
        return {"core": core, "whole": whole}
    finally:
        patches.undo()
        patches.CONDITIONS.update(conditions)
        patches.apply()


def signatures() -> dict[str, list[str]]:
    """Names of the parameters of the functions that are replaced by ones with parameters of their own."""
    patches.undo()
    try:
        targets = (
            "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
            "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
            "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
            "megatron.training.training:initialize_megatron",
        )
        return {target.split(":")[1]: list(inspect.signature(_current(target)).parameters) for target in targets}
    finally:
        patches.apply()


def effects() -> dict[str, bool]:
    """What megatron-core finds where it looks for CUDA, on this rank as patched."""
    from megatron.core import optimizer
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.tensor_parallel import random

    where = torch.cuda.current_device()
    state = random._get_cuda_rng_state(device="cuda", clone=True, graph_safe=False)
    first = torch.rand(2)
    random._set_cuda_rng_state(state, device=-1, graph_safe=False)
    again = torch.rand(2)
    return {
        "a tensor on the current device": torch.zeros(2, device=where).device.type == "cpu",
        "a tensor on cuda": torch.tensor([1], device="cuda").device.type == "cpu",
        "a tensor moved": torch.zeros(1).to("cuda", torch.bfloat16).dtype == torch.bfloat16,
        "a module moved": torch.nn.Linear(1, 1).cuda(0).weight.device.type == "cpu",
        "a random state that comes back": torch.equal(first, again),
        "the type of a parameter": torch.zeros(1).type() == "torch.cuda.FloatTensor",
        "a queue in this process": isinstance(filesystem_async.get_write_results_queue(), queue.Queue),
        "Adam with steps in the group": optimizer.Adam is GroupStepAdam,
        "a distributed optimizer for it": distrib_optimizer.HAVE_APEX_OR_TE and distrib_optimizer.USING_APEX_OPTIMIZER,
        "torch still knows there is no CUDA": not torch.cuda.is_available(),
    }


def saved_beside_a_step() -> list[float]:
    """What the writer of an asynchronous save sees of a tensor that changes once the save has been scheduled."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    parallel.start()
    weight, changed, written = torch.zeros(3), threading.Event(), []
    buckets = [("file", "key", ([], [("item", weight)]))]

    def write(rank, given, results) -> None:
        changed.wait()
        written.extend(given[0][2][1][0][1].tolist())

    calls = AsyncCallsQueue(persistent=True)
    preload = partial(FileSystemWriterAsync.preload_tensors, buckets, True)
    finalized: list[str] = []
    calls.schedule_async_request(
        AsyncRequest(write, (0, buckets, None), [lambda: finalized.append("once")], {}, preload)
    )
    assert calls.maybe_finalize_async_calls() == [], "it is finished before anything was written"
    weight.fill_(1.0)
    changed.set()
    assert calls.maybe_finalize_async_calls(blocking=True) == [0]
    assert (finalized, calls.get_num_unfinalized_calls()) == (["once"], 0)
    calls.close()
    return written


def _sharded_entries(state) -> dict[str, tuple]:
    """Key -> global shape of the sharded entries in a nested state."""
    from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensorFactory

    if isinstance(state, dict):
        return {key: shape for value in state.values() for key, shape in _sharded_entries(value).items()}
    if isinstance(state, list | tuple):
        return {key: shape for value in state for key, shape in _sharded_entries(value).items()}
    if isinstance(state, ShardedTensorFactory):
        return _sharded_entries(state.build())
    return {state.key: tuple(state.global_shape)} if isinstance(state, ShardedBase) else {}


def _start(job: Job) -> list:
    parallel.start(job.tensor, job.pipeline, job.virtual)
    return build(job)[1]


def keys(job: Job) -> dict[str, tuple]:
    """Keys and global shapes of the checkpoint entries of this rank."""
    return _sharded_entries([chunk.sharded_state_dict() for chunk in _start(job)])


def save(job: Job, folders: list[str]) -> list[float]:
    """Save the model of ``job`` to each of ``folders``; the seconds that each took."""
    from megatron.core import dist_checkpointing

    (model,) = _start(job)
    seconds = []
    for folder in folders:
        torch.distributed.barrier()
        begin = time.perf_counter()
        dist_checkpointing.save({"model": model.sharded_state_dict()}, folder)
        torch.distributed.barrier()
        seconds.append(time.perf_counter() - begin)
    return seconds


def load(job: Job, folder: str) -> dict:
    """A model of ``job`` whose weights were wiped out and then loaded from ``folder``, as ``parity.merge`` wants it."""
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as mpu

    (model,) = _start(job)
    tower = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("vision_tower."):
                parameter.fill_(-7.0)
        if model.vision_tower is not None:
            tower = {name: value.clone() for name, value in model.vision_tower.state_dict().items()}
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, folder)
    model.load_state_dict(state["model"])
    untouched = tower is None or all(torch.equal(v, tower[n]) for n, v in model.vision_tower.state_dict().items())
    return {
        "tensor_rank": mpu.get_tensor_model_parallel_rank(),
        "data_rank": mpu.get_data_parallel_rank(),
        "parameters": _named_tensors([model], lambda parameter: parameter),
        "tower_untouched": untouched,
    }
