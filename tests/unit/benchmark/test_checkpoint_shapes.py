"""The generator of checkpoints: what the readers and the weights table think of what it writes."""

from __future__ import annotations

import json
import os

import pytest
import torch

from dc_megatron.benchmark import checkpoint_shapes
from dc_megatron.benchmark.checkpoint_shapes import SHAPES, num_bytes, shape_of, tensor_shapes, write_checkpoint
from dc_megatron.config import LanguageConfig
from dc_megatron.errors import UserError
from dc_megatron.weights.language_loading import check_names
from dc_megatron.weights.language_tables import hugging_face_shapes, language_table
from dc_megatron.weights.safetensors_files import open_checkpoint


def language_of(shape, folder) -> LanguageConfig:
    (folder / "config.json").write_text(json.dumps(shape.config))
    return LanguageConfig.from_folder(str(folder))


@pytest.mark.parametrize("name", SHAPES)
def test_names_and_shapes_are_those_of_the_weights_table(name, tmp_path):
    shape = shape_of(name)
    language = language_of(shape, tmp_path)
    table = language_table(language, language.vocab_size)
    expected = hugging_face_shapes(table, language.num_hidden_layers)
    assert tensor_shapes(shape.config) == expected


def test_sizes_are_those_of_the_real_models():
    """Parameters as their makers count them: 6.74 and 70.6 billion."""
    assert num_bytes(shape_of("7b")) == 2 * 6_738_415_616
    assert num_bytes(shape_of("70b")) == 2 * 70_553_706_496
    assert num_bytes(shape_of("7b")) > num_bytes(shape_of("7b", 31))


@pytest.mark.parametrize("sparse", [False, True], ids=["random", "sparse"])
def test_a_written_folder_is_a_hugging_face_folder(sparse, tmp_path):
    folder = str(tmp_path / "tiny")
    write_checkpoint(folder, "tiny", sparse=sparse)
    language = LanguageConfig.from_folder(folder)
    checkpoint = open_checkpoint(folder)
    check_names(checkpoint, language_table(language, language.vocab_size), language, "tiny")
    files = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 2
    with open(tmp_path / "tiny" / "model.safetensors.index.json", encoding="utf-8") as file:
        index = json.load(file)
    assert index["metadata"]["total_size"] == num_bytes(SHAPES["tiny"])
    assert set(index["weight_map"].values()) == set(files)
    for name in checkpoint.names():
        tensor = checkpoint.read(name)
        assert tensor.dtype == torch.bfloat16
        assert bool(tensor.any()) != sparse
        assert bool(tensor.isfinite().all())


def test_sparse_files_take_no_room(tmp_path):
    write_checkpoint(str(tmp_path), "7b", layers=1, sparse=True)
    paths = [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in paths) > num_bytes(shape_of("7b", 1))
    assert sum(path.stat().st_blocks * 512 for path in paths) < 100_000


def test_content_repeats_nowhere_and_is_the_seeds(tmp_path):
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        path = tmp_path / name
        with open(path, "wb") as file:
            checkpoint_shapes.RandomBytes(seed, block_bytes=1 << 16).write(file.fileno(), 1_000_000)
        contents.append(path.read_bytes())
    assert len(contents[0]) == 1_000_000
    assert contents[0] == contents[1] != contents[2]
    pages = {contents[0][start : start + 4096] for start in range(0, 999_424, 4096)}
    assert len(pages) == 244
    values = torch.frombuffer(bytearray(contents[0]), dtype=torch.bfloat16).float()
    assert 0.01 < values.std() < 0.03


def test_what_is_there_is_not_written_again_and_what_differs_is(tmp_path):
    folder = str(tmp_path)
    write_checkpoint(folder, "tiny")
    index = tmp_path / "model.safetensors.index.json"
    os.utime(index, (1, 1))
    write_checkpoint(folder, "tiny")
    assert index.stat().st_mtime == 1
    write_checkpoint(folder, "tiny", layers=3)
    assert index.stat().st_mtime != 1
    assert checkpoint_shapes.is_written(folder, "tiny", 3)
    assert not checkpoint_shapes.is_written(folder, "tiny")


def test_bad_use_is_refused():
    with pytest.raises(UserError, match=r"--shape 7B: .*7b"):
        shape_of("7B")
    with pytest.raises(UserError, match="--layers 0"):
        shape_of("7b", 0)
