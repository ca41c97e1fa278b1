"""Answers and scores at TP1, TP2, PP2 and DP2 against the plain Hugging Face / PyTorch model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig, image_tiling
from dc_megatron.data.index import build_index, open_index
from dc_megatron.data.rows import assemble
from dc_megatron.data.tokenization import encode_prompt, load_tokenizer
from dc_megatron.inference.source import Source
from dc_megatron.reference.model import ReferenceModel
from dc_megatron.weights.projector_files import write_projector
from tests.helpers.data_files import data_config, pixels_of_files
from tests.helpers.workspace import make_workspace
from tests.multirank import parity

NEW_TOKENS = 6
LAYOUTS = {"TP1": (1, 1, 1), "TP2": (2, 1, 2), "PP2": (1, 2, 2), "DP2": (1, 1, 2)}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A workspace, the reference model of it, and the source that names the same folders."""
    root = tmp_path_factory.mktemp("inference")
    workspace = make_workspace(root, records=7)
    vision, connector = VisionConfig.from_folder(workspace["clip"]), ConnectorConfig("sti")
    width = LanguageConfig.from_folder(workspace["llama"]).hidden_size
    state = parity.connector_state(vision, connector, width)
    write_projector(str(root / "projector"), state, connector, vision)
    model = ReferenceModel(workspace["clip"], workspace["llama"], vision, connector).eval()
    model.connector.load_state_dict(state)
    source = Source(
        model_name_or_path=workspace["llama"],
        vision_tower=workspace["clip"],
        projector=str(root / "projector"),
        dense_connector_type="sti",
        version="v1",
    )
    return workspace, model, source


def reference_answer(workspace, model, source, question: str, images: tuple[str, ...]) -> str:
    """Greedy tokens of one question, one at a time, through the reference."""
    vision, connector = model.vision, model.connector_config
    tiling = image_tiling(vision, connector)
    tokenizer = load_tokenizer(workspace["llama"], source.version)
    ids, mask = encode_prompt(tokenizer, source.version, question, [tiling.tile_tokens] * len(images))
    ids, mask = list(ids), list(mask)
    pixels = pixels_of_files(vision, tiling, images)
    given = []
    for _ in range(NEW_TOKENS):
        length = len(ids)
        batch = {
            "input_ids": torch.tensor([ids]),
            "labels": torch.full((1, length), -100),
            "position_ids": torch.arange(length)[None],
            "image_mask": torch.tensor([mask]),
            "image_feature_index": torch.arange(sum(mask)),
            "pixel_values": pixels,
            "cu_seqlens": torch.tensor([0, length], dtype=torch.int32),
        }
        with torch.no_grad():
            token = int(model(batch).logits[0, -1].argmax())
        if token == tokenizer.eos_id:
            break
        given.append(token)
        ids.append(token)
        mask.append(False)
    return tokenizer.decode(given).strip()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_equal_the_reference(workers, setting, layout):
    workspace, model, source = setting
    pictures = [f"{workspace['images']}/{number}.jpg" for number in (1, 2, 4)]
    questions = [
        ("What is in the picture?", (pictures[0],)),
        ("Who are you?", ()),
        # As long as the first: they go on together.
        ("What is in the picture?", (pictures[2],)),
        ("<image>\nor <image> which?", (pictures[1], pictures[2])),
    ]
    tensor, pipeline, world = LAYOUTS[layout]
    source = replace(source, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    expected = [reference_answer(workspace, model, source, *question) for question in questions]
    for worker in ("answers", "answers_by_whole_passes"):
        for given in workers.run(f"tests.multirank.inference_worker:{worker}", world, source, questions, NEW_TOKENS):
            assert given == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_equal_the_reference(workers, setting, tmp_path, layout):
    workspace, model, source = setting
    tensor, pipeline, world = LAYOUTS[layout]
    source = replace(source, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    results = workers.run(
        "tests.multirank.inference_worker:scores", world, source, workspace["data"], workspace["images"]
    )
    entries, total = results[0]
    assert [entry["index"] for entry in entries] == list(range(7))
    assert all(other == [] for other, _ in results[1:])

    config = data_config(
        workspace["images"],
        workspace["data"],
        workspace["llama"],
        model_max_length=128,
        seq_length=128,
        tiling=image_tiling(model.vision, model.connector_config),
        max_bad_sample_rate=0.5,
    )
    build_index(config, str(tmp_path))
    index = open_index(str(tmp_path))
    loss_sum = 0.0
    for number, entry in enumerate(entries):
        sample = index[number]
        batch = assemble([[sample]], 128, config.tiling)
        files = [f"{workspace['images']}/{image.name}" for image in sample.images]
        batch["pixel_values"] = pixels_of_files(model.vision, config.tiling, files)
        with torch.no_grad():
            output = model(batch)
        assert entry["supervised_tokens"] == output.supervised_tokens
        assert entry["loss"] == pytest.approx(float(output.loss_sum) / output.supervised_tokens, abs=1e-5)
        loss_sum += float(output.loss_sum)
    assert total["loss"] == pytest.approx(loss_sum / total["supervised_tokens"], abs=1e-5)
    assert total["images"] == 4
