"""``--data_path`` and ``--image_folder`` to data sources: one or several files with weights, or a YAML file of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dc_megatron.config import DataSource, nearest
from dc_megatron.errors import UserError

# Where names start if no folder is given; never "", which would take any path.
_HERE = "."
_KEYS = ("data_path", "image_folder", "weight")


def read_sources(
    data_paths: Sequence[str], image_folders: Sequence[str], flags: tuple[str, str] = ("--data_path", "--image_folder")
) -> tuple[DataSource, ...]:
    """The sources that the words of the two flags name.

    data_paths: ``file`` or ``file:weight`` each, or one .yaml file with a list ``datasets`` of data_path, image_folder
    and weight. image_folders: one for all files, or one for each; it is also the default of a YAML entry. Only the YAML
    file is opened. Raises UserError.
    """
    if any(path.endswith((".yaml", ".yml")) for path in data_paths):
        if len(data_paths) != 1:
            raise UserError(f"{flags[0]} {' '.join(data_paths)}: give one YAML file alone, or data files")
        return _from_yaml(data_paths[0], image_folders, flags)
    folders = list(image_folders) or [_HERE]
    if len(folders) not in (1, len(data_paths)):
        raise UserError(
            f"{flags[1]} {' '.join(folders)}: {len(folders)} folders for {len(data_paths)} files of {flags[0]};"
            " give one for all or one for each"
        )
    folders = folders * len(data_paths) if len(folders) == 1 else folders
    return tuple(_source(path, folder, flags[0]) for path, folder in zip(data_paths, folders, strict=True))


def _source(word: str, folder: str, flag: str) -> DataSource:
    path, colon, weight = word.rpartition(":")
    if not colon:
        return DataSource(word, folder)
    try:
        number = float(weight)
    except ValueError:
        # A colon that belongs to the file's name.
        return DataSource(word, folder)
    return DataSource(path, folder, _weight(number, f"{flag} {word}"))


def _weight(value, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise UserError(f"{what}: weight {value}: must be a number above 0 (0.5: half of the samples in an epoch)")
    return float(value)


def _from_yaml(path: str, image_folders: Sequence[str], flags: tuple[str, str]) -> tuple[DataSource, ...]:
    import yaml

    what = f"{flags[0]} {path}"
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except FileNotFoundError:
        raise UserError(f"{what}: no such file") from None
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"{what}: not readable as YAML: {' '.join(str(error).split())}") from None
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{what}: must hold a list 'datasets' with data_path, image_folder and weight in each entry")
    if len(image_folders) > 1:
        raise UserError(f"{flags[1]} {' '.join(image_folders)}: {path} names a folder in each of its entries")
    default = image_folders[0] if image_folders else _HERE
    return tuple(_entry(entry, f"{what}: entry {number}", default) for number, entry in enumerate(entries))


def _entry(entry, what: str, default_folder: str) -> DataSource:
    if not isinstance(entry, dict):
        raise UserError(f"{what} is a {type(entry).__name__}, not a mapping with data_path in it")
    for key in entry:
        if key not in _KEYS:
            raise UserError(f"{what}: unknown key {key!r}{nearest(str(key), _KEYS)}; keys: {', '.join(_KEYS)}")
    path, folder = entry.get("data_path"), entry.get("image_folder", default_folder)
    for key, value in (("data_path", path), ("image_folder", folder)):
        if not isinstance(value, str) or not value:
            raise UserError(f"{what}: {key} {value!r}: must be text")
    return DataSource(path, folder, _weight(entry.get("weight", 1.0), what))
