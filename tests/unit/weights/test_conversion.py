"""Import, export and verify of tiny models on disk: every bit, every way to be interrupted, every bad input."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig
from dc_megatron.errors import UserError
from dc_megatron.weights import block_stream, durable_files, exporter, safetensors_writer, torch_dist_writer
from dc_megatron.weights.exporter import export_checkpoint
from dc_megatron.weights.importer import import_checkpoint
from dc_megatron.weights.manifest import damaged_files, read_manifest
from dc_megatron.weights.projector_files import write_projector
from dc_megatron.weights.verify import verify
from tests.helpers.llava_folders import llava_folder, random_projector
from tests.helpers.stop_points import Killed, StopPoints
from tests.helpers.tiny_models import (
    LANGUAGE_MAKERS,
    as_old_bin,
    as_safetensors,
    tiny_clip,
    tiny_dinov2,
    tiny_llama,
    tiny_siglip,
)


class Silent:
    def __init__(self, what, total):
        self.done = 0

    def __call__(self, num_bytes):
        self.done += num_bytes

    def finish(self):
        return 0.0


def bring_in(hf, save, **options):
    return import_checkpoint(str(hf), str(save), progress=Silent, **options)


def bring_out(load, kind, save, **options):
    return export_checkpoint(str(load), kind, str(save), progress=Silent, **options)


def tensors_of(folder) -> dict[str, torch.Tensor]:
    found = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            found |= load_file(os.path.join(folder, name))
    return found


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def cast(source, target, dtype) -> str:
    shutil.copytree(source, target)
    path = os.path.join(target, "model.safetensors")
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    return str(target)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama", layers=2, vocab=300)


@pytest.fixture
def small_blocks(monkeypatch):
    """Files and blocks so small that a tiny model takes many of both."""
    split = block_stream.split_rows
    for module in (torch_dist_writer, safetensors_writer):
        monkeypatch.setattr(module, "split_rows", lambda shape, dtype: split(shape, dtype, 5000))
    monkeypatch.setattr(torch_dist_writer, "_FILE_BYTES", 100_000)


@pytest.fixture
def two_files(monkeypatch):
    """A tree of two files with tensors."""
    monkeypatch.setattr(torch_dist_writer, "_FILE_BYTES", 250_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LANGUAGE_MAKERS)
def test_round_trip_is_bit_identical(tmp_path, name, dtype):
    source = cast(LANGUAGE_MAKERS[name](tmp_path / "made"), tmp_path / "source", dtype)
    bring_in(source, tmp_path / "tree")
    bring_out(tmp_path / "tree", "hf", tmp_path / "back")
    expected = tensors_of(source)
    if "tied" in name:
        # The same tensor twice, if at all; transformers leaves it out as well.
        expected.pop("lm_head.weight", None)
    assert_same(tensors_of(tmp_path / "back"), expected)
    assert verify(source, str(tmp_path / "back"), progress=Silent).equal


@pytest.mark.parametrize("form", ["one file", "shards", "bin", "bin shards"])
def test_whatever_the_files(tmp_path, llama, form, small_blocks):
    source = tmp_path / "source"
    shards = 3 if "shards" in form else 1
    (as_old_bin if "bin" in form else as_safetensors)(llama, source, shards=shards)
    bring_in(source, tmp_path / "tree")
    assert len([n for n in os.listdir(tmp_path / "tree" / "release") if n.endswith(".distcp")]) > 3
    bring_out(tmp_path / "tree", "hf", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(llama))


def test_shards_and_their_index(tmp_path, llama, monkeypatch):
    bring_in(llama, tmp_path / "tree")
    writer = safetensors_writer.SafetensorsWriter
    original = writer.__init__
    monkeypatch.setattr(writer, "__init__", lambda self, *args: original(self, *args, most=150_000))
    bring_out(tmp_path / "tree", "hf", tmp_path / "back")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(llama).values())
    assert_same(tensors_of(tmp_path / "back"), tensors_of(llama))
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert_same(dict(loaded), tensors_of(llama))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_dtype_of_choice(tmp_path, llama, dtype):
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    bring_in(llama, tmp_path / "tree")
    bring_out(tmp_path / "tree", "hf", tmp_path / "back", dtype=dtype)
    assert_same(tensors_of(tmp_path / "back"), {n: t.to(kind) for n, t in tensors_of(llama).items()})
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["torch_dtype"] == str(kind).removeprefix("torch.")
    assert config["rope_theta"] == 10000.0


@pytest.mark.parametrize("kind", ["dci", "sti"])
def test_a_tower_of_another_family_inside_a_llava_folder(tmp_path, llama, kind):
    """Its configuration goes along where the tower does; stock Llava was not tried with one, and says so."""
    tower = tiny_dinov2(tmp_path / "tower")
    source = llava_folder(tmp_path / "llava", llama, tower, ConnectorConfig(kind))
    bring_in(source, tmp_path / "tree", vision_tower=tower)
    bring_out(tmp_path / "tree", "llava", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))
    with_tower = llava_folder(
        tmp_path / "whole", llama, tower, ConnectorConfig(kind), inside=True, mm_vision_tower=tower
    )
    bring_in(with_tower, tmp_path / "tree2")
    shutil.rmtree(tmp_path / "tower")
    bring_out(tmp_path / "tree2", "llava", tmp_path / "back2", tower_name="tower")
    assert_same(tensors_of(tmp_path / "back2"), tensors_of(with_tower))
    with pytest.raises(UserError, match="Llava was not tried with a dinov2 tower; use --format llava"):
        bring_out(tmp_path / "tree2", "hf-llava", tmp_path / "stock")


@pytest.mark.parametrize("tower", [tiny_clip, tiny_siglip])
@pytest.mark.parametrize("kind", ["sti", "sci", "dci", "none"])
def test_llava_folders_come_in_and_go_out(tmp_path, llama, kind, tower):
    connector = ConnectorConfig(kind)
    source = llava_folder(
        tmp_path / "llava", llama, tower(tmp_path / "tower"), connector, inside=True, dtype=torch.bfloat16
    )
    bring_in(source, tmp_path / "tree")
    assert verify(str(tmp_path / "tree"), source, progress=Silent).equal
    shutil.rmtree(tmp_path / "tower")
    described = json.loads((tmp_path / "tree" / "hf" / "dc_megatron.json").read_text())
    assert described["mm_dense_connector_type"] == kind
    bring_out(tmp_path / "tree", "llava", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))
    if kind != "sti":
        bring_out(tmp_path / "tree", "hf-llava", tmp_path / "stock")
        assert verify(str(tmp_path / "stock"), str(tmp_path / "tree"), progress=Silent).equal


@pytest.mark.parametrize("family", ["qwen3", "phi", "mistral", "qwen2_tied"])
def test_every_format_of_other_families(tmp_path, family):
    """Over a language model that is no plain Llama: out as LLaVA's and in again, and out as stock Llava."""
    language, tower = LANGUAGE_MAKERS[family](tmp_path / "made"), tiny_siglip(tmp_path / "tower")
    connector, vision = ConnectorConfig("dci"), VisionConfig.from_folder(tower)
    state = random_projector(connector, vision, LanguageConfig.from_folder(language).hidden_size)
    projector = write_projector(str(tmp_path / "projector"), state, connector, vision)[1]
    bring_in(language, tmp_path / "tree", vision_tower=tower, projector=projector)
    bring_out(tmp_path / "tree", "llava", tmp_path / "llava")
    bring_in(tmp_path / "llava", tmp_path / "again", vision_tower=tower)
    assert verify(str(tmp_path / "again"), str(tmp_path / "tree"), progress=Silent).equal
    bring_out(tmp_path / "again", "hf", tmp_path / "back")
    assert verify(str(tmp_path / "back"), language, progress=Silent).equal
    for dtype in ("", "bf16"):
        bring_out(tmp_path / "tree", "hf-llava", tmp_path / f"stock{dtype}", dtype=dtype)
    assert verify(str(tmp_path / "stock"), str(tmp_path / "tree"), progress=Silent).equal
    assert verify(str(tmp_path / "tree"), str(tmp_path / "stockbf16"), any_dtype=True, progress=Silent).equal


