"""Logits of a Megatron checkpoint by the program's own model, in a process of its own.

What lets megatron-core run on any machine changes torch for the whole process; the other side of a comparison must not
see that. The process also gives all of its memory back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dc_megatron.config import LayerTable, padded_vocab_size
from dc_megatron.errors import UserError
from dc_megatron.evaluation.logit_inputs import LogitInput
from dc_megatron.evaluation.plain_logits import exact_products
from dc_megatron.runtime import device, parallel, patches
from dc_megatron.weights.lora_table import adapted_linears
from dc_megatron.weights.megatron_folder import open_checkpoint_folder
from dc_megatron.weights.model_parts import ModelFolder

_REQUEST, _INPUTS, _LOGITS = "request.json", "inputs.safetensors", "logits.safetensors"
# One rank alone, whatever this program was started by.
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OUTPUT_TAIL = 4000


def in_a_process_of_its_own(
    model: ModelFolder, tree: str, what: str, inputs: list[LogitInput], columns: int
) -> list[Tensor]:
    """fp32 [places, columns] of every input, from ``tree``, which ``model`` describes.

    UserError that begins with ``what`` where the tower is not there, and as that process says it.
    """
    if any(given.pixel_values is not None for given in inputs) and not os.path.isdir(model.tower_folder):
        raise UserError(
            f"{what}: its frozen vision tower was {model.tower_folder or 'never named'}, which is not there; name it:"
            " --vision-tower DIR"
        )
    with tempfile.TemporaryDirectory(prefix="dc_logits_") as folder:
        request = {"folder": model.path, "tree": tree, "vision_tower": model.tower_folder, "columns": columns}
        request["language_model"] = model.base_folder
        with open(os.path.join(folder, _REQUEST), "w", encoding="utf-8") as file:
            json.dump(request, file)
        save_file(_packed(inputs), os.path.join(folder, _INPUTS))
        _call(folder)
        found = load_file(os.path.join(folder, _LOGITS))
    return [found[str(number)] for number in range(len(inputs))]


def _call(folder: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, folder],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode == 2:
        raise UserError(done.stderr.rstrip().splitlines()[-1].removeprefix("error: "))
    if done.returncode:
        raise RuntimeError(
            f"computing logits of a checkpoint ended with {done.returncode}\n{done.stderr[-_OUTPUT_TAIL:]}"
        )


def _packed(inputs: list[LogitInput]) -> dict[str, Tensor]:
    tensors = {}
    for number, given in enumerate(inputs):
        tensors |= {f"{number}.ids": given.ids, f"{number}.image_mask": given.image_mask}
        if given.pixel_values is not None:
            tensors[f"{number}.pixel_values"] = given.pixel_values
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _unpacked(tensors: dict[str, Tensor]) -> list[LogitInput]:
    count = sum(name.endswith(".ids") for name in tensors)
    return [
        LogitInput(tensors[f"{n}.ids"], tensors[f"{n}.image_mask"], tensors.get(f"{n}.pixel_values"))
        for n in range(count)
    ]


def main(folder: str) -> int:
    """The process itself: answer the request in ``folder``."""
    with open(os.path.join(folder, _REQUEST), encoding="utf-8") as file:
        request = json.load(file)
    inputs = _unpacked(load_file(os.path.join(folder, _INPUTS)))
    try:
        logits = _logits(request, inputs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    save_file({str(number): rows for number, rows in enumerate(logits)}, os.path.join(folder, _LOGITS))
    parallel.stop()
    return 0


@torch.no_grad()
def _logits(request: dict, inputs: list[LogitInput]) -> list[Tensor]:
    described, _ = open_checkpoint_folder(
        request["folder"], None, request["vision_tower"], language_model=request["language_model"]
    )
    device.limit_cpu_threads(1)
    patches.apply()
    parallel.start()
    model = _build(described, request["tree"], any(given.pixel_values is not None for given in inputs))
    found = []
    with exact_products():
        for given in inputs:
            logits = model(_batch(given.to(device.device())), positions=given.word_places.to(device.device()))
            found.append(logits[:, : request["columns"]].float().cpu().contiguous())
    return found


def _build(described: ModelFolder, tree: str, with_picture: bool):
    """The model of one rank in fp32 and torch's own modules: Transformer Engine's multiply fp32 as TF32."""
    from dc_megatron.inference import assemble
    from dc_megatron.model.language_model import Layout, build_language_model, transformer_config
    from dc_megatron.model.multimodal_model import DenseConnectorModel

    language = described.language
    config = transformer_config(language, Layout())
    shape = {
        "vocab_rows": padded_vocab_size(language.vocab_size, 1),
        "max_sequence_length": language.max_position_embeddings,
        "transformer_engine": False,
    }
    if with_picture:
        vision = replace(described.vision, path=described.tower_folder)
        model = assemble.build_model(language, vision, described.connector, config, seed=0, **shape)
        assemble.load_vision_tower(model, vision, described.connector)
    else:
        text = build_language_model(language, config, **shape)
        model = DenseConnectorModel(text, language.vocab_size, "none", LayerTable(0, ()), None, None)
    if described.lora:
        model.add_adapters(adapted_linears(language), described.lora, seed=0)
        assemble.load_language_model(model, replace(language, path=described.base_folder), shape["vocab_rows"])
    assemble.load_checkpoint(model, tree)
    return model.to(device.device()).eval()


def _batch(given: LogitInput) -> dict:
    """As the data room makes it, of what the model reads for logits."""
    rows, length = given.ids.shape
    places = torch.arange(length, device=given.ids.device).expand(rows, length)
    return {
        "input_ids": given.ids,
        "position_ids": places,
        "num_images": 0 if given.pixel_values is None else 1,
        "image_mask": given.image_mask,
        "image_feature_index": torch.arange(int(given.image_mask.sum()), device=given.ids.device),
        "pixel_values": given.pixel_values,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
