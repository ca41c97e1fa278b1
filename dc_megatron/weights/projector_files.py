"""mm_projector files: what a stage-1 run hands to stage 2, and LLaVA users to each other.

A .bin file holds tensors only, and sci and dci (or sti and none) projectors have the same shapes: the .safetensors
file says in its metadata what the projector is for. AnyRes with spatial_unpad trains one vector more, image_newline.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from safetensors.torch import save_file
from torch import Tensor

from dc_megatron.config import ConnectorConfig, VisionConfig
from dc_megatron.errors import UserError
from dc_megatron.weights import durable_files
from dc_megatron.weights.names import refuse_wrong_names
from dc_megatron.weights.safetensors_files import open_file

SAFETENSORS_NAME = "mm_projector.safetensors"
BIN_NAME = "mm_projector.bin"
_KEY = "model.mm_projector."
_PREFIXES = ("base_model.model.model.", "model.", "")
_PARTS = ("0.weight", "0.bias", "2.weight", "2.bias")
_NEWLINE = "image_newline"


def projector_metadata(connector: ConnectorConfig, vision: VisionConfig) -> dict[str, str]:
    """What a projector file says about itself; safetensors metadata are strings."""
    return {
        "format": "pt",
        "mm_dense_connector_type": connector.dense_connector_type,
        "mm_projector_type": connector.projector_type,
        # SigLIP ignores it, so it must not tell two files apart.
        "mm_vision_select_layer": "ignored" if vision.about.ends_early else str(connector.select_layer),
        "vision_family": vision.family,
        "vision_hidden_size": str(vision.hidden_size),
        "vision_num_hidden_layers": str(vision.num_hidden_layers),
        "vision_image_size": str(vision.image_size),
        "vision_patch_size": str(vision.patch_size),
        "vision_tower": os.path.basename(os.path.normpath(vision.path)) if vision.path else "",
    }


def read_projector(
    path: str,
    connector: ConnectorConfig,
    vision: VisionConfig,
    hidden_size: int,
    *,
    newline: str = "none",
    type_named: bool = True,
    flag: str = "--pretrain_mm_mlp_adapter",
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The projector's tensors as ``mlp.{0,2}.{weight,bias}`` in the file's dtype, and the file's metadata.

    ``path`` is a file or a folder with one; ``hidden_size`` is the language model's width. ``newline``: whether the run
    has an ``image_newline``, which then is among the tensors: "none", "required", or "optional" where one that the file
    does not have may start anew. ``type_named`` says that the user named the connector's type: a file without metadata
    needs that. UserError: no or broken file, names missing or left over, another connector type or tower, other widths.
    """
    file_path = _find(path, flag)
    what = f"{flag} {file_path}"
    file = open_file(file_path, what)
    _check_metadata(file.metadata, connector, vision, type_named, what)
    names = _check_names(file.names(), what)
    _check_newline(_NEWLINE in names, newline, what)
    expected = {**projector_shapes(connector, vision, hidden_size), _NEWLINE: (hidden_size,)}
    for key, shape in expected.items():
        if key not in names:
            continue
        name = names[key]
        if file.shape(name) != shape:
            raise UserError(
                f"{what}: {name} has shape {list(file.shape(name))}, but a"
                f" {connector.dense_connector_type} connector from this vision tower (width {vision.hidden_size}) to"
                f" this language model (width {hidden_size}) needs {list(shape)}: the projector is of another"
                " connector type, tower or language model"
            )
    return {key: file.read(name, None, None).clone() for key, name in names.items()}, dict(file.metadata)


def write_projector(
    folder: str, tensors: dict[str, Tensor], connector: ConnectorConfig, vision: VisionConfig
) -> tuple[str, str]:
    """Write ``mm_projector.bin`` and ``mm_projector.safetensors`` into ``folder``; returns both paths.

    ``tensors`` as ``read_projector`` returns them (``image_newline`` among them where the run has one), any device,
    dtype kept. A reader never sees half a file: each is written under another name, flushed to disk, then renamed.
    """
    expected = {f"mlp.{part}" for part in _PARTS}
    assert tensors.keys() - {_NEWLINE} == expected, f"a projector has {sorted(expected)}, not {sorted(tensors)}"
    stored = {_stored_name(key): value.detach().cpu().contiguous() for key, value in tensors.items()}
    os.makedirs(folder, exist_ok=True)
    bin_path, safetensors_path = os.path.join(folder, BIN_NAME), os.path.join(folder, SAFETENSORS_NAME)
    _write(bin_path, lambda temporary: torch.save(stored, temporary))
    metadata = projector_metadata(connector, vision)
    _write(safetensors_path, lambda temporary: save_file(stored, temporary, metadata=metadata))
    return bin_path, safetensors_path


