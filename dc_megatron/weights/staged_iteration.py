"""An iteration that is written beside its place and put there by one rename, when it is whole.

    DIR/.saving-iter_0000500.1f2e3d4c/                  what the engine takes for its --save meanwhile
    DIR/.saving-iter_0000500.1f2e3d4c/iter_0000500/     the iteration, until it is renamed to DIR/iter_0000500
    DIR/.saving-iter_0000500.1f2e3d4c/hashes/           of its files, where each rank's were written in the background
    DIR/.saving-iter_0000500.1f2e3d4c/replaced/         what had that name, where the two cannot change places at once

The mark behind the number is another one in every save: a background process that outlives its killed run never writes
into what the next run saves under the same number. Nothing half-made ever has an iteration's name, and an iteration
that is there is never written into. A folder ``.saving-*`` of a run that was killed stands for no iteration; the next
save removes it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict

from dc_megatron.weights import durable_files
from dc_megatron.weights.checkpoint_folder import iteration_folder, write_tracker
from dc_megatron.weights.durable_files import Digest, hash_file
from dc_megatron.weights.manifest import write_manifest

STAGING = ".saving-"
_REPLACED = "replaced"
_HASHES = "hashes"


class StagedIteration:
    """``root``: the engine's --save while it writes. ``path``: where it writes. ``place``: where that will lie.

    ``mark``: what tells this save from others of that number, the same on all ranks; letters and digits.
    """

    def __init__(self, folder: str, iteration: int, mark: str):
        self.folder, self.iteration = folder, iteration
        self.place = iteration_folder(folder, iteration)
        self.root = os.path.join(folder, f"{STAGING}{os.path.basename(self.place)}.{mark}")
        self.path = iteration_folder(self.root, iteration)

    def begin(self) -> None:
        """Make an empty ``root``. One rank calls it, before the others write."""
        clear_staging(self.folder)
        os.makedirs(self.root, exist_ok=True)

    def digests_of_rank(self, rank: int) -> dict[str, Digest]:
        """Name -> digest of the files that ``rank`` wrote, which are on disk then.

        The engine names them ``__{rank}_{number}.distcp``. Reading them back costs little: they are in memory still.
        """
        own = re.compile(rf"__{rank}_\d+\.distcp")
        return self._digests(name for name in os.listdir(self.path) if own.fullmatch(name))

    def write_and_hash(self, rank: int, write: Callable, *args, **kwargs) -> None:
        """``write(*args, **kwargs)``, and the digests of what ``rank`` wrote for ``take_digests``.

        Runs beside the training, in a thread or a process.
        """
        write(*args, **kwargs)
        hashes = os.path.join(self.root, _HASHES)
        os.makedirs(hashes, exist_ok=True)
        digests = {name: asdict(digest) for name, digest in self.digests_of_rank(rank).items()}
        with open(os.path.join(hashes, f"{rank}.json"), "w", encoding="utf-8") as file:
            json.dump(digests, file)

    def take_digests(self, rank: int) -> dict[str, Digest]:
        """What ``write_and_hash`` found; hashed now where that was cut off or had nothing to write."""
        try:
            with open(os.path.join(self.root, _HASHES, f"{rank}.json"), encoding="utf-8") as file:
                return {name: Digest(**entry) for name, entry in json.load(file).items()}
        except (OSError, ValueError):
            return self.digests_of_rank(rank)

    def _digests(self, names) -> dict[str, Digest]:
        return {name: hash_file(os.path.join(self.path, name), flush=True) for name in sorted(names)}

    def publish(self, content: Mapping, digests: Mapping[str, Digest]) -> None:
        """Write the manifest (``content``, ``digests`` of all ranks and of what else is there), then rename.

        One rank calls it, after all of them have written.
        """
        found = [
            os.path.relpath(os.path.join(parent, name), self.path)
            for parent, _, names in os.walk(self.path)
            for name in names
        ]
        missing = sorted(set(digests) - set(found))
        assert not missing, f"{self.path}: {missing[:3]} were written by other ranks and are not here"
        # .nfs: files that somebody deleted and somebody else holds open; they vanish by themselves.
        others = (name for name in found if name not in digests and not os.path.basename(name).startswith(".nfs"))
        files = {**digests, **self._digests(others)}
        for parent, _, _ in os.walk(self.path):
            durable_files.flush_folder(parent)
        write_manifest(self.path, {"iteration": self.iteration, **content}, files)
        self._put_in_place()
        write_tracker(self.folder, self.iteration)
        # What had the name before lies here now.
        shutil.rmtree(self.root, ignore_errors=True)

    def _put_in_place(self) -> None:
        if os.path.lexists(self.place):
            if durable_files.exchange(self.path, self.place):
                return
            durable_files.rename(self.place, os.path.join(self.root, _REPLACED))
        durable_files.rename(self.path, self.place)


def clear_staging(folder: str) -> None:
    """Remove what saves that were cut off have left in ``folder``; what they had moved aside goes back.

    One rank calls it, while no save is going on.
    """
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if not name.startswith(STAGING):
            continue
        root, iteration = os.path.join(folder, name), name.removeprefix(STAGING).partition(".")[0]
        place, new, old = (
            os.path.join(*parts) for parts in ((folder, iteration), (root, iteration), (root, _REPLACED))
        )
        if os.path.isdir(old) and not os.path.lexists(place):
            # Cut off between the two renames: the new one was whole before the first.
            durable_files.rename(new if os.path.isdir(new) else old, place)
        shutil.rmtree(root, ignore_errors=True)
