"""The training program: ``torchrun ... -m dc_megatron.pretrain [flags]``. One process of many runs this file.

Checks first, in a tenth of a second and without torch; then Megatron's own engine with our model, data and flags.
"""

from __future__ import annotations

import os
import sys
import time

from dc_megatron.errors import UserError
from dc_megatron.training.flag_help import requested_help
from dc_megatron.training.run import check


def main(argv: list[str]) -> int:
    """Train as ``argv`` says; returns the exit status: 0, or 2 after a message about what the user can put right."""
    page = requested_help(argv)
    if page is not None:
        print(page)
        return 0
    try:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        checked = check(argv, world_size)
        if checked.settings.dry_run:
            from dc_megatron.training.dry_start import dry_run

            dry_run(checked, world_size)
        else:
            from dc_megatron.training.engine import train

            train(checked)
    except UserError as error:
        return _fail(error)
    return 0


def _fail(error: UserError) -> int:
    """One message for all ranks of a node.

    torchrun ends the other ranks once one has left, so rank 0 speaks at once; another rank speaks only if it is still
    there a moment later, which is when rank 0 has nothing to say.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank:
        time.sleep(3)
    where = f" (rank {os.environ.get('RANK', local_rank)})" if local_rank else ""
    print(f"error{where}: {error}", file=sys.stderr, flush=True)
    # Threads and process groups of a run that has ended must not hold up the exit.
    os._exit(2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
