"""What a run starts from, decided on folders that look like Megatron's, and what counts as a complete checkpoint."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace

import pytest

from dc_megatron.config import ConnectorConfig, ImageTiling, LanguageConfig, VisionConfig
from dc_megatron.errors import UserError
from dc_megatron.training.argv import translate
from dc_megatron.training.resume import (
    Start,
    choose_start,
    refuse_another_batch,
    refuse_another_model,
    refuse_damaged_files,
    refuse_other_groups,
    refuse_other_tower_weights,
    what_learns,
)
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.durable_files import hash_file
from dc_megatron.weights.manifest import MANIFEST, write_manifest
from tests.helpers.tiny_models import tiny_clip, tiny_llama


def save(folder, iteration: int | None, complete: bool = True, **content) -> None:
    """A tree of ``iteration`` (None: of a converted model) as the engine and the save hook leave it."""
    target = folder / (checkpoint_folder.RELEASE if iteration is None else f"iter_{iteration:07d}")
    target.mkdir(parents=True)
    (target / "__0_0.distcp").write_bytes(b"x" * (iteration or 1))
    (target / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    manifest(target, **{"iteration": iteration, "plan_hash": "plan", **content})
    if not complete:
        (target / "__0_0.distcp").unlink()
    (folder / "hf").mkdir(exist_ok=True)
    (folder / "hf" / checkpoint_folder.DESCRIPTION).touch()
    (folder / checkpoint_folder.TRACKER).write_text("release" if iteration is None else str(iteration))


def manifest(target, **content) -> None:
    files = {name: hash_file(target / name) for name in os.listdir(target) if name != MANIFEST}
    write_manifest(str(target), content, files)


def start(line: str):
    return choose_start(translate(shlex.split(line)))


def options(words: list[str]) -> dict[str, list[str]]:
    """Option -> values; the last one wins, as in the engine."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            found[word] = []
        else:
            found[list(found)[-1]].append(word)
    return found


