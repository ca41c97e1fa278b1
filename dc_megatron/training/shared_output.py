"""Before anything is trained: do all ranks see the folder that a checkpoint's parts go to?"""

from __future__ import annotations

import os
import platform
import time
import uuid

import torch

from dc_megatron.errors import UserError

# A network file system may show a new file of another machine only after a while.
_PATIENCE_SECONDS = 15.0


def refuse_unshared_output(folder: str) -> None:
    """UserError on every rank where one of them does not see in ``folder`` what rank 0 writes there.

    A collective call. Every rank writes its part of a checkpoint; on disks of their own none of them would be whole.
    """
    rank = torch.distributed.get_rank()
    name: list = [f".dc-seen-by-all-{uuid.uuid4().hex}"]
    torch.distributed.broadcast_object_list(name, src=0)
    path = os.path.join(folder, name[0])
    if rank == 0:
        os.makedirs(folder, exist_ok=True)
        with open(path, "w", encoding="utf-8"):
            pass
    torch.distributed.barrier()
    blind: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(blind, None if _appears(path) else platform.node())
    if rank == 0:
        os.remove(path)
    unseeing = [f"{number} ({node})" for number, node in enumerate(blind) if node is not None]
    if unseeing:
        raise UserError(
            f"--output_dir {folder}: ranks {', '.join(unseeing[:8])} do not see what rank 0 writes there; parts of a"
            " checkpoint come from all nodes, so name a folder that all of them share (--index-folder and the data may"
            " lie on each node's own disk)"
        )


def _appears(path: str) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        # Looking the whole folder through makes NFS forget what it remembers of it.
        parent = os.path.dirname(path) or "."
        if os.path.isdir(parent) and os.path.basename(path) in os.listdir(parent):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
