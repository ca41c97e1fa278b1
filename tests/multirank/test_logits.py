"""Checkpoints without a tower, and of 16 bits, against text folders: the language model alone is built and run."""

from __future__ import annotations

import json
import os

import pytest

from dc_megatron.evaluation import megatron_logits
from dc_megatron.evaluation.logits import compare_logits
from dc_megatron.weights.exporter import export_checkpoint
from dc_megatron.weights.importer import import_checkpoint
from tests.helpers.tiny_models import ODD_VOCABULARY, tiny_llama, tiny_qwen2

SAME = 2e-5


@pytest.fixture
def in_workers(workers, monkeypatch):
    """The models run in a worker, which has imported Megatron before; otherwise as the program does it."""
    monkeypatch.setattr(
        megatron_logits, "_call", lambda folder: workers.run("dc_megatron.evaluation.megatron_logits:main", 1, folder)
    )


def test_a_text_model_and_its_import(in_workers, tmp_path):
    text = tiny_llama(tmp_path / "text", layers=2, vocab=ODD_VOCABULARY)
    import_checkpoint(text, str(tmp_path / "megatron"))
    result = compare_logits(text, str(tmp_path / "megatron"))
    (found,) = result.differences
    assert found.largest <= SAME
    assert found.same_tokens == found.places
    os.makedirs(tmp_path / "other")
    os.symlink(os.path.join(text, "model.safetensors"), tmp_path / "other" / "model.safetensors")
    with open(os.path.join(text, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    with open(tmp_path / "other" / "config.json", "w", encoding="utf-8") as file:
        json.dump({**config, "rms_norm_eps": 1e-2}, file)
    assert not compare_logits(str(tmp_path / "megatron"), str(tmp_path / "other")).equal


def test_a_checkpoint_of_16_bits_is_computed_in_fp32(in_workers, tmp_path):
    text = tiny_qwen2(tmp_path / "text", tie_word_embeddings=True)
    export_checkpoint(text, "hf", str(tmp_path / "half"), dtype="bf16")
    import_checkpoint(str(tmp_path / "half"), str(tmp_path / "megatron"))
    result = compare_logits(str(tmp_path / "megatron"), str(tmp_path / "half"))
    assert result.differences[0].largest <= SAME
    against_fp32 = compare_logits(str(tmp_path / "megatron"), text).differences[0]
    assert SAME < against_fp32.largest <= against_fp32.tolerance
    assert "16 roundings of bfloat16" in against_fp32.why
