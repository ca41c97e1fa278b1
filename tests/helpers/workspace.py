"""A folder with everything a tiny run needs: models, tokenizer, pictures and a LLaVA data file."""

from __future__ import annotations

import json
import os

import numpy as np
from PIL import Image

from tests.helpers.data_files import sentencepiece_tokenizer
from tests.helpers.tiny_models import tiny_clip, tiny_llama

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (250, 250, 250)}


def make_workspace(root, records: int = 24, vocab: int = 1003, sizes=((50, 40),), **shape) -> dict[str, str]:
    """``root``/llama (model and tokenizer), /clip, /images and /data.json (every third record without a picture).

    sizes: of the pictures, (width, height), one after the other and again from the first. shape: of tiny_llama.
    """
    llama = tiny_llama(root / "llama", vocab=vocab, **shape)
    sentencepiece_tokenizer(root / "llama")
    clip = tiny_clip(root / "clip")
    os.makedirs(root / "images", exist_ok=True)
    content = []
    generator = np.random.default_rng(0)
    for number in range(records):
        colour = list(COLOURS)[number % len(COLOURS)]
        record = {"id": f"sample-{number}"}
        question = "What is in the picture?"
        if number % 3:
            width, height = sizes[number % len(sizes)]
            noise = generator.integers(-20, 20, (height, width, 3))
            pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{number}.jpg")
            record["image"] = f"{number}.jpg"
            question = "<image>\n" + question
        record["conversations"] = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": f"A {colour} square number {number}."},
        ]
        content.append(record)
    data = root / "data.json"
    data.write_text(json.dumps(content))
    return {"llama": llama, "clip": clip, "data": str(data), "images": str(root / "images")}


def training_flags(workspace: dict[str, str], output, **more) -> list[str]:
    """Flags of a short run on ``workspace``, unpacked.

    ``more`` overrides or adds: underscored names, True for a switch, None to leave one out, a list for several words.
    """
    flags = {
        "model_name_or_path": workspace["llama"],
        "vision_tower": workspace["clip"],
        "mm_dense_connector_type": "dci",
        "version": "v1",
        "data_path": workspace["data"],
        "image_folder": workspace["images"],
        "image_aspect_ratio": "pad",
        "model_max_length": 128,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "packing": "none",
        "learning_rate": 1e-3,
        "max_steps": 4,
        "output_dir": str(output),
        "trainable": "connector,llm",
        "dataloader_num_workers": 1,
        **more,
    }
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        words += [] if value is None else [f"--{name}", *map(str, values)]
    return words
