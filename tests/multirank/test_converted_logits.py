"""Converted checkpoints against Hugging Face's models and against the trees that Megatron writes itself."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig
from dc_megatron.inference.source import Source
from dc_megatron.reference.model import ReferenceModel
from dc_megatron.weights.exporter import export_checkpoint
from dc_megatron.weights.importer import import_checkpoint
from dc_megatron.weights.projector_files import write_projector
from dc_megatron.weights.torch_dist_tree import COMMON_STATE, TorchDistTree
from dc_megatron.weights.tree_tables import extra_state_keys
from tests.helpers.reference_batches import make_batch
from tests.helpers.tiny_models import LANGUAGE_MAKERS, tiny_clip, tiny_llama
from tests.multirank import parity

WORKER = "tests.multirank.converted_worker"
LAYOUTS = {"TP1": (1, 1), "TP2": (2, 1), "PP2": (1, 2), "TP2xPP2": (2, 2)}
TOLERANCE = 2e-5
CONNECTOR = ConnectorConfig("dci")
LENGTH = 48
# Megatron has 1152 rows of it at TP 1, 1280 at TP 2: not those of the imported tree.
PADDED = "padded otherwise"


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("tower") / "clip")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {name: make(root / name) for name, make in LANGUAGE_MAKERS.items()}
    return {**made, PADDED: tiny_llama(root / "padded", vocab=1150)}


@pytest.fixture(scope="module")
def projectors(tmp_path_factory, folders, vision_folder):
    """A projector file for every model."""
    root = tmp_path_factory.mktemp("projectors")
    vision = VisionConfig.from_folder(vision_folder)
    files = {}
    for name, folder in folders.items():
        state = parity.connector_state(vision, CONNECTOR, LanguageConfig.from_folder(folder).hidden_size)
        files[name] = write_projector(str(root / name), state, CONNECTOR, vision)[1]
    return files


@pytest.fixture(scope="module")
def imported(tmp_path_factory, folders, projectors, vision_folder):
    """Every model as a Megatron checkpoint, with tower and projector."""
    root = tmp_path_factory.mktemp("imported")
    for name, folder in folders.items():
        tower_and_projector = {"vision_tower": vision_folder, "projector": projectors[name]}
        import_checkpoint(folder, str(root / name), version="v1", **tower_and_projector)
    return {name: str(root / name) for name in folders}


@pytest.fixture(scope="module")
def batch(vision_folder):
    """A row with a picture and one without, both full; ids that every model has."""
    ids = torch.randint(3, 256, (LENGTH + LENGTH - 16,), generator=torch.Generator().manual_seed(3)).tolist()
    rows = [[("text", ids[:10]), ("image", 1), ("text", ids[10 : LENGTH - 16])], [("text", ids[LENGTH - 16 :])]]
    return make_batch(rows, LENGTH, tokens_per_image=16)


@pytest.fixture(scope="module")
def expected(folders, vision_folder, batch):
    """Logits of transformers' models behind a plain tower and connector."""
    vision = VisionConfig.from_folder(vision_folder)
    found = {}
    for name, folder in folders.items():
        model = ReferenceModel(vision_folder, folder, vision, CONNECTOR).eval()
        model.connector.load_state_dict(
            parity.connector_state(vision, CONNECTOR, model.language_model.config.hidden_size)
        )
        with torch.no_grad():
            found[name] = model(batch).logits
    return found


def assert_logits_equal(expected: dict, ranks: list[list], names: list[str]) -> None:
    seen = 0
    for rank in ranks:
        for name, got in zip(names, rank, strict=True):
            if got is not None:
                seen += 1
                assert got.shape == expected[name].shape, name
                difference = float((got - expected[name]).abs().max())
                assert difference <= TOLERANCE, f"{name}: logits differ by {difference:.2e}"
    assert seen >= len(names)