def _stored_name(key: str) -> str:
    """A tensor's name in LLaVA's files."""
    return f"model.{_NEWLINE}" if key == _NEWLINE else _KEY + key.removeprefix("mlp.")


def has_newline(path: str, flag: str = "--pretrain_mm_mlp_adapter") -> bool:
    """Whether the projector in ``path`` (a file, or a folder with one) has an ``image_newline``."""
    file_path = _find(path, flag)
    names = open_file(file_path, f"{flag} {file_path}").names()
    return any(prefix + _NEWLINE in names for prefix in _PREFIXES)


def projector_shapes(connector: ConnectorConfig, vision: VisionConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the projector's parameters, below ``connector.``."""
    return {
        "mlp.0.weight": (hidden_size, connector.input_size(vision)),
        "mlp.0.bias": (hidden_size,),
        "mlp.2.weight": (hidden_size, hidden_size),
        "mlp.2.bias": (hidden_size,),
    }


def recorded_connector(path: str, flag: str = "--pretrain_mm_mlp_adapter") -> ConnectorConfig | None:
    """The connector that the projector in ``path`` (a file, or a folder with one) was trained for, where it says so."""
    file_path = _find(path, flag)
    metadata = open_file(file_path, f"{flag} {file_path}").metadata
    kind, layer = metadata.get("mm_dense_connector_type"), metadata.get("mm_vision_select_layer", "")
    if kind is None:
        return None
    projector = metadata.get("mm_projector_type", "mlp2x_gelu")
    return ConnectorConfig(kind, projector, int(layer) if layer.lstrip("-").isdigit() else -2)


def _find(path: str, flag: str) -> str:
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise UserError(f"{flag} {path}: no such file or folder")
    for name in (SAFETENSORS_NAME, BIN_NAME):
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    raise UserError(f"{flag} {path}: the folder has neither {SAFETENSORS_NAME} nor {BIN_NAME}")


def _check_metadata(
    metadata: dict[str, str], connector: ConnectorConfig, vision: VisionConfig, type_named: bool, what: str
) -> None:
    wanted = projector_metadata(connector, vision)
    found_type = metadata.get("mm_dense_connector_type")
    if found_type is None:
        if not type_named:
            raise UserError(
                f"{what}: the file does not say which connector it was trained for; name it with"
                " --mm_dense_connector_type (sci and dci projectors have the same shape)"
            )
        return
    if found_type != connector.dense_connector_type:
        raise UserError(
            f"{what}: was trained for --mm_dense_connector_type {found_type}, not {connector.dense_connector_type}"
        )
    # The name of the tower's folder may change with every copy; what the tower is may not.
    differing = [key for key in wanted if key not in ("format", "vision_tower") and metadata.get(key) != wanted[key]]
    if differing:
        found = ", ".join(f"{key} {metadata.get(key)}" for key in differing)
        here = ", ".join(f"{key} {wanted[key]}" for key in differing)
        raise UserError(
            f"{what}: was trained with another vision tower or setting ({found}; the run has {here});"
            f" give the tower it was trained with ({metadata.get('vision_tower') or 'name not recorded'})"
        )


def _check_names(found: list[str], what: str) -> dict[str, str]:
    """``mlp.*``, and ``image_newline`` where there is one -> name on file."""
    places = {f"{prefix}mm_projector.{part}": f"mlp.{part}" for prefix in _PREFIXES for part in _PARTS}
    places |= {prefix + _NEWLINE: _NEWLINE for prefix in _PREFIXES}
    names: dict[str, str] = {}
    unknown = []
    for name in found:
        if name in places and places[name] not in names:
            names[places[name]] = name
        else:
            unknown.append(name)
    missing = [_KEY + part for part in _PARTS if f"mlp.{part}" not in names]
    refuse_wrong_names(what, missing, unknown, "A projector of type mlp2x_gelu holds two linear layers and no more")
    return names


def _check_newline(there: bool, newline: str, what: str) -> None:
    assert newline in ("none", "optional", "required"), newline
    if there and newline == "none":
        raise UserError(
            f"{what}: holds an {_NEWLINE}, so it was trained with --image_aspect_ratio anyres --mm_patch_merge_type"
            " spatial_unpad, and this run has no use for it; give these, or another projector"
        )
    if not there and newline == "required":
        raise UserError(
            f"{what}: holds no {_NEWLINE}, which --mm_patch_merge_type spatial_unpad ends every row of patches with; it"
            " was not trained with AnyRes: leave --image_aspect_ratio anyres out, or train it so first"
        )


def _write(path: str, save: Callable[[str], None]) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        save(temporary)
        # safetensors keeps others from reading what it writes; these files are for everyone who may read the folder.
        os.chmod(temporary, 0o666 & ~_umask())
        with open(temporary, "rb+") as file:
            durable_files.flush_file(file.fileno())
        durable_files.rename(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
