"""Two nodes that share nothing but, where something is saved, the folder of the checkpoints."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from dc_megatron.weights import checkpoint_folder
from tests.end_to_end.launch import ROOT, Finished, Launch, last_iteration, metrics


@contextmanager
def two_nodes(workspace, folder: Path, *flags: str, **more: str) -> Iterator[list[Launch]]:
    """``bash examples/finetune_dc.sh`` once a node, each in a working directory with copies of everything."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with ExitStack() as stack:
        launches = []
        for node in range(2):
            home = folder / f"node{node}"
            for name in ("llama", "clip", "data", "images"):
                source = Path(workspace[name])
                (shutil.copytree if source.is_dir() else _copy_file)(source, home / source.name)
            words = {"MODEL": "llama", "VISION_TOWER": "clip", "DATA": "data.json", "IMAGE_FOLDER": "images"}
            words |= {"NNODES": "2", "NODE_RANK": str(node), "GPUS_PER_NODE": "1", "MASTER_PORT": port}
            words |= {"MASTER_ADDR": "127.0.0.1", "GLOBAL_BATCH_SIZE": "4", "MODEL_MAX_LENGTH": "128"}
            words |= {"SEQ_LENGTH": "256", "WORKERS": "1", "TENSOR_PARALLEL": "2", "BF16": "False", **more}
            recipe = ["bash", str(ROOT / "examples" / "finetune_dc.sh"), "--pretrain_mm_mlp_adapter", ""]
            recipe += ["--max_steps", "2", "--index-folder", "index", *flags]
            launches.append(stack.enter_context(Launch(recipe, folder / f"logs{node}", home, **words)))
        yield launches


def on_two_nodes(workspace, folder: Path, *flags: str, **more: str) -> list[Finished]:
    """The same to their ends."""
    with two_nodes(workspace, folder, *flags, **more) as launches:
        return [launch.finish() for launch in launches]


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


@pytest.mark.long
def test_nodes_with_disks_of_their_own_train_and_save_into_a_folder_that_they_share(workspace, tmp_path):
    shared = tmp_path / "shared"
    for finished in on_two_nodes(workspace, tmp_path, OUTPUT=str(shared)):
        finished.assert_succeeded()
    assert checkpoint_folder.newest_complete(shared) == (2, [])
    assert [line["iteration"] for line in metrics(shared)] == [1, 2]
    for node in range(2):
        assert (tmp_path / f"node{node}" / "index" / "index.json").is_file(), "each node builds its own index"


@pytest.mark.long
def test_an_output_folder_that_is_not_shared_is_refused_before_training(workspace, tmp_path):
    both = on_two_nodes(workspace, tmp_path, OUTPUT="run")
    assert all(finished.status != 0 for finished in both)
    said = [message for finished in both for message in finished.messages]
    assert said, "nobody said why"
    for message in said:
        assert "--output_dir run: ranks 1 (" in message
        assert "a folder that all of them share" in message
    assert not list(tmp_path.glob("node*/run/iter_*"))


@pytest.mark.long
def test_nodes_meet_again_after_a_process_of_one_died_and_the_run_goes_on(workspace, tmp_path):
    shared, steps = tmp_path / "shared", 12
    more = {"MAX_RESTARTS": "1", "SAVE_STEPS": "3", "OUTPUT": str(shared)}
    with two_nodes(workspace, tmp_path, "--max_steps", str(steps), **more) as launches:
        launches[0].wait_until(lambda: last_iteration(shared) >= 4, "a step after the first checkpoint")
        os.kill(launches[1].ranks()[0], signal.SIGKILL)
        finished = [launch.finish().assert_succeeded() for launch in launches]
    assert any("resuming from iteration" in one.output for one in finished)
    assert [line["iteration"] for line in metrics(shared)] == list(range(1, steps + 1))
    assert checkpoint_folder.newest_complete(shared) == (steps, [])
