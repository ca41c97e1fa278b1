"""AnyRes from training to plain transformers: trained on two ranks, resumed elsewhere, scored, asked, exported."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dc_megatron.config import ConnectorConfig, VisionConfig, default_pinpoints, image_tiling
from dc_megatron.data.index import build_index, open_index
from dc_megatron.data.rows import expand
from dc_megatron.data.tokenization import IGNORE
from dc_megatron.inference.exported_processor import ExportedProcessor
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.exporter import export_checkpoint
from tests.end_to_end.launch import ROOT, TRAIN, metrics, run, torchrun, train_forked
from tests.helpers.data_files import data_config
from tests.helpers.workspace import make_workspace, training_flags

STEPS, SAVE_STEPS = 4, 2
# All grids of LLaVA-1.6 for a tower of 28 pixels; none fills its grid but the second.
SIZES = ((60, 90), (100, 100), (20, 61), (64, 21), (50, 27), (55, 30), (90, 31))
# The longest sample is about 140 positions, two rows a step.
RECIPE = {
    "image_aspect_ratio": "anyres",
    "model_max_length": 160,
    "packing": "best-fit",
    "seq_length": 256,
    "global_batch_size": 2,
    "micro_batch_size": None,
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "lr_scheduler_type": "constant",
    "trainable": "connector",
    "image-backend": "pil",
}
TP2 = {"tensor-model-parallel-size": 2, "sequence-parallel": True}
PP2 = {"pipeline-model-parallel-size": 2}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> dict[str, str]:
    return make_workspace(tmp_path_factory.mktemp("shapes"), sizes=SIZES)


def command(workspace, output: Path, **more) -> list[str]:
    return [*torchrun(2), *TRAIN, *training_flags(workspace, output, **{**RECIPE, **more})]


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("anyres") / "run"
    train_forked(command(shapes, output, **TP2), output / "logs")
    assert metrics(output)[-1]["iteration"] == STEPS
    return output


def tool(name: str, folder: Path, *words: str) -> list[str]:
    return run([sys.executable, f"tools/{name}.py", *words], folder, cwd=ROOT).assert_succeeded().output.splitlines()


@pytest.fixture(scope="module")
def stock(trained, tmp_path_factory):
    """(LlavaNext, its processor) of plain transformers from the export."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = tmp_path_factory.mktemp("stock") / "llava-next"
    export_checkpoint(str(trained), "hf-llava", str(folder), processor=ExportedProcessor())
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert type(model).__name__ == "LlavaNextForConditionalGeneration"
    return model, AutoProcessor.from_pretrained(folder, backend="pil")


def stock_loss(stock, sample, record, images: str) -> float:
    """Mean loss of one sample's targets, its ids, tiles and sizes made by the stock processor from the record."""
    model, processor = stock
    turns = [
        {"role": ("user", "assistant")[n % 2], "content": t["value"]} for n, t in enumerate(record["conversations"])
    ]
    opened = [Image.open(f"{images}/{record['image']}")] if "image" in record else None
    inputs = processor(text=processor.apply_chat_template(turns), images=opened, return_tensors="pt")
    ids, labels, mask = (torch.from_numpy(part) for part in expand(sample))
    assert torch.equal(inputs["input_ids"][0], torch.where(mask, model.config.image_token_index, ids))
    with torch.no_grad():
        logits = model(**inputs).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=IGNORE))


@pytest.mark.long
def test_scores_are_those_of_the_stock_model(shapes, trained, stock, tmp_path):
    data = ["--data_path", shapes["data"], "--image_folder", shapes["images"], "--image-backend", "pil"]
    lines = [json.loads(line) for line in tool("score", tmp_path / "logs", "--load", str(trained), *data)]
    vision = VisionConfig.from_folder(shapes["clip"])
    tiling = image_tiling(vision, ConnectorConfig("dci"), default_pinpoints(vision), "spatial_unpad")
    config = data_config(
        shapes["images"],
        shapes["data"],
        shapes["llama"],
        image_aspect_ratio="anyres",
        tiling=tiling,
    )
    build_index(config, str(tmp_path / "index"))
    index = open_index(str(tmp_path / "index"))
    records = json.loads(Path(shapes["data"]).read_text())
    entries = lines[:-1]
    assert len(entries) == len(records) == len(index)
    tiles = {sample.images[0].tiles for sample in (index[n] for n in range(len(index))) if sample.images}
    assert tiles == {3, 4, 5}
    for number, entry in enumerate(entries):
        assert entry["loss"] == pytest.approx(
            stock_loss(stock, index[number], records[number], shapes["images"]), abs=2e-5
        )


@pytest.mark.long
def test_a_run_goes_on_at_another_layout(shapes, trained, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    shutil.rmtree(checkpoint_folder.iteration_folder(output, STEPS))
    train_forked(command(shapes, output, **PP2), tmp_path / "logs")
    for ours, expected in zip(metrics(output), metrics(trained), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], abs=2e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    ours, expected = (torch.load(folder / "mm_projector.bin") for folder in (output, trained))
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-3)
    assert "model.image_newline" in expected


@pytest.mark.long
def test_answers_are_those_of_the_stock_model(shapes, trained, stock, tmp_path):
    """By the folders and the projector file that the run left, image_newline in it."""
    model, processor = stock
    image, question = f"{shapes['images']}/2.jpg", "What is in the picture?"
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=text, images=Image.open(image), return_tensors="pt")
    with torch.no_grad():
        given = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(given, skip_special_tokens=True).split("</s>")[0].strip()
    ask = ["--image", image, "--prompt", question, "--max_new_tokens", "6", "--image-backend", "pil"]
    parts = ["--model_name_or_path", shapes["llama"], "--vision_tower", shapes["clip"], "--version", "v1"]
    parts += ["--pretrain_mm_mlp_adapter", str(trained), "--image_aspect_ratio", "anyres"]
    assert "\n".join(tool("generate", tmp_path / "logs", *parts, *ask)).strip() == expected


@pytest.mark.long
def test_anyres_begins_in_stage_2(shapes, trained, tmp_path):
    """LLaVA-1.6's recipe: the connector of a run without tiles, image_newline from its initialisation."""
    flags = {**RECIPE, **PP2, "max_steps": 1, "trainable": "connector,llm"}
    square = tmp_path / "square"
    run(command(shapes, square, **{**flags, "image_aspect_ratio": "square", "trainable": "connector"}), square / "logs")
    for name, start in {
        "projector": {"pretrain_mm_mlp_adapter": square},
        "weights": {"load": square, "finetune": True},
    }.items():
        output = tmp_path / name
        done = train_forked(command(shapes, output, **{**flags, **start}), output / "logs")
        assert "has no image_newline, which anyres trains: it starts anew" in done.output
        assert metrics(output)[0]["iteration"] == 1
    projector, weights = (metrics(tmp_path / name)[0]["loss"] for name in ("projector", "weights"))
    assert projector == pytest.approx(weights, abs=2e-5)


def test_the_export_for_llava_goes_round(trained, tmp_path):
    export_checkpoint(str(trained), "llava", str(tmp_path / "llava"))
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert config["mm_patch_merge_type"] == "spatial_unpad"
    assert config["image_grid_pinpoints"] == [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    done = tool("convert", tmp_path / "logs", "verify", str(trained), str(tmp_path / "llava"))
    assert done[-1].endswith("compared: equal")
