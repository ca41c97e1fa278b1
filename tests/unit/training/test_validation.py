"""Which rows an evaluation takes, and what is refused before a run starts."""

import numpy as np
import pytest

from dc_megatron.data.row_plan import RowPlan
from dc_megatron.errors import UserError
from dc_megatron.training import run
from dc_megatron.training.validation import ValidationRows
from tests.helpers.data_files import data_config
from tests.helpers.workspace import make_workspace, training_flags


def rows_of(lengths, packing, tmp_path, batch, limit=None):
    config = data_config(
        str(tmp_path), "x.json", "x", packing=packing, order="sequential", seq_length=16, model_max_length=16
    )
    lengths = np.array(lengths)
    zeros = np.zeros_like(lengths)
    return ValidationRows(RowPlan(lengths, zeros, zeros, config, rows_per_step=1, folder=None), batch, limit)


@pytest.mark.parametrize("packing", ["none", "best-fit"])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_every_sample_once_then_the_same_again(tmp_path, packing, batch):
    rows = rows_of([3, 9, 12, 4, 5, 7, 16, 2, 2], packing, tmp_path, batch)
    cycle = rows.iterations * batch
    first, second = ([list(rows[start + place]) for place in range(cycle)] for start in (0, cycle))
    assert first == second
    assert sorted(number for row in first for number in row) == list(range(9))
    # Empty rows stand at the end alone, and fill less than a batch.
    filled = [bool(row) for row in first]
    assert filled == sorted(filled, reverse=True)
    assert filled.count(False) < batch


def test_a_limit_takes_the_first_batches(tmp_path):
    rows = rows_of([4] * 9, "none", tmp_path, batch=2, limit=3)
    assert rows.iterations == 3
    assert [list(rows[place]) for place in range(7)] == [[0], [1], [2], [3], [4], [5], [0]]
    assert rows_of([4] * 9, "none", tmp_path, batch=2, limit=30).iterations == 5


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("validation"), records=3)


def checked(workspace, tmp_path, **more):
    return run.check(training_flags(workspace, tmp_path / "out", **more), world_size=1)


def test_held_out_records_lie_where_the_others_do(workspace, tmp_path):
    assert checked(workspace, tmp_path).validation_sources == ()
    (source,) = checked(workspace, tmp_path, eval_data_path=workspace["data"]).validation_sources
    assert (source.data_path, source.image_folder) == (workspace["data"], workspace["images"])
    (source,) = checked(
        workspace, tmp_path, eval_data_path=workspace["data"], eval_image_folder=str(tmp_path)
    ).validation_sources
    assert source.image_folder == str(tmp_path)
    off = checked(workspace, tmp_path, **{"eval_data_path": workspace["data"], "eval-iters": 0})
    assert off.validation_sources == ()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"eval_data_path": "absent.json"}, "--eval_data_path absent.json: no such file"),
        ({"eval_data_path": "data.json:2"}, "--eval_data_path .*data.json:2: every record counts once"),
        ({"eval_data_path": "data.json", "eval_image_folder": ["a", "b"]}, "--eval_image_folder a b: 2 folders for 1"),
    ],
)
def test_what_cannot_be_evaluated_on_is_refused(workspace, tmp_path, flags, words):
    flags = {**flags, "eval_data_path": flags["eval_data_path"].replace("data.json", workspace["data"])}
    with pytest.raises(UserError, match=words):
        checked(workspace, tmp_path, **flags)
