"""Hugging Face ``config.json`` files, read and checked before anybody leans on them."""

from __future__ import annotations

import json
import os

from dc_megatron.errors import UserError


def read_json_file(folder: str, name: str, what: str) -> dict:
    """The object in ``folder/name``; a UserError that says ``what`` the folder should be when it cannot be read."""
    path = os.path.join(folder, name)
    if not os.path.isdir(folder):
        raise UserError(f"{what}: no such folder: {folder}")
    if not os.path.isfile(path):
        raise UserError(f"{what}: {folder} has no {name}; give a Hugging Face model folder")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}: {path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{what}: {path} holds a {type(content).__name__}, not an object")
    return content


def check_sizes(values: dict, keys: tuple[str, ...], what: str) -> None:
    """UserError where one of ``keys`` of a config.json is no size; ``what`` begins it."""
    for key in keys:
        if type(values[key]) is not int or values[key] < 1:
            raise UserError(f"{what}: config.json says {key} {values[key]!r}; it must be a whole number above 0")


def part_of_config(config: dict, key: str, what: str) -> dict:
    """The object at ``key`` of a config.json, {} where there is none."""
    part = config.get(key) or {}
    if not isinstance(part, dict):
        raise UserError(f"{what}: config.json says {key} {part!r}; it must be an object")
    return part


def refuse_quantised(config: dict, what: str) -> None:
    """UserError for weights in a quantised format: their tensors are codes and scales."""
    if config.get("quantization_config"):
        method = part_of_config(config, "quantization_config", what).get("quant_method", "of an unnamed method")
        raise UserError(
            f"{what}: config.json has a quantization_config ({method}); give the model in bf16, fp16 or fp32, or take"
            " the entry out where the weights are not quantised"
        )
