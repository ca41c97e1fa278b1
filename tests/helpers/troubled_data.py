"""A miniature data set with one of everything that a preflight should find, and texts that attack their reader."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.data_files import caption_records, conversation, photo, sentencepiece_tokenizer, write_records
from tests.helpers.tiny_models import tiny_clip

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'"
HOSTILE_TERMINAL = "\x1b]0;owned\x07\x1b[31mred\u202egnp.exe"


def troubled_data(root: Path, captions: int = 40) -> dict[str, str]:
    """Writes data, pictures, tokenizer and tower below ``root``; returns {"main", "second", "images", "model",
    "tower"}. main: ``captions`` good records and then TROUBLE; second: ten records, two of which main has as well.
    """
    images = root / "images"
    good = caption_records(images, captions, size=(120, 90))
    trouble = [record for record, _ in troubles(images)]
    second = [
        *good[:2],
        *({"id": f"text-{n}", "conversations": conversation(f"Hello {n}?", "the lazy dog")} for n in range(8)),
    ]
    sentencepiece_tokenizer(root / "model")
    tiny_clip(root / "tower")
    return {
        "main": write_records(root / "main.json", [*good, *trouble]),
        "second": write_records(root / "second.jsonl", second),
        "images": str(images),
        "model": str(root / "model"),
        "tower": str(root / "tower"),
    }


def troubles(images: Path) -> list[tuple[dict, str]]:
    """(record, reason why it is dropped; "" where it is kept)."""
    question, answer = "<image>\nWhat is it?", "A red circle."
    make = _Pictures(images)

    def record(name: str, image, *turns: str, **more) -> dict:
        return {"id": name, "image": image, "conversations": conversation(*(turns or (question, answer))), **more}

    return [
        (record("missing", "nowhere.jpg"), "missing image"),
        (record("no-image-file", make.text("notes.jpg")), "corrupt image"),
        (record("escapes", "../../etc/passwd"), "unsafe path"),
        (record("two-marks", "0000.jpg", "<image><image> Which?", answer), "image count mismatch"),
        (record("silent", "0000.jpg", question, "  "), "no target"),
        (record("wrong-turns", "0000.jpg", "<image>\nOne?", answer, "Two?"), ""),
        ({"id": "no messages", "image": "0000.jpg"}, "bad structure"),
        (record(HOSTILE, f"{HOSTILE}.jpg"), "missing image"),
        (record(HOSTILE_TERMINAL, f"{HOSTILE_TERMINAL}.jpg"), "missing image"),
        (record("cmyk", make.photo("cmyk.jpg", mode="CMYK")), ""),
        (record("turned", make.turned("turned.jpg")), ""),
        (record("speck", make.photo("speck.png", 1, 1)), ""),
        (record("gif", make.animation("moving.gif")), ""),
        (record("alpha", make.photo(f"alpha & {HOSTILE[:4]}.png".replace("/", ""), mode="RGBA")), ""),
        (record("huge", make.huge("huge.png")), ""),
        (record("torn", make.torn("torn.jpg")), ""),
        (record("shouts", "0001.jpg", f"<image>\n{HOSTILE}", f"{HOSTILE} {HOSTILE_TERMINAL}"), ""),
        (record("rendered", "0002.jpg", "<image>\nUSER: Who?", "ASSISTANT: me</s>"), ""),
        (record("other-template", "0002.jpg", "<|im_start|>user\n<image>", "### Human: hi [INST]"), ""),
        (record("image-in-answer", "0003.jpg", "Show it.", "Here: <image>"), ""),
        (record("caption-0", "0004.jpg", question, "the same id as another record"), ""),
        (record("several", ["0005.jpg", "0006.jpg"], "<image> or <image>?", "the quick brown fox"), ""),
        (record("long", "0007.jpg", question, "the quick brown fox " * 60), ""),
    ]


class _Pictures:
    """Each writes a picture into the folder and returns its name."""

    def __init__(self, folder: Path):
        self._folder = folder

    def photo(self, name: str, width: int = 120, height: int = 90, **options) -> str:
        photo(self._folder / name, width, height, **options)
        return name

    def text(self, name: str) -> str:
        os.makedirs(self._folder, exist_ok=True)
        (self._folder / name).write_text("no picture at all")
        return name

    def turned(self, name: str) -> str:
        exif = Image.Exif()
        exif[0x0112] = 6
        return self.photo(name, seed=3, exif=exif)

    def animation(self, name: str) -> str:
        frames = [Image.fromarray(np.full((40, 60, 3), value, dtype=np.uint8)) for value in (40, 120, 200)]
        frames[0].save(self._folder / name, save_all=True, append_images=frames[1:])
        return name

    def huge(self, name: str) -> str:
        Image.new("1", (8000, 6300)).save(self._folder / name)
        return name

    def torn(self, name: str) -> str:
        """A JPEG whose second half is missing: its header is right."""
        self.photo(name, 400, 300, seed=8)
        path = self._folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return name
