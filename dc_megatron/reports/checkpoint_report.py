"""What a folder of weights holds, whether it is complete, and whether its files are those that were written.

A report is a dictionary of plain values:

    kind, title, path, size          what it is and how many bytes lie there
    hashes                           whether a manifest says what the files' hashes were
    complete, verified               True, False, or None where nobody can say; ``verified`` only after a check
    problems, notes                  lines; a problem is damage or something missing, with the file's name
    model                            shape of the language model, tower, connector, template
    checkpoints                      one entry a tree: iteration, position in the data, files, bytes
    parts, tensors                   what is stored, in groups and one by one
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from dc_megatron.config import LanguageConfig, VisionConfig, tower_family
from dc_megatron.errors import UserError
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.checkpoint_folder import DESCRIPTION, RELEASE, TRACKER
from dc_megatron.weights.manifest import MANIFEST, Manifest, damaged_files, read_manifest
from dc_megatron.weights.model_folder import open_model
from dc_megatron.weights.projector_files import BIN_NAME, SAFETENSORS_NAME
from dc_megatron.weights.safetensors_files import open_checkpoint, open_file
from dc_megatron.weights.staged_iteration import STAGING
from dc_megatron.weights.tensor_reader import TensorReader
from dc_megatron.weights.torch_dist_tree import TorchDistTree
from dc_megatron.weights.weight_files import FILES

_OPTIMIZER = "optimizer."
_PROJECTORS = (SAFETENSORS_NAME, BIN_NAME)
# Takes the bytes that will be read; gives what is called with those of every block.
ProgressFactory = Callable[[int], Callable[[int], object] | None]


def examine(path: str, *, check: bool = False, progress: ProgressFactory = lambda total: None) -> dict:
    """The report on a file or folder. ``check``: read every file that a manifest lists and compare its hash.

    UserError: nothing there, or nothing that is known here.
    """
    if os.path.isfile(path):
        return _projector(path, path)
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such file or folder")
    names = set(os.listdir(path))
    base = os.path.basename(os.path.abspath(path))
    if base.startswith(STAGING):
        return _unfinished_save(path)
    if base.endswith(".partial"):
        return _unfinished_conversion(path)
    if checkpoint_folder.iterations(path) or RELEASE in names or os.path.isfile(os.path.join(path, "hf", DESCRIPTION)):
        return _checkpoint(path, check, progress)
    if checkpoint_folder.tree_kind(path) != "unknown" or base == RELEASE or base.startswith("iter_"):
        return _single_tree(path, check, progress)
    if names & set(FILES) or (MANIFEST in names and "config.json" in names):
        return _model_folder(path, check, progress)
    projector = next((name for name in _PROJECTORS if name in names), None)
    if projector:
        return _projector(os.path.join(path, projector), path)
    raise UserError(
        f"{path}: no checkpoint, model or projector that is known here; give an --output_dir of training, a folder that"
        " tools/convert.py wrote, a Hugging Face, LLaVA or llava-hf folder, or an mm_projector file"
    )


def _report(kind: str, title: str, path: str, **more) -> dict:
    empty = {"complete": None, "verified": None, "problems": [], "notes": [], "model": None, "checkpoints": []}
    about = {"kind": kind, "title": title, "path": os.path.abspath(path), "size": _size(path)}
    return {**about, "hashes": False, **empty, "parts": [], "tensors": [], **more}


def _size(path: str) -> int:
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(os.lstat(os.path.join(parent, name)).st_size for parent, _, names in os.walk(path) for name in names)


# Checkpoints of training and import


def _checkpoint(path: str, check: bool, progress: ProgressFactory) -> dict:
    others = checkpoint_folder.trees_of_others(path)
    if others:
        return _tree_of_others(path, os.path.join(path, others[0]), [checkpoint_folder.what_of_others(path, others)])
    iterations = checkpoint_folder.iterations(path)
    released = os.path.isdir(checkpoint_folder.tree_folder(path, None))
    trees: list[int | None] = [*([None] if released else []), *iterations]
    if released and not iterations:
        report = _report("import", "converted model (give it to --load)", path)
    else:
        report = _report("training", "training checkpoint", path)
    report["checkpoints"] = [_tree_entry(checkpoint_folder.tree_folder(path, tree)) for tree in trees]
    report["problems"] = [f"{entry['name']}: {entry['problem']}" for entry in report["checkpoints"] if entry["problem"]]
    report["complete"] = bool(trees) and not report["problems"]
    report["hashes"] = any(entry["complete"] for entry in report["checkpoints"])
    if not trees:
        report["problems"].append("no iteration has been saved to its end")
    report["notes"] += _notes_of_folder(path)
    _add_description(report, path)
    newest = checkpoint_folder.find_tree(path)
    if newest is not None:
        _add_tree_tensors(report, newest.path)
    if check:
        _check_trees(report, path, trees, progress)
    return report


def _tree_entry(tree: str) -> dict:
    found, problem = read_manifest(tree)
    position = found.content if found else {}
    name = os.path.basename(tree)
    return {
        "name": name,
        "iteration": None if name == RELEASE else position.get("iteration"),
        "complete": found is not None,
        "problem": problem,
        "files": len(found.files) if found else len(os.listdir(tree)),
        "size": _size(tree),
        "consumed_samples": position.get("consumed_samples"),
        "consumed_tokens": position.get("consumed_tokens"),
        "global_batch_size": position.get("global_batch_size"),
        "source": position.get("source"),
    }


def _notes_of_folder(path: str) -> list[str]:
    notes = [
        f"{name}: a save that is going on or was cut off; it stands for nothing, and the next save removes it"
        for name in sorted(os.listdir(path))
        if name.startswith(STAGING)
    ]
    newest = checkpoint_folder.find_tree(path)
    try:
        with open(os.path.join(path, TRACKER), encoding="utf-8", errors="replace") as file:
            tracker = file.read().strip()
    except OSError:
        tracker = ""
    expected = "" if newest is None else RELEASE if newest.iteration is None else str(newest.iteration)
    if tracker != expected:
        notes.append(
            f"{TRACKER} says '{tracker[:40]}' and the newest complete tree is"
            f" {os.path.basename(newest.path) if newest else 'none'}; only other programs read it"
        )
    return notes


def _add_description(report: dict, folder: str) -> None:
    side = os.path.join(folder, "hf")
    try:
        described = checkpoint_folder.read_description(folder, "inspect")
        language = LanguageConfig.from_folder(side, "inspect")
        vision = None
        if os.path.isfile(os.path.join(side, "vision_tower", "config.json")):
            vision = VisionConfig.from_folder(os.path.join(side, "vision_tower"), "inspect")
    except UserError as error:
        report["problems"].append(str(error).removeprefix(f"inspect {folder}: "))
        report["complete"] = False
        return
    report["model"] = {
        **_language(language),
        "vision_tower": _tower(vision, described.vision_tower),
        "connector": described.mm_dense_connector_type or None,
        "template": described.version or None,
        "image_aspect_ratio": described.image_aspect_ratio or None,
        "mm_patch_merge_type": described.merge_type if described.image_grid_pinpoints else None,
        "model_max_length": described.model_max_length,
    }


def _language(language: LanguageConfig) -> dict:
    return {
        "family": language.model_type,
        "layers": language.num_hidden_layers,
        "hidden_size": language.hidden_size,
        "attention_heads": language.num_attention_heads,
        "key_value_heads": language.num_key_value_heads,
        "vocabulary": language.vocab_size,
    }


def _tower(vision: VisionConfig | None, path: str) -> dict | None:
    if vision is None and not path:
        return None
    shape = {}
    if vision is not None:
        shape = {"family": vision.family, "layers": vision.num_hidden_layers, "hidden_size": vision.hidden_size}
        shape["image_size"] = vision.image_size
    return {**shape, "path": path}


def _add_tree_tensors(report: dict, tree_folder: str) -> None:
    try:
        tree = TorchDistTree(tree_folder, "inspect")
    except UserError as error:
        report["problems"].append(str(error).removeprefix("inspect "))
        report["complete"] = False
        return
    _add_tensors(report, {name: (found.shape, found.dtype) for name, found in tree.tensors.items()})


def _add_tensors(report: dict, tensors: dict) -> None:
    """``tensors``: name -> (shape, dtype). Parts are what stands before the first dot of a name."""
    report["tensors"] = [
        {"name": name, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
        for name, (shape, dtype) in sorted(tensors.items())
    ]
    parts: dict[tuple[str, str], list[int]] = {}
    for tensor in report["tensors"]:
        counted = parts.setdefault((tensor["name"].split(".")[0], tensor["dtype"]), [0, 0])
        counted[0] += 1
        counted[1] += _elements(tensor)
    report["parts"] = [
        {"name": name, "dtype": dtype, "tensors": count, "elements": elements}
        for (name, dtype), (count, elements) in parts.items()
    ]
    if report["model"] is not None:
        model = (tensor for tensor in report["tensors"] if not tensor["name"].startswith(_OPTIMIZER))
        report["model"]["parameters"] = sum(_elements(tensor) for tensor in model)


def _elements(tensor: dict) -> int:
    count = 1
    for size in tensor["shape"]:
        count *= size
    return count


def _check_trees(report: dict, folder: str, trees: list[int | None], progress: ProgressFactory) -> None:
    """Compare the files of all complete trees with their hashes, and a tower in the folder with the recorded one."""
    found = {tree: checkpoint_folder.read_manifest(folder, tree) for tree in trees}
    told = progress(sum(_bytes(manifest) for manifest in found.values() if manifest))
    for entry, tree in zip(report["checkpoints"], trees, strict=True):
        manifest = found[tree]
        if manifest is None:
            continue
        entry["damaged"] = damaged_files(os.path.join(folder, entry["name"]), manifest, progress=told)
        report["problems"] += [f"{entry['name']}/{line}" for line in entry["damaged"]]
    report["problems"] += _damaged_tower(folder)
    report["verified"] = bool(trees) and not report["problems"]


def _damaged_tower(folder: str) -> list[str]:
    """A converted folder may carry its tower, which the description has a hash of."""
    tower = os.path.join(folder, "hf", "vision_tower")
    try:
        recorded = checkpoint_folder.read_description(folder).vision_tower_hash
        if not recorded or not any(os.path.isfile(os.path.join(tower, name)) for name in FILES):
            return []
        same = checkpoint_folder.hash_folder_weights(tower) == recorded
    except (UserError, OSError) as error:
        return [f"hf/vision_tower: {error}"]
    return [] if same else ["hf/vision_tower: its weights are not those that were written"]


def _bytes(manifest: Manifest) -> int:
    return sum(digest.size for digest in manifest.files.values())


def _single_tree(path: str, check: bool, progress: ProgressFactory) -> dict:
    """One iteration, named by its own folder."""
    absolute = os.path.abspath(path)
    kind = checkpoint_folder.tree_kind(absolute)
    if kind not in ("torch_dist", "unknown"):
        return _tree_of_others(path, path, [])
    manifest, problem = read_manifest(absolute)
    parent, name = os.path.split(absolute)
    ours = os.path.isfile(os.path.join(absolute, MANIFEST)) or os.path.isfile(os.path.join(parent, "hf", DESCRIPTION))
    if kind == "torch_dist" and not ours:
        return _tree_of_others(path, path, [])
    report = _report("tree", "one iteration of a training checkpoint", path, complete=manifest is not None)
    if name == RELEASE:
        report["title"] = "tree of a converted model"
    report["problems"] = [problem] if problem else []
    report["hashes"] = manifest is not None
    report["checkpoints"] = [_tree_entry(absolute)]
    if os.path.isfile(os.path.join(parent, "hf", DESCRIPTION)):
        _add_description(report, parent)
    if manifest is not None:
        _add_tree_tensors(report, absolute)
        if check:
            report["problems"] += damaged_files(absolute, manifest, progress=progress(_bytes(manifest)))
    if check:
        report["verified"] = not report["problems"]
    return report


_OTHERS = {
    "torch_dist": ("torch_dist", "torch_dist tree of another program"),
    "mp_rank": ("mp_rank", "legacy Megatron tree (mp_rank_XX)"),
    "fsdp_dtensor": ("fsdp_dtensor", "fsdp_dtensor or torch_dcp tree"),
    "zarr": ("zarr", "zarr tree of an old Megatron"),
    "unknown": ("unknown", "tree of another program"),
}


def _tree_of_others(path: str, tree: str, notes: list[str]) -> dict:
    kind, title = _OTHERS[checkpoint_folder.tree_kind(tree)]
    advice = (
        "not read here: write it as a Hugging Face folder with the program that made it, and convert that:"
        " tools/convert.py import --hf DIR --save DIR"
    )
    report = _report(kind, title, path, notes=notes or [advice])
    if kind == "torch_dist":
        _add_tree_tensors(report, tree)
    return report


# What is not finished


def _unfinished_save(path: str) -> dict:
    problem = "not a checkpoint: a save that is going on or was cut off; the next save into the folder above removes it"
    return _report("unfinished save", "save that did not end", path, complete=False, problems=[problem])


def _unfinished_conversion(path: str) -> dict:
    done = []
    try:
        with open(os.path.join(path, "journal.jsonl"), "rb") as file:
            done = [json.loads(line)["size"] for line in file.read().split(b"\n")[1:-1]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    problem = (
        f"a conversion that is going on or was cut off: {len(done)} files with {sum(done) / 1e9:.2f} GB are finished;"
        " the same command goes on"
    )
    return _report("partial", "conversion that has not ended", path, complete=False, problems=[problem])


# Model folders and projectors


def _model_folder(path: str, check: bool, progress: ProgressFactory) -> dict:
    kind, title = _kind_of_model(path)
    manifest, problem = read_manifest(path)
    written_here = os.path.isfile(os.path.join(path, MANIFEST))
    if written_here:
        title += ", exported by tools/convert.py"
    report = _report(kind, title, path, complete=True, hashes=manifest is not None)
    if written_here and manifest is None:
        report["problems"].append(problem)
    try:
        reader = open_checkpoint(path, "inspect")
    except UserError as error:
        report["problems"].append(str(error).removeprefix(f"inspect {path}: "))
    else:
        _add_model(report, path, kind)
        _add_tensors(report, _shapes(reader))
    if not written_here:
        report["notes"].append(f"no {MANIFEST}: there are no hashes to compare with")
    report["complete"] = not report["problems"]
    if check and written_here:
        if manifest is not None:
            report["problems"] += damaged_files(path, manifest, progress=progress(_bytes(manifest)))
        report["verified"] = not report["problems"]
    return report


def _kind_of_model(path: str) -> tuple[str, str]:
    try:
        with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        model_type = config.get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        return "hf", "Hugging Face folder without a readable config.json"
    if "mm_vision_tower" in config:
        return "llava", "LLaVA / DenseConnector folder"
    if model_type in ("llava", "llava_next"):
        return "hf-llava", "llava-hf folder (stock transformers)"
    if tower_family(model_type):
        return "vision tower", "vision tower"
    return "hf", "Hugging Face text model"


def _add_model(report: dict, path: str, kind: str) -> None:
    try:
        if kind == "vision tower":
            report["model"] = {"vision_tower": _tower(VisionConfig.from_folder(path, "inspect"), path)}
            return
        model = open_model(path, "inspect")
    except UserError as error:
        report["notes"].append(f"cannot be converted as it is: {str(error).removeprefix(f'inspect {path}: ')}")
        return
    report["model"] = {
        **_language(model.language),
        "vision_tower": _tower(model.vision, model.tower_folder or model.tower_name),
        "connector": model.connector.dense_connector_type if model.connector else None,
        "template": model.version or None,
        "image_aspect_ratio": model.image_aspect_ratio or None,
        "mm_patch_merge_type": model.mm_patch_merge_type if model.image_grid_pinpoints else None,
        "model_max_length": model.model_max_length,
    }


def _shapes(reader: TensorReader) -> dict:
    return {name: (reader.shape(name), reader.dtype(name)) for name in reader.names()}


def _projector(file_path: str, path: str) -> dict:
    if not file_path.endswith((".bin", ".safetensors")):
        raise UserError(f"{file_path}: not a projector file (.bin or .safetensors); give a folder, or such a file")
    file = open_file(file_path, "inspect")
    report = _report("projector", f"projector file ({os.path.basename(file_path)})", path, complete=True)
    names = file.names()
    if not any("mm_projector." in name for name in names):
        report["kind"], report["title"] = "weights file", "weights file"
    _add_tensors(report, _shapes(file))
    said = file.metadata
    if "mm_dense_connector_type" in said:
        tower = {"family": said.get("vision_family"), "layers": said.get("vision_num_hidden_layers")}
        tower |= {"hidden_size": said.get("vision_hidden_size"), "path": said.get("vision_tower")}
        report["model"] = {"connector": said["mm_dense_connector_type"], "vision_tower": tower}
    elif report["kind"] == "projector":
        report["notes"].append("the file does not say which connector and tower it is for")
    return report