@pytest.fixture
def own(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    return folder


@pytest.fixture
def other(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    return folder


def assert_loads(begun, folder, iteration: int, resumes: bool) -> None:
    got = options(begun.words)
    assert got["--load"] == [str(folder)]
    assert got["--ckpt-step"] == [str(iteration)]
    assert begun.loads
    assert begun.resumes is resumes
    assert ("--override-opt_param-scheduler" in got) is resumes
    assert ("--finetune" in got) is not resumes


def test_nothing_to_load(own):
    begun = start(f"--output_dir {own}")
    assert (begun.loads, begun.resumes, begun.plan_hash, begun.notes) == (False, False, None, [])
    assert not {"--load", "--ckpt-step"} & set(begun.words)


def test_a_folder_that_is_not_there_yet(tmp_path):
    assert not start(f"--output_dir {tmp_path / 'new'}").loads


def test_without_a_folder_to_save_to():
    assert not start("--learning_rate 1e-3").loads


def test_an_own_complete_checkpoint_is_resumed(own):
    save(own, 10, plan_hash="first")
    save(own, 20, plan_hash="second")
    begun = start(f"--output_dir {own}")
    assert_loads(begun, own, 20, resumes=True)
    assert begun.plan_hash == "second"
    assert "resuming from iteration 20" in " ".join(begun.notes)


def test_the_trackers_word_does_not_count(own):
    """It may be truncated, or name an iteration that was never finished."""
    save(own, 10)
    (own / checkpoint_folder.TRACKER).write_text("")
    assert_loads(start(f"--output_dir {own}"), own, 10, resumes=True)


def test_incomplete_checkpoints_are_passed_over_and_named(own):
    save(own, 10)
    save(own, 20, complete=False)
    save(own, 30, complete=False)
    begun = start(f"--output_dir {own}")
    assert_loads(begun, own, 10, resumes=True)
    assert f"{own}: iteration 30, 20 was not written to its end; iteration 10 is taken" in begun.notes


def test_only_incomplete_checkpoints_of_its_own_start_anew_and_say_so(own):
    save(own, 10, complete=False)
    begun = start(f"--output_dir {own}")
    assert (begun.loads, begun.resumes) == (False, False)
    assert "iteration 10 was not written to its end; nothing is taken" in begun.notes[0]


@pytest.mark.parametrize("finetune", ["", " --finetune"])
def test_an_own_checkpoint_goes_before_load(own, other, finetune):
    """A second launch of the same command line continues; it does not start from the other weights again."""
    save(own, 4)
    save(other, 100)
    assert_loads(start(f"--output_dir {own} --load {other}{finetune}"), own, 4, resumes=True)


def test_load_elsewhere_resumes_there(own, other):
    save(other, 100, plan_hash="theirs")
    begun = start(f"--output_dir {own} --load {other}")
    assert_loads(begun, other, 100, resumes=True)
    assert begun.plan_hash == "theirs"


def test_load_elsewhere_with_finetune_takes_only_weights(own, other):
    save(other, 100, plan_hash="theirs")
    begun = start(f"--output_dir {own} --load {other} --finetune")
    assert_loads(begun, other, 100, resumes=False)
    assert begun.plan_hash is None


def test_load_elsewhere_falls_back_to_a_complete_one(own, other):
    save(other, 100)
    save(other, 200, complete=False)
    begun = start(f"--output_dir {own} --load {other}")
    assert_loads(begun, other, 100, resumes=True)
    assert "iteration 200 was not written to its end; iteration 100 is taken" in begun.notes[0]


def test_load_the_empty_folder_that_is_saved_to(own):
    """Launchers that restart name one folder for both; the first time there is nothing."""
    begun = start(f"--output_dir {own} --load {own} --finetune")
    assert (begun.loads, begun.resumes) == (False, False)
    assert not {"--load", "--finetune"} & set(begun.words)


def test_load_the_folder_that_is_saved_to_by_another_name(own, tmp_path):
    os.symlink(own, tmp_path / "link")
    assert not start(f"--output_dir {own} --load {tmp_path / 'link'}").loads
    save(own, 6)
    assert_loads(start(f"--output_dir {own} --load {tmp_path / 'link'}"), own, 6, resumes=True)


TRACKERS = ["release\n", "7", "", "rubbish", "\0\xff", None]


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("finetune", ["", " --finetune"])
def test_a_converted_model_gives_its_weights_whatever_the_tracker_says(own, other, tracker, finetune):
    save(other, None)
    if tracker is None:
        (other / checkpoint_folder.TRACKER).unlink()
    else:
        (other / checkpoint_folder.TRACKER).write_text(tracker)
    begun = start(f"--output_dir {own} --load {other}{finetune}")
    assert (begun.loads, begun.resumes, begun.iteration) == (True, False, None)
    assert begun.tree == str(other / "release")
    got = options(begun.words)
    assert got["--load"] == [str(other)]
    assert "--finetune" in got
    assert "--ckpt-step" not in got
    assert f"weights are taken from the converted model in {other}" in begun.notes


def test_an_iteration_goes_before_the_converted_model_beside_it(own, other):
    save(other, None)
    save(other, 8)
    save(other, 12, complete=False)
    assert_loads(start(f"--output_dir {own} --load {other}"), other, 8, resumes=True)
    (other / "iter_0000008" / MANIFEST).unlink()
    begun = start(f"--output_dir {own} --load {other}")
    assert begun.tree == str(other / "release")
    assert "iteration 12, 8 was not written to its end; the converted model is taken" in begun.notes[0]


def test_a_model_converted_into_the_folder_that_is_saved_to(own, other):
    save(own, None)
    for line in (f"--output_dir {own}", f"--output_dir {own} --load {own}"):
        begun = start(line)
        assert (begun.tree, begun.resumes) == (str(own / "release"), False)
    save(own, 4)
    assert_loads(start(f"--output_dir {own}"), own, 4, resumes=True)


def test_nothing_at_load_is_refused(own, other, tmp_path):
    with pytest.raises(UserError, match=r"--load .*absent: no such folder"):
        start(f"--output_dir {own} --load {tmp_path / 'absent'}")
    with pytest.raises(UserError, match=r"--load .*other: holds no complete checkpoint; give"):
        start(f"--output_dir {own} --load {other}")
    save(other, 5, complete=False)
    with pytest.raises(UserError, match=r"holds no complete checkpoint \(iter_0000005: __0_0.distcp is missing\)"):
        start(f"--output_dir {own} --load {other}")
    save(other, None, complete=False)
    with pytest.raises(UserError, match=r"no complete checkpoint \(iter_0000005: .*; release: __0_0.distcp is missing"):
        start(f"--output_dir {own} --load {other}")


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["metadata.json"], "a torch_dist tree"),
        (["mp_rank_00/model_optim_rng.pt"], "a legacy tree (mp_rank_XX)"),
        ([".metadata", "__0_0.distcp"], "an fsdp_dtensor or torch_dcp tree"),
        (["something"], "a tree of another program"),
    ],
)
@pytest.mark.parametrize("name", ["iter_0000005", "release"])
def test_trees_of_other_programs_are_refused_with_what_to_do(own, other, files, kind, name):
    """Also in --output_dir: a save would take the place of another program's iteration."""
    for file in files:
        (other / name / file).parent.mkdir(parents=True, exist_ok=True)
        (other / name / file).write_text('{"sharded_backend": "torch_dist"}')
    for line in (f"--output_dir {own} --load {other}", f"--output_dir {other}"):
        with pytest.raises(UserError, match=r"tools/convert.py import --hf DIR") as refused:
            start(line)
        assert f"{other}: {name} has no {MANIFEST}" in str(refused.value)
        assert kind in str(refused.value)


