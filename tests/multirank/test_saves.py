"""Whatever ends a save, and wherever: the old state or the new one is there, whole, and every tool says so."""

from __future__ import annotations

import os
import tempfile

import pytest

from tests.helpers.tiny_models import tiny_clip, tiny_llama
from tests.multirank.save_worker import BEFORE, LATER, OLDER, SAVED

WORKER = "tests.multirank.save_worker"
NOTHING = {"newest": None, "content": None}
OLD = {
    "nothing": NOTHING,
    "an older iteration": {"newest": OLDER, "content": "old"},
    "the same iteration": {"newest": SAVED, "content": "old"},
    "the same iteration, broken": {"newest": OLDER, "content": "old"},
}
NEW = {"newest": SAVED, "content": "new"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    return tiny_llama(root / "llama", layers=2), tiny_clip(root / "clip")


@pytest.fixture
def folder(tmp_path):
    """In memory where the machine offers that: thousands of flushes take long on a disk, and show nothing more."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as name:
        yield name


def which(state: dict) -> dict:
    return {name: state[name] for name in ("newest", "content")}


@pytest.mark.parametrize(
    ("before", "exchanges"),
    # On a network disk names cannot change places: there are two renames then.
    [*((before, True) for before in BEFORE), ("the same iteration", False)],
)
def test_at_every_stop_the_old_or_the_new_state_is_there(workers, models, before, exchanges, folder):
    ((first, *entries),) = workers.run(f"{WORKER}:stopped_everywhere", 1, str(folder), *models, before, exchanges)
    assert which(first["after"]) == OLD[before]
    names = [entry["point"] for entry in entries]
    assert {"write_all", "flush_file", "flush_folder", "rename", "torch.save", "save_file", "rmtree"} <= set(names)
    assert ("exchange" in names) == (exchanges and SAVED in BEFORE[before])
    old = OLD[before]
    arrived = []
    for entry in entries:
        point = entry["point"]
        assert entry["stopped"], f"{point}: the save went on"
        # Between two renames neither has the name; the next start gives it to the new one.
        allowed = [old, NEW, {"newest": OLDER, "content": "old"}] if not exchanges else [old, NEW]
        assert which(entry["after"]) in allowed, point
        assert which(entry["next start"]) in (old, NEW), point
        for moment in ("after", "next start"):
            state = entry[moment]
            assert state["resumes from"] == state["newest"], f"{point}, {moment}"
            broken = before.endswith("broken") and which(state) == old
            expected = [f"iter_{SAVED:07d}: dc_manifest.json is missing"] if broken else []
            assert [problem.partition(" or cannot")[0] for problem in state["problems"]] == expected, point
        arrived.append(which(entry["next start"]) == NEW)
        assert entry["next save"] == LATER, point
        assert not [name for name in entry["left"] if name.startswith(".saving-")], point
    assert arrived == sorted(arrived), "the new state went away again"
    assert 0 < sum(arrived) < len(arrived)
