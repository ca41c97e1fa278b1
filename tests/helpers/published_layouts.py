"""Miniatures of the folders that LLaVA-1.5 and Mini-Gemini publish: the same names, a handful of small pictures."""

from __future__ import annotations

import os

from tests.helpers.data_files import conversation, photo, write_records

_STAGE_1 = (
    ("pretrain", "blip_laion_cc_sbu_558k.json", "images", ("00453/004539375.jpg", "00223/002239345.jpg")),
    (
        "MiniGemini-Pretrain",
        "minigemini_pretrain.json",
        "",
        ("images/00453/004539375.jpg", "ALLaVA-4V/allava_laion/images/100016475.jpeg"),
    ),
)
_FINETUNE = (
    "coco/train2017/000000033471.jpg",
    "gqa/images/2354786.jpg",
    "ocr_vqa/images/0439023486.jpg",
    "textvqa/train_images/0054c91397f2fe05.jpg",
    "vg/VG_100K/2405722.jpg",
    "vg/VG_100K_2/1159950.jpg",
)
_STAGE_2 = (
    ("finetune", "llava_v1_5_mix665k.json", _FINETUNE),
    (
        "MiniGemini-Finetune",
        "minigemini_instruction.json",
        (
            *_FINETUNE,
            "gpt4v-dataset/images/1.jpg",
            "sam/images/sa_545504.jpg",
            "share_textvqa/images/1.jpg",
            "wikiart/images/1.jpg",
            "web-celebrity/images/1.jpg",
            "web-landmark/images/1.jpg",
            "ALLaVA-4V/allava_laion/images/100016475.jpeg",
            "docvqa/images/pybv0228_81.png",
            "chartqa/train/png/two_col_20979.png",
            "dvqa/images/bar_train_00000001.png",
            "ai2d/images/1.png",
        ),
    ),
)


def make_published_layouts(root, repeats: int = 3) -> None:
    """``root``/data as docs/prepare_data.md shows it; every picture has ``repeats`` records.

    Some pictures are what the collections really hold: a GIF and a PNG under names that end in .jpg, a grey and a CMYK
    JPEG, a conversation without a picture, one of several turns.
    """
    for folder, name, images, pictures in _STAGE_1:
        base = os.path.join(root, "data", folder)
        for number, picture in enumerate(pictures):
            photo(os.path.join(base, images, picture), seed=number)
        records = [
            {
                "id": picture.split("/")[-1],
                "image": picture,
                "conversations": conversation("Describe it.\n<image>", text),
            }
            for picture in pictures * repeats
            for text in ("a red circle on a table",)
        ]
        write_records(os.path.join(base, name), records)
    for folder, name, pictures in _STAGE_2:
        base = os.path.join(root, "data", folder)
        for number, picture in enumerate(pictures):
            _picture(os.path.join(base, picture), number)
        records = [
            {
                "id": picture.split(".")[0],
                "image": picture,
                "conversations": conversation("<image>\nWhat is it?", f"It is {number}.", "Is it red?", "No."),
            }
            for number, picture in enumerate(pictures * repeats)
        ]
        # ShareGPT's part has no picture.
        records.append({"id": "wqYLa6T_0", "model": "", "conversations": conversation("Say hello.", "Hello.")})
        write_records(os.path.join(base, name), records)


def _picture(path: str, number: int) -> None:
    if number == 2:
        photo(f"{path}.gif", 60, 40, seed=number)
        os.replace(f"{path}.gif", path)
    elif number == 3:
        photo(f"{path}.png", 60, 40, seed=number)
        os.replace(f"{path}.png", path)
    else:
        mode = {4: "L", 5: "CMYK"}.get(number, "RGB") if path.endswith((".jpg", ".jpeg")) else "RGB"
        photo(path, 90, 60, seed=number, mode=mode)