@pytest.mark.parametrize(
    "layout", [pytest.param(one, marks=pytest.mark.long if one == "TP2xPP2" else ()) for one in LAYOUTS]
)
def test_logits_after_import_are_hugging_faces(workers, imported, expected, batch, layout):
    tensor, pipeline = LAYOUTS[layout]
    sources = [
        Source(load=folder, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
        for folder in imported.values()
    ]
    ranks = workers.run(f"{WORKER}:logits", tensor * pipeline, sources, batch)
    assert_logits_equal(expected, ranks, list(imported))


def test_logits_after_import_into_virtual_stages(workers, imported, expected, batch, vision_folder):
    names = [n for n in imported if LanguageConfig.from_folder(imported[n] + "/hf").num_hidden_layers % 4 == 0]
    assert len(names) >= len(imported) - 1
    folders = [imported[name] for name in names]
    ranks = workers.run(f"{WORKER}:logits_of_virtual_stages", 2, folders, vision_folder, batch)
    assert_logits_equal(expected, ranks, names)


@pytest.mark.parametrize("name", [*LANGUAGE_MAKERS, PADDED])
def test_import_then_export_gives_back_every_bit(imported, folders, name, tmp_path):
    export_checkpoint(imported[name], "hf", str(tmp_path / "back"))
    original, back = read_folder(folders[name]), read_folder(tmp_path / "back")
    assert back.keys() == original.keys()
    for key, value in original.items():
        assert back[key].dtype == value.dtype, key
        assert torch.equal(back[key], value), key
    before, after = (replace(LanguageConfig.from_folder(str(f)), path="") for f in (folders[name], tmp_path / "back"))
    assert after == before


def read_folder(folder) -> dict[str, torch.Tensor]:
    names = [name for name in sorted(os.listdir(folder)) if name.endswith(".safetensors")]
    return {key: value for name in names for key, value in load_file(os.path.join(folder, name)).items()}


def test_megatron_writes_the_same_tree(workers, imported, folders, projectors, vision_folder, tmp_path):
    """Keys, shapes, dtypes, coverage and every element, from TP 2 x PP 2; of objects ours may have more."""
    sources = [
        Source(
            model_name_or_path=folder,
            vision_tower=vision_folder,
            projector=projectors[name],
            dense_connector_type="dci",
            version="v1",
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
        )
        for name, folder in folders.items()
        if name != PADDED
    ]
    names = list(LANGUAGE_MAKERS)
    workers.run(f"{WORKER}:save", 4, sources, [str(tmp_path / name) for name in names])
    for name in names:
        folder = imported[name]
        ours, theirs = TorchDistTree(os.path.join(folder, "release")), TorchDistTree(str(tmp_path / name))
        assert described(ours) == described(theirs), name
        assert {*theirs.objects} <= {*ours.objects}, name
        assert {*ours.objects} == {COMMON_STATE, *extra_state_keys(LanguageConfig.from_folder(folder + "/hf"))}, name
        for key, tensor in ours.tensors.items():
            assert_chunks_cover(ours, key)
            assert_chunks_cover(theirs, key)
            pair = [torch.empty(tensor.shape, dtype=tensor.dtype) for _ in range(2)]
            for tree, out in zip((ours, theirs), pair, strict=True):
                tree.read_rows(key, None, 0, tensor.shape[0], out)
            assert torch.equal(*pair), f"{name}: {key}"


def described(tree: TorchDistTree) -> dict[str, tuple]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in tree.tensors.items()}


def assert_chunks_cover(tree: TorchDistTree, key: str) -> None:
    """The chunks of a tensor lie inside it, apart from each other, and hold as many elements as it has."""
    tensor = tree.tensors[key]
    for chunk in tensor.chunks:
        ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        assert all(end <= size for end, size in zip(ends, tensor.shape, strict=True)), key
    for one, other in itertools.combinations(tensor.chunks, 2):
        assert apart(one, other), f"{key}: chunks overlap"
    assert sum(math.prod(c.sizes) for c in tensor.chunks) == math.prod(tensor.shape), f"{key}: chunks miss a part"


def apart(one, other) -> bool:
    sides = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return any(a + length <= b or b + width <= a for a, length, b, width in sides)