def test_a_checkpoint_can_be_moved(tmp_path, llama):
    source = llava_folder(tmp_path / "llava", llama, tiny_clip(tmp_path / "tower"), ConnectorConfig("sci"), inside=True)
    bring_in(source, tmp_path / "tree")
    os.rename(tmp_path / "tree", tmp_path / "moved")
    shutil.rmtree(tmp_path / "tower")
    bring_out(tmp_path / "moved", "hf-llava", tmp_path / "stock")


def state(path) -> str:
    """``absent``, or ``whole``; everything else fails."""
    if not os.path.lexists(path):
        return "absent"
    tree = os.path.join(path, "release") if os.path.isdir(os.path.join(path, "release")) else str(path)
    manifest, reason = read_manifest(tree)
    assert manifest is not None, reason
    assert damaged_files(tree, manifest) == []
    return "whole"


@pytest.mark.parametrize("every", [25, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_conversion_may_end_at_any_point(tmp_path, monkeypatch, two_files, direction, every):
    """Each rename, and of the writes and their flushes, which are many and alike, one in ``every``."""
    language = tiny_llama(tmp_path / "llama", layers=1, vocab=300)
    connector = ConnectorConfig("sci")
    source = llava_folder(tmp_path / "llava", language, tiny_clip(tmp_path / "tower", layers=3), connector, inside=True)
    bring_in(source, tmp_path / "tree")

    def convert(target):
        if direction == "import":
            bring_in(source, target)
        else:
            bring_out(tmp_path / "tree", "llava", target)

    points = StopPoints(monkeypatch)
    points.stop_at(None)
    convert(tmp_path / "whole")
    count = len(points.passed)
    assert {"write_all", "flush_file", "flush_folder", "rename"} == set(points.passed)
    kinds = list(points.passed)
    for position in [n for n in range(count) if kinds[n] in ("flush_folder", "rename") or n % every == 0]:
        target = tmp_path / f"target{position}"
        points.stop_at(position)
        with pytest.raises(Killed):
            convert(target)
        # Only the flush behind the last rename finds the result under its name already.
        assert state(target) == ("whole" if position == count - 1 else "absent"), position
        points.stop_at(None)
        if position < count - 1:
            convert(target)
        assert state(target) == "whole"
        assert not os.path.exists(f"{target}.partial")
        shutil.rmtree(target)


def test_a_write_that_fails_says_why(tmp_path, llama, monkeypatch):
    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable_files, "write_all", full)
    with pytest.raises(OSError, match="No space left"):
        bring_in(llama, tmp_path / "tree")


def test_an_interrupted_import_goes_on_with_what_it_has(tmp_path, llama, monkeypatch, small_blocks):
    points = StopPoints(monkeypatch)
    points.stop_at(None)
    bring_in(llama, tmp_path / "whole")
    points.stop_at(len(points.passed) // 2)
    with pytest.raises(Killed):
        bring_in(llama, tmp_path / "tree")
    points.stop_at(None)
    partial = tmp_path / "tree.partial" / "release"
    before = {name: os.stat(partial / name).st_ino for name in os.listdir(partial)}
    assert len(before) > 1
    bring_in(llama, tmp_path / "tree")
    after = {name: os.stat(tmp_path / "tree" / "release" / name).st_ino for name in before}
    kept = [name for name in before if before[name] == after[name]]
    assert len(kept) >= len(before) - 1
    assert verify(llama, str(tmp_path / "tree"), progress=Silent).equal


def test_another_source_starts_over(tmp_path, llama, monkeypatch, small_blocks):
    points = StopPoints(monkeypatch)
    points.stop_at(30)
    with pytest.raises(Killed):
        bring_in(llama, tmp_path / "tree")
    points.stop_at(None)
    other = tiny_llama(tmp_path / "other", layers=2, vocab=300, seed=9)
    bring_in(other, tmp_path / "tree")
    assert verify(other, str(tmp_path / "tree"), progress=Silent).equal


def test_a_damaged_checkpoint_is_not_exported(tmp_path, llama):
    bring_in(llama, tmp_path / "tree")
    path = tmp_path / "tree" / "release" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"__0_0.distcp is damaged.*--step N"):
        bring_out(tmp_path / "tree", "hf", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    bring_out(tmp_path / "tree", "hf", tmp_path / "back", check=False)
    result = verify(llama, str(tmp_path / "back"), progress=Silent)
    assert len(result.differences) == 1
    assert "1 values differ" in result.differences[0]


def test_verify_names_what_differs(tmp_path, llama):
    bring_in(llama, tmp_path / "tree")
    tensors = load_file(os.path.join(llama, "model.safetensors"))
    norm = "model.layers.1.input_layernorm.weight"
    for change, expected in (
        (lambda t: t[norm].__setitem__(3, 9.0), f"{norm}: 1 values differ, by "),
        (lambda t: t.update({norm: t[norm].bfloat16()}), f"{norm}: dtype float32 in A, bfloat16 in B"),
    ):
        changed = {name: value.clone() for name, value in tensors.items()}
        change(changed)
        folder = as_safetensors(llama, tmp_path / f"changed{len(os.listdir(tmp_path))}")
        save_file(changed, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        result = verify(str(tmp_path / "tree"), folder, progress=Silent)
        assert not result.equal
        assert result.differences[0].startswith(expected)


def test_verify_casts_where_it_is_asked_to(tmp_path, llama):
    bring_in(llama, tmp_path / "tree")
    bring_out(tmp_path / "tree", "hf", tmp_path / "half", dtype="bf16")
    assert not verify(llama, str(tmp_path / "half"), progress=Silent).equal
    assert verify(llama, str(tmp_path / "half"), any_dtype=True, progress=Silent).equal
    assert not verify(str(tmp_path / "half"), llama, any_dtype=True, progress=Silent).equal


def test_bad_input(tmp_path, llama, monkeypatch):
    bring_in(llama, tmp_path / "tree")
    with pytest.raises(UserError, match=r"--save .*: is there already; nothing is overwritten"):
        bring_in(llama, tmp_path / "tree")
    with pytest.raises(UserError, match="--format gguf: unknown"):
        bring_out(tmp_path / "tree", "gguf", tmp_path / "x")
    with pytest.raises(UserError, match="--dtype int8: unknown"):
        bring_out(tmp_path / "tree", "hf", tmp_path / "x", dtype="int8")
    with pytest.raises(UserError, match=r"--format hf-llava: the model has no projector"):
        bring_out(tmp_path / "tree", "hf-llava", tmp_path / "x")
    with pytest.raises(UserError, match=r"--load .*: holds no complete"):
        bring_out(tmp_path / "tree", "hf", tmp_path / "x", step=7)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(durable_files.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="GB free; make room or give a folder on another disk"):
        bring_in(llama, tmp_path / "no-room")
    assert not (tmp_path / "no-room").exists()


def test_a_file_cut_short_while_it_is_read(tmp_path, llama):
    source = as_safetensors(llama, tmp_path / "source", shards=2)
    path = os.path.join(source, "model-00002-of-00002.safetensors")
    with open(path, "rb+") as file:
        file.truncate(os.path.getsize(path) - 10)
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors"):
        bring_in(source, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_folders_named_like_files_of_a_tokenizer_stay_behind(tmp_path, llama):
    source = shutil.copytree(llama, tmp_path / "source")
    (source / "tokenizer_old").mkdir()
    (source / "tokenizer_config.json").write_text("{}")
    bring_in(source, tmp_path / "tree")
    assert "tokenizer_config.json" in os.listdir(tmp_path / "tree" / "hf")
    assert "tokenizer_old" not in os.listdir(tmp_path / "tree" / "hf")
    bring_out(source, "hf", tmp_path / "out")
    assert "tokenizer_old" not in os.listdir(tmp_path / "out")


@pytest.fixture(scope="module")
def two_towers(tmp_path_factory, llama):
    """(checkpoint imported with the first tower, that tower, another of the same shape)."""
    base = tmp_path_factory.mktemp("towers")
    one, other = tiny_clip(base / "one"), tiny_clip(base / "other", seed=7)
    source = llava_folder(base / "llava", llama, one, ConnectorConfig("sci"))
    bring_in(source, base / "tree")
    return str(base / "tree"), one, other


@pytest.mark.parametrize("kind", ["llava", "hf-llava"])
def test_a_tower_that_was_not_trained_with_is_refused(tmp_path, two_towers, kind):
    tree, one, other = two_towers
    with pytest.raises(UserError, match=r"--vision-tower .*other: its weights are not those that .*tree was trained"):
        bring_out(tree, kind, tmp_path / "out", vision_tower=other)
    moved = shutil.copytree(one, tmp_path / "moved")
    bring_out(tree, kind, tmp_path / "out", vision_tower=str(moved))
    bring_out(tree, kind, tmp_path / "unchecked", vision_tower=other, check=False)


def test_another_tower_starts_an_export_over(tmp_path, two_towers, monkeypatch):
    tree, one, other = two_towers
    bring_out(tree, "hf-llava", tmp_path / "wanted", vision_tower=other, check=False)
    with monkeypatch.context() as patch:
        patch.setattr(durable_files.PartialFolder, "finish", _killed)
        with pytest.raises(Killed):
            bring_out(tree, "hf-llava", tmp_path / "out", vision_tower=one, check=False)
    assert (tmp_path / "out.partial" / "model.safetensors").exists()
    bring_out(tree, "hf-llava", tmp_path / "out", vision_tower=other, check=False)
    assert_same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "wanted"))


def _killed(partial) -> None:
    raise Killed


def test_an_export_that_ends_early_does_not_wait_for_its_check(tmp_path, llama, monkeypatch):
    bring_in(llama, tmp_path / "tree")
    read = []

    def endless(folder, manifest, progress):
        while True:
            read.append(1)
            progress(1)

    monkeypatch.setattr(exporter, "damaged_files", endless)
    monkeypatch.setattr(safetensors_writer.SafetensorsWriter, "write", lambda *_: _killed(None))
    with pytest.raises(Killed):
        bring_out(tmp_path / "tree", "hf", tmp_path / "out")
    assert read


def test_folders_that_are_ours_already(tmp_path, llama):
    bring_in(llama, tmp_path / "tree")
    with pytest.raises(UserError, match=r"--hf .*tree: is a checkpoint of this program already"):
        bring_in(tmp_path / "tree", tmp_path / "again")
    with pytest.raises(UserError, match=r"--load .*release: is one iteration .*; give the folder .*tree$"):
        bring_out(tmp_path / "tree" / "release", "hf", tmp_path / "out")


def test_settings_that_nobody_knows_are_not_noted(tmp_path, llama):
    with pytest.raises(UserError, match="--version v9: unknown"):
        bring_in(llama, tmp_path / "tree", version="v9")
    with pytest.raises(UserError, match="--image-aspect-ratio crop: unknown"):
        bring_in(llama, tmp_path / "tree", image_aspect_ratio="crop")
    with pytest.raises(UserError, match="--image-aspect-ratio anyres: the folder of an AnyRes model says so itself"):
        bring_in(llama, tmp_path / "tree", image_aspect_ratio="anyres")
    assert os.listdir(tmp_path) == []


def changed_config(source, target, **entries) -> str:
    shutil.copytree(source, target)
    path = os.path.join(target, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({**config, **entries}, file)
    return str(target)


def test_verify_names_settings_that_no_tensor_shows(tmp_path, llama, two_towers):
    tree, one, _ = two_towers
    other = changed_config(llama, tmp_path / "base", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert verify(llama, other, progress=Silent).differences == ["config: rope_theta 10000.0 in A, 500000.0 in B"]
    dci = llava_folder(tmp_path / "dci", llama, one, ConnectorConfig("dci"))
    differences = verify(tree, dci, progress=Silent).differences
    assert differences[0] == "config: mm_dense_connector_type sci in A, dci in B"
    assert differences[1].startswith("config: layers of the tower ")
    assert len(differences) == 2


def test_verify_names_settings_of_stock_folders(tmp_path, two_towers):
    tree = two_towers[0]
    bring_out(tree, "hf-llava", tmp_path / "out")
    assert verify(tree, str(tmp_path / "out"), progress=Silent).equal
    other = changed_config(tmp_path / "out", tmp_path / "other", vision_feature_layer=[4, 1, 3])
    expected = ["config: vision_feature_layer [5, 1, 3] in A, [4, 1, 3] in B"]
    for mine in (tree, str(tmp_path / "out")):
        assert verify(mine, other, progress=Silent).differences == expected


def test_verify_of_a_language_model_and_a_stock_folder(tmp_path, llama, two_towers):
    bring_out(two_towers[0], "hf-llava", tmp_path / "out")
    result = verify(llama, str(tmp_path / "out"), progress=Silent)
    # The row of <image>.
    assert [line.split(":")[0] for line in result.differences] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert len(result.notes) == 2


def test_verify_of_unrelated_vocabularies(tmp_path, two_towers):
    bring_out(two_towers[0], "hf-llava", tmp_path / "out")
    larger = tiny_llama(tmp_path / "larger", layers=2, vocab=400)
    source = llava_folder(tmp_path / "llava", larger, two_towers[1], ConnectorConfig("sci"))
    result = verify(source, str(tmp_path / "out"), progress=Silent)
    assert any("shape [400, 64] in A, [301, 64] in B" in line for line in result.differences)


def test_a_step_of_folders_without_steps(llama):
    with pytest.raises(UserError, match=r"--step 4: neither .* is a checkpoint"):
        verify(llama, llama, step=4, progress=Silent)


def test_values_that_fp16_has_not_are_refused(tmp_path, llama):
    source = shutil.copytree(llama, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][5] = 70000.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--dtype fp16: model\.norm\.weight holds values that fp16 has not"):
        bring_out(source, "hf", tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()
    bring_out(source, "hf", tmp_path / "out", dtype="bf16")