def test_other_words_for_the_engine_are_kept(own):
    save(own, 10)
    begun = start(f"--output_dir {own} --use_distributed_optimizer --tensor-model-parallel-size 2")
    got = options(begun.words)
    assert got["--tensor-model-parallel-size"] == ["2"]
    assert "--use-distributed-optimizer" in got


def test_a_manifest_agrees_with_the_files(own):
    save(own, 10)
    found = checkpoint_folder.read_manifest(str(own), 10)
    assert found.content == {"iteration": 10, "plan_hash": "plan"}
    assert {name: digest.size for name, digest in found.files.items()} == {"__0_0.distcp": 10, "metadata.json": 33}


@pytest.mark.parametrize(
    "damage", ["shorter", "longer", "removed", "half a manifest", "no files in it", "of an earlier version"]
)
def test_files_that_disagree_with_the_manifest_make_a_checkpoint_incomplete(own, damage):
    save(own, 10)
    save(own, 20)
    target = own / "iter_0000020"
    written = target / MANIFEST
    if damage == "shorter":
        os.truncate(target / "__0_0.distcp", 19)
    elif damage == "longer":
        (target / "__0_0.distcp").write_bytes(b"x" * 21)
    elif damage == "removed":
        (target / "metadata.json").unlink()
    elif damage == "half a manifest":
        os.truncate(written, written.stat().st_size // 2)
    elif damage == "no files in it":
        written.write_text(json.dumps({"iteration": 20}))
    else:
        written.write_text(json.dumps({"iteration": 20, "files": {"__0_0.distcp": 20, "metadata.json": 33}}))
    assert checkpoint_folder.newest_complete(str(own)) == (10, [20])
    assert checkpoint_folder.find_tree(str(own)).iteration == 10
    assert checkpoint_folder.find_tree(str(own), 20) is None


def test_files_of_others_do_not_make_a_checkpoint_incomplete(own):
    save(own, 20)
    for name in (".nfs000000000123", ".DS_Store", ".metadata.json.Xy3z"):
        (own / "iter_0000020" / name).write_bytes(b"x")
    assert checkpoint_folder.newest_complete(str(own)) == (20, [])


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("name", ["__0_0.distcp", "metadata.json"])
def test_a_flipped_bit_is_found_by_one_rank_before_loading(own, world_size, name):
    save(own, 8)
    save(own, 10)
    begun = start(f"--output_dir {own}")
    for rank in range(world_size):
        refuse_damaged_files(begun, rank, world_size)
    path = own / "iter_0000010" / name
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    said = []
    for rank in range(world_size):
        try:
            refuse_damaged_files(begun, rank, world_size)
        except UserError as error:
            said.append(str(error))
    (message,) = said
    assert message.startswith(f"--verify-checkpoint: {own / 'iter_0000010'}: {name} is damaged")
    assert message.endswith("iteration 8 is complete as well: --ckpt-step 8 goes on from there")


def test_a_damaged_checkpoint_without_an_older_one(own, other):
    for iteration, words in ((None, "convert the model again"), (10, "there is no older complete iteration")):
        folder = own if iteration is None else other
        save(folder, iteration)
        begun = start(f"--output_dir {folder}")
        (folder / os.path.basename(begun.tree) / "metadata.json").write_text("{" * 33)
        with pytest.raises(UserError, match=words):
            refuse_damaged_files(begun, 0, 1)
    refuse_damaged_files(Start([], []), 0, 1)


def test_only_iteration_folders_count(own):
    save(own, 3)
    for name in ("iter_0000009.tmp", ".saving-iter_0000009", "release", "iter_x"):
        (own / name).mkdir()
    assert checkpoint_folder.iterations(str(own)) == [3]
    assert checkpoint_folder.iterations(str(own / "absent")) == []


def test_iterations_are_ordered_as_numbers(own):
    save(own, 9_999_999)
    save(own, 10_000_000)
    assert checkpoint_folder.newest_complete(str(own)) == (10_000_000, [])


TILING = ImageTiling(28, 16, 4)
ANYRES = replace(TILING, pinpoints=((28, 56), (56, 28)), merge="spatial_unpad")


@pytest.fixture
def trained(tmp_path):
    """A checkpoint with its side files, and what it was trained with."""
    language = LanguageConfig.from_folder(tiny_llama(tmp_path / "llama", layers=2))
    vision = VisionConfig.from_folder(tiny_clip(tmp_path / "clip"))
    folder = tmp_path / "run"
    save(folder, 4)
    description = checkpoint_folder.CheckpointDescription(
        vision_tower=vision.path,
        vision_tower_hash=checkpoint_folder.hash_folder_weights(vision.path),
        mm_dense_connector_type="dci",
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        version="v1",
        image_aspect_ratio="pad",
        model_max_length=128,
    )
    checkpoint_folder.write_side_files(str(folder), language.path, description)
    return folder, language, vision


def test_a_checkpoint_of_another_connector_is_refused(trained):
    folder, language, vision = trained
    begun = start(f"--output_dir {folder}")
    refuse_another_model(begun, language, vision, ConnectorConfig("dci"), TILING, False)
    with pytest.raises(UserError, match=r"--mm_dense_connector_type: .*dense_connector_type dci there, sci here"):
        refuse_another_model(begun, language, vision, ConnectorConfig("sci"), TILING, False)
    with pytest.raises(UserError, match="select_layer -2 there, -3 here"):
        refuse_another_model(begun, language, vision, ConnectorConfig("dci", select_layer=-3), TILING, False)
    # A projector file beside another run's weights brings its own connector.
    weights_only = start(f"--load {folder} --finetune --output_dir {folder}-2")
    refuse_another_model(weights_only, language, vision, ConnectorConfig("sci"), TILING, True)
    with pytest.raises(UserError, match="sci here"):
        refuse_another_model(weights_only, language, vision, ConnectorConfig("sci"), TILING, False)


def test_a_resumed_run_cuts_pictures_as_before(trained):
    folder, language, vision = trained
    connector, begun = ConnectorConfig("dci"), start(f"--output_dir {folder}")
    with pytest.raises(UserError, match=r"--image_aspect_ratio: .* was trained with pad, this is anyres"):
        refuse_another_model(begun, language, vision, connector, ANYRES, False)
    # Stage 2 may begin with AnyRes on the weights of a stage 1 without.
    weights_only = start(f"--load {folder} --finetune --output_dir {folder}-2")
    refuse_another_model(weights_only, language, vision, connector, ANYRES, False)

    described = checkpoint_folder.read_description(str(folder))
    grid = [list(size) for size in ANYRES.pinpoints]
    described = replace(described, image_aspect_ratio="anyres", image_grid_pinpoints=grid)
    for merge in ("", "spatial_unpad"):
        described = replace(described, mm_patch_merge_type=merge)
        checkpoint_folder.write_side_files(str(folder), language.path, described)
        refuse_another_model(begun, language, vision, connector, ANYRES, False)
    with pytest.raises(UserError, match="was trained with anyres, this is no anyres"):
        refuse_another_model(begun, language, vision, connector, TILING, False)
    with pytest.raises(UserError, match="merge spatial_unpad there, spatial here"):
        refuse_another_model(begun, language, vision, connector, replace(ANYRES, merge="spatial"), False)
    with pytest.raises(UserError, match=r"--image_grid_pinpoints.*not what .* was trained with"):
        refuse_another_model(begun, language, vision, connector, replace(ANYRES, pinpoints=((28, 56),)), False)


def test_a_checkpoint_of_another_language_model_or_tower_is_refused(trained, tmp_path):
    folder, language, vision = trained
    begun = start(f"--output_dir {folder}")
    connector = ConnectorConfig("dci")
    with pytest.raises(UserError, match=r"--model_name_or_path: .*vocab_size 256 there, 512 here"):
        refuse_another_model(begun, replace(language, vocab_size=512), vision, connector, TILING, False)
    with pytest.raises(UserError, match=r"--vision_tower: .*num_hidden_layers 6 there, 5 here"):
        refuse_another_model(begun, language, replace(vision, num_hidden_layers=5), connector, TILING, False)
    refuse_other_tower_weights(begun, vision.path, False)
    with pytest.raises(UserError, match="its weights are not those"):
        refuse_other_tower_weights(begun, tiny_clip(tmp_path / "other-clip", seed=3), False)


def test_the_towers_hash_is_of_the_files_that_are_loaded(tmp_path):
    tower = tmp_path / "clip"
    tiny_clip(tower)
    before = checkpoint_folder.hash_folder_weights(str(tower))
    (tower / "pytorch_model.bin").write_bytes(b"the same weights in the old form")
    (tower / "consolidated.safetensors").write_bytes(b"another program's")
    assert checkpoint_folder.hash_folder_weights(str(tower)) == before
    weights = (tower / "model.safetensors").read_bytes()
    (tower / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert checkpoint_folder.hash_folder_weights(str(tower)) != before


def test_the_towers_hash_follows_an_index(tmp_path):
    for name in ("one.safetensors", "two.safetensors", "spare.safetensors"):
        (tmp_path / name).write_text(name)
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    before = checkpoint_folder.hash_folder_weights(str(tmp_path))
    (tmp_path / "spare.safetensors").unlink()
    assert checkpoint_folder.hash_folder_weights(str(tmp_path)) == before
    (tmp_path / "two.safetensors").write_text("changed")
    assert checkpoint_folder.hash_folder_weights(str(tmp_path)) != before
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"--vision_tower .*1 of 2 files .* missing: two\.safetensors"):
        checkpoint_folder.hash_folder_weights(str(tmp_path))


def test_the_towers_path_holds_from_everywhere(tmp_path, monkeypatch):
    language = tiny_llama(tmp_path / "llama", layers=2)
    tiny_clip(tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    description = checkpoint_folder.CheckpointDescription("clip", "0", "dci", "mlp2x_gelu", -2, "v1", "pad", 128)
    checkpoint_folder.write_side_files("run", language, description)
    described = checkpoint_folder.read_description("run")
    assert described == replace(description, vision_tower=str(tmp_path / "clip"))
    assert os.path.isfile(tmp_path / "run" / "hf" / "vision_tower" / "config.json")


def test_tokens_are_counted_on_where_a_run_resumes(own, other):
    save(other, 4, consumed_tokens={"processed": 100, "supervised": 30})
    assert start(f"--output_dir {own} --load {other}").consumed_tokens == {"processed": 100, "supervised": 30}
    assert start(f"--output_dir {own} --load {other} --finetune").consumed_tokens == {}


def test_a_language_model_imported_alone_is_taken_with_any_tower_and_connector(tmp_path):
    language = LanguageConfig.from_folder(tiny_llama(tmp_path / "llama", layers=2))
    vision = VisionConfig.from_folder(tiny_clip(tmp_path / "clip"))
    save(tmp_path / "imported", None)
    alone = checkpoint_folder.CheckpointDescription("", "", "", "mlp2x_gelu", -2, "", "", 2048)
    checkpoint_folder.write_side_files(str(tmp_path / "imported"), language.path, alone)
    assert checkpoint_folder.read_description(str(tmp_path / "imported")) == alone
    begun = start(f"--load {tmp_path / 'imported'} --output_dir {tmp_path / 'run'}")
    for kind in ("dci", "sti"):
        refuse_another_model(begun, language, vision, ConnectorConfig(kind), TILING, False)
    refuse_other_tower_weights(begun, vision.path, False)
    with pytest.raises(UserError, match="vocab_size"):
        refuse_another_model(begun, replace(language, vocab_size=512), vision, ConnectorConfig("dci"), TILING, False)


def test_a_checkpoint_without_its_side_files_is_refused(own, tmp_path):
    language = LanguageConfig.from_folder(tiny_llama(tmp_path / "llama", layers=2))
    vision = VisionConfig.from_folder(tiny_clip(tmp_path / "clip"))
    save(own, 4)
    (own / "hf" / checkpoint_folder.DESCRIPTION).unlink()
    with pytest.raises(UserError, match=r"has no hf/dc_megatron.json; .* copy its hf folder as well"):
        refuse_another_model(start(f"--output_dir {own}"), language, vision, ConnectorConfig("dci"), TILING, False)


def test_a_typed_step_is_honoured(own, other):
    for folder in (own, other):
        save(folder, 4)
        save(folder, 8)
    assert_loads(start(f"--output_dir {own} --ckpt-step 4"), own, 4, resumes=True)
    begun = start(f"--load {other} --finetune --output_dir {own}-new --ckpt-step 4")
    assert_loads(begun, other, 4, resumes=False)
    with pytest.raises(UserError, match=r"--ckpt-step 6: --output_dir .* holds no complete checkpoint of that step"):
        start(f"--output_dir {own} --ckpt-step 6")


def test_another_global_batch_is_refused(own):
    save(own, 4, global_batch_size=128)
    begun = start(f"--output_dir {own}")
    refuse_another_batch(begun, 128)
    with pytest.raises(UserError, match=r"--global-batch-size 64 .* give --global-batch-size 128"):
        refuse_another_batch(begun, 64)
    # Weights alone carry no position.
    refuse_another_batch(start(f"--load {own} --finetune --output_dir {own}-2"), 64)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--trainable connector", "--trainable connector was trained with connector,llm,vision_tower"),
        ("--learning_rate 2e-4", "--learning_rate 0.0002 was trained with 0.001"),
        ("--mm_projector_lr 1e-5", "--mm_projector_lr 1e-05 was trained with 0.01"),
        ("--vision_tower_lr 1e-5", "--vision_tower_lr 1e-05 was trained with 0.001 --finetune"),
        ("--weight_decay 0.1 --max_steps 9", ""),
    ],
)
def test_a_run_resumes_with_the_parts_and_rates_of_its_optimizer(tmp_path, line, words):
    first = "--learning_rate 1e-3 --mm_projector_lr 1e-2 --trainable connector,llm,vision_tower"
    own = tmp_path / "own"
    save(own, 4, learning=what_learns(translate(shlex.split(first)).settings))
    settings = translate(shlex.split(f"{first} {line}")).settings
    begun = start(f"--output_dir {own}")
    if not words:
        refuse_other_groups(begun, settings)
        return
    with pytest.raises(UserError) as caught:
        refuse_other_groups(begun, settings)
    assert all(word in str(caught.value) for word in words.split())


def test_a_checkpoint_that_does_not_say_what_learned_is_resumed(tmp_path):
    save(tmp_path / "own", 4)
    refuse_other_groups(start(f"--output_dir {tmp_path / 'own'}"), translate(["--learning_rate", "1"]).settings)
