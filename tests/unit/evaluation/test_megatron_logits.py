"""A Megatron checkpoint against its export by the program itself, each model loaded in its own process."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from dc_megatron.config import ConnectorConfig
from dc_megatron.errors import UserError
from dc_megatron.evaluation.logits import compare_logits
from dc_megatron.weights.exporter import open_any, plan_export
from dc_megatron.weights.importer import import_checkpoint
from tests.helpers.llava_folders import llava_folder, write_export
from tests.helpers.tiny_models import ODD_VOCABULARY, tiny_clip, tiny_llama

SAME = 2e-5
ROOT = Path(__file__).parents[3]


def quiet(what: str, total: int):
    class Bar:
        def __call__(self, count: int) -> None:
            pass

        def finish(self) -> float:
            return 0.0

    return Bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A LLaVA folder and the checkpoint that it is imported to."""
    root = tmp_path_factory.mktemp("models")
    text = tiny_llama(root / "text", layers=2, vocab=ODD_VOCABULARY)
    tower = tiny_clip(root / "clip")
    llava = llava_folder(root / "llava", text, tower, ConnectorConfig("dci"))
    import_checkpoint(llava, str(root / "megatron"), progress=quiet)
    return {"llava": llava, "megatron": str(root / "megatron")}


def test_a_checkpoint_and_its_stock_export_by_the_program(folders, tmp_path, capsys):
    model, _ = open_any(folders["megatron"], None, "")
    export = plan_export(model, "hf-llava", None, image_token=(ODD_VOCABULARY, ODD_VOCABULARY + 1))
    stored = write_export(export, tmp_path / "stock")
    before = torch.tensor, torch.Tensor.to
    main = runpy.run_path(str(ROOT / "tools" / "convert.py"))["main"]
    status = main(["verify", folders["megatron"], stored, "--logits", "--json"])
    entry = json.loads(capsys.readouterr().out)
    assert (status, entry["equal"], entry["logits_equal"]) == (0, True, True), entry
    assert [found["input"] for found in entry["logits"]] == ["text", "picture"]
    for found in entry["logits"]:
        assert found["largest"] <= SAME
        assert found["same_tokens"] == found["places"]
    assert (torch.tensor, torch.Tensor.to) == before, "the comparison left torch changed"


def test_a_tower_that_is_not_there_is_named(folders, tmp_path):
    import_checkpoint(folders["llava"], str(tmp_path / "megatron"), progress=quiet)
    path = tmp_path / "megatron" / "hf" / "dc_megatron.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**described, "vision_tower": "/nowhere"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"B .*its frozen vision tower was /nowhere, which is not there"):
        compare_logits(folders["llava"], str(tmp_path / "megatron"))
