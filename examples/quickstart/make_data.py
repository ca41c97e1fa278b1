"""Writes the quickstart's pictures and its data sets in LLaVA's JSON format.

Usage: python examples/quickstart/make_data.py --out runs/quickstart/data [--pictures 3000] [--seed 0]

In OUT: images/*.jpg, text.json (no pictures: the description stands in words where a picture would be),
train.json (stages 1 and 2) and held_out.json: questions about pictures never trained on. The first part of an id there
says what a record is: colour, shape or place (a drawn scene), photograph (a new crop of a photograph trained on), and
blank (a scene's question again, with a grey picture).
"""

from __future__ import annotations

import argparse
import json
import os
import random

import photographs
import scenes
from PIL import Image


def conversation(first: str, turns: list[tuple[str, str]]) -> list[dict]:
    """LLaVA messages: ``first`` (picture mark or description) stands on a line before the first question."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        messages.append({"from": "human", "value": f"{first}\n{question}" if number == 0 else question})
        messages.append({"from": "gpt", "value": answer})
    return messages


def scene_turns(scene: scenes.Scene, rng: random.Random) -> list[tuple[str, str]]:
    """All three questions in random order: three times the supervision for one picture."""
    kinds = rng.sample(sorted(scenes.QUESTIONS), k=len(scenes.QUESTIONS))
    return [(scenes.QUESTIONS[kind], scene.answer(kind)) for kind in kinds]


def save_jpeg(image: Image.Image, out: str, name: str) -> str:
    """Store ``image`` under OUT and return the path relative to it, as the JSON names it."""
    path = f"images/{name}.jpg"
    image.save(os.path.join(out, path), quality=92)
    return path


def text_records(count: int, photograph_share: float, rng: random.Random) -> list[dict]:
    """Descriptions in words with questions and answers; no picture anywhere."""
    records = []
    for index in range(count):
        if rng.random() < photograph_share:
            caption = rng.choice(list(photographs.CAPTIONS.values()))
            first = " ".join([photographs.describe(caption)] * rng.randint(1, 3))
            turns = [(photographs.QUESTION, caption)]
        else:
            scene = scenes.random_scene(rng)
            first, turns = scenes.describe(scene, rng), scene_turns(scene, rng)
        records.append({"id": f"text-{index}", "conversations": conversation(first, turns)})
    return records


def picture_records(out: str, count: int, photograph_share: float, rng: random.Random) -> list[dict]:
    """``count`` records with a picture each: drawn scenes with three questions, photographs with their caption."""
    loaded = {name: photographs.load(name) for name in photographs.CAPTIONS}
    records = []
    for index in range(count):
        if rng.random() < photograph_share:
            name = rng.choice(list(loaded))
            image, turns = photographs.crop(loaded[name], rng), [(photographs.QUESTION, photographs.CAPTIONS[name])]
        else:
            scene = scenes.random_scene(rng)
            image, turns = scenes.draw(scene, rng), scene_turns(scene, rng)
        path = save_jpeg(image, out, f"train-{index:05d}")
        records.append({"id": f"train-{index}", "image": path, "conversations": conversation("<image>", turns)})
    return records


def held_out_records(out: str, per_kind: int, rng: random.Random) -> list[dict]:
    """``per_kind`` questions of each kind, every answer of a kind equally often, each with a picture of its own.

    Equal counts mean that a model which does not look at the picture cannot beat 1 / number of answers.
    """
    records = []
    for kind, answers in scenes.ANSWERS.items():
        for index in range(per_kind):
            values = vars(scenes.random_scene(rng)) | {kind: answers[index % len(answers)]}
            scene = scenes.Scene(**values)
            path = save_jpeg(scenes.draw(scene, rng), out, f"held-out-{kind}-{index:03d}")
            turns = [(scenes.QUESTIONS[kind], scene.answer(kind))]
            records.append({"id": f"{kind}-{index}", "image": path, "conversations": conversation("<image>", turns)})
    return records


def photograph_records(out: str, rng: random.Random) -> list[dict]:
    """One new crop of each photograph with its caption as the expected answer."""
    records = []
    for name, caption in photographs.CAPTIONS.items():
        path = save_jpeg(photographs.crop(photographs.load(name), rng), out, f"held-out-photograph-{name}")
        turns = [(photographs.QUESTION, caption)]
        records.append({"id": f"photograph-{name}", "image": path, "conversations": conversation("<image>", turns)})
    return records


def blank_records(out: str, records: list[dict]) -> list[dict]:
    """The same questions and answers, each with the same grey picture."""
    size = (scenes.PICTURE_SIZE, scenes.PICTURE_SIZE)
    path = save_jpeg(Image.new("RGB", size, (128, 128, 128)), out, "blank")
    return [record | {"id": f"blank-{record['id']}", "image": path} for record in records]


def write_json(out: str, name: str, records: list[dict]) -> None:
    with open(os.path.join(out, name), "w", encoding="utf-8") as file:
        json.dump(records, file, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--pictures", type=int, default=3000, help="pictures trained on (default %(default)s)")
    parser.add_argument("--texts", type=int, default=8000, help="text-only records (default %(default)s)")
    parser.add_argument("--held-out", type=int, default=60, help="questions of each kind (default %(default)s)")
    parser.add_argument("--photograph-share", type=float, default=0.1, help="of the records (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    os.makedirs(os.path.join(options.out, "images"), exist_ok=True)
    # One generator a set: changing the size of one leaves the pictures of the others as they are.
    streams = [random.Random(f"{options.seed} {name}") for name in ("text", "train", "held out", "photographs")]
    text = text_records(options.texts, options.photograph_share, streams[0])
    train = picture_records(options.out, options.pictures, options.photograph_share, streams[1])
    held_out = held_out_records(options.out, options.held_out, streams[2])
    photographs_held_out = photograph_records(options.out, streams[3])

    write_json(options.out, "text.json", text)
    write_json(options.out, "train.json", train)
    write_json(options.out, "held_out.json", held_out + blank_records(options.out, held_out) + photographs_held_out)
    print(f"{len(text)} texts, {len(train)} pictures to train on, {len(held_out)} held-out questions, in {options.out}")


if __name__ == "__main__":
    main()
