"""Exports with everything that plain transformers needs, made of whole folders; rules that two rooms share."""

from __future__ import annotations

import json
import os

import pytest
import torch

from dc_megatron.config import ConnectorConfig
from dc_megatron.data.hf_processor import image_token
from dc_megatron.errors import UserError
from dc_megatron.inference.exported_processor import ExportedProcessor
from dc_megatron.weights.checkpoint_folder import read_description
from dc_megatron.weights.exporter import export_checkpoint
from dc_megatron.weights.importer import import_checkpoint
from dc_megatron.weights.tokenizer_ids import image_token_id, tokenizer_ids
from tests.helpers.data_files import chatml_tokenizer, llama_3_tokenizer, sentencepiece_tokenizer
from tests.helpers.llava_folders import llava_folder
from tests.helpers.tiny_models import tiny_clip, tiny_llama

TOKENIZERS = {
    "sentencepiece": sentencepiece_tokenizer,
    "llama 3": llama_3_tokenizer,
    "llama 3 with reserved tokens": lambda folder: llama_3_tokenizer(folder, reserved=4),
    "chatml": chatml_tokenizer,
}
GRID = [[28, 56], [56, 28], [56, 56]]


@pytest.mark.parametrize("rows", [500, 512])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_both_rooms_choose_the_same_id_for_a_picture(tmp_path, name, rows):
    """One reads the tokenizer's files, the other asks the tokenizer."""
    folder = TOKENIZERS[name](tmp_path)
    assert image_token(folder, rows).token_id == image_token_id(tokenizer_ids(folder), rows)


@pytest.fixture
def model(tmp_path):
    """LLaVA's folder with tokenizer and tower inside; ``make(**config)`` overrides its config.json."""
    language = tiny_llama(tmp_path / "llama", layers=2, vocab=480)

    def make(connector: str, **settings) -> str:
        folder = tmp_path / "llava"
        tower = tiny_clip(tmp_path / "tower")
        llava_folder(folder, language, tower, ConnectorConfig(connector), inside=True, **settings)
        return sentencepiece_tokenizer(folder)

    return make


def export(load, save, version="v1"):
    return export_checkpoint(str(load), "hf-llava", str(save), processor=ExportedProcessor(version))


def test_from_a_llava_folder_through_the_tree_to_an_answer(tmp_path, model):
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    source = model("dci")
    import_checkpoint(source, str(tmp_path / "tree"), version="v1")
    export(tmp_path / "tree", tmp_path / "stock", version="")
    processor = AutoProcessor.from_pretrained(tmp_path / "stock")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "stock").eval()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=text, images=Image.new("RGB", (50, 30), "red"), return_tensors="pt")
    token = loaded.config.image_token_index
    assert (inputs["input_ids"] == token).sum() == 16
    with torch.no_grad():
        answer = loaded.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert token not in answer[0, inputs["input_ids"].shape[1] :]


def test_anyres_keeps_its_grid_through_the_tree(tmp_path, model):
    anyres = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": GRID}
    source = model("sci", extra={"model.image_newline": torch.randn(64)}, **anyres)
    import_checkpoint(source, str(tmp_path / "tree"), version="v1")
    described = read_description(str(tmp_path / "tree"))
    assert (described.image_grid_pinpoints, described.merge_type) == (GRID, "spatial_unpad")
    export(tmp_path / "tree", tmp_path / "stock")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["model_type"] == "llava_next"
    assert config["image_grid_pinpoints"] == [[height, width] for width, height in GRID]
    assert "LlavaNextImageProcessor" in (tmp_path / "stock" / "preprocessor_config.json").read_text()


def test_a_template_has_to_be_known(tmp_path, model):
    source = model("none")
    import_checkpoint(source, str(tmp_path / "tree"))
    with pytest.raises(UserError, match=r"--version: .*does not say which conversation template"):
        export(tmp_path / "tree", tmp_path / "stock", version="")
    assert not os.path.exists(tmp_path / "stock")
    import_checkpoint(source, str(tmp_path / "noted"), version="v1")
    with pytest.raises(UserError, match=r"--version mpt: .* was trained with v1"):
        export(tmp_path / "noted", tmp_path / "stock", version="mpt")
