"""Starts a dry run: decides what the process is before anything imports the engine."""

from __future__ import annotations

import os

from dc_megatron.training.run import Checked


def dry_run(checked: Checked, world_size: int) -> None:
    """Rehearse the job of ``world_size`` processes and print what came of it. UserError as ``rehearse``.

    One process is enough for a job of any size: of a launcher's processes all but the first return at once.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        return
    # No GPU is asked for, also where there is one.
    os.environ["DC_DEVICE"] = "cpu"
    from dc_megatron.runtime import patches

    patches.apply(training=True)
    from dc_megatron.training.dry_report import as_text
    from dc_megatron.training.dry_run import rehearse

    print(as_text(checked, rehearse(checked, world_size), world_size))
