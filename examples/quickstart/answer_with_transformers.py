"""Asks an exported model with plain transformers, torch and PIL: nothing of dc_megatron is needed to serve it.

examples:
  python examples/quickstart/answer_with_transformers.py --model EXPORT --image photo.jpg --prompt "What is this?"
  python examples/quickstart/answer_with_transformers.py --model EXPORT --data_path questions.json \\
    --image_folder images --answers answers.jsonl

EXPORT is what `python tools/convert.py export --load CHECKPOINT --format hf-llava --save EXPORT` wrote.
"""

from __future__ import annotations

import argparse
import json
import os

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def load(folder: str):
    """(model in the export's dtype, processor). backend="pil": pictures as in training, also with torchvision."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, AutoProcessor.from_pretrained(folder, backend="pil")


def message(question: str, images: list) -> dict:
    """One user turn. <image> in the words says where a picture stands; pictures without marks come first."""
    if "<image>" in question:
        return {"role": "user", "content": question}
    return {"role": "user", "content": [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]}


@torch.no_grad()
def answer(model, processor, questions: list[tuple[str, list[str]]], max_new_tokens: int) -> list[str]:
    """Greedy answers to (question, picture files), asked as one batch."""
    chats = [[message(question, images)] for question, images in questions]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    pictures = [Image.open(path).convert("RGB") for _, images in questions for path in images]
    inputs = processor(text=texts, images=pictures or None, padding=True, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def read_questions(data_path: str, image_folder: str) -> list[dict]:
    """The first message of every record of a LLaVA JSON file, and what the record answers to it."""
    with open(data_path, encoding="utf-8") as file:
        records = json.load(file)
    questions = []
    for number, record in enumerate(records):
        said = [turn["value"] for turn in record["conversations"]] + [None]
        names = record.get("image") or []
        paths = [os.path.join(image_folder, name) for name in ([names] if isinstance(names, str) else names)]
        fields = {"id": str(record.get("id", number)), "question": said[0], "expected": said[1]}
        questions.append({**fields, "images": paths})
    return questions


def answer_file(model, processor, options: argparse.Namespace) -> None:
    """Write one JSON line a question: id, question, expected, answer."""
    questions = read_questions(options.data_path, options.image_folder)
    with open(options.answers, "w", encoding="utf-8") as file:
        for first in range(0, len(questions), options.batch_size):
            batch = questions[first : first + options.batch_size]
            asked = [(question["question"], question.pop("images")) for question in batch]
            for question, text in zip(batch, answer(model, processor, asked, options.max_new_tokens), strict=True):
                file.write(json.dumps({**question, "answer": text}, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="the exported folder")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    parser.add_argument("--prompt", metavar="TEXT", help="the question")
    parser.add_argument("--data_path", metavar="FILE", help="a LLaVA JSON file with many questions")
    parser.add_argument("--image_folder", default="", metavar="DIR", help="where its pictures lie")
    parser.add_argument("--answers", metavar="FILE", help="JSON lines: id, question, expected, answer")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    options = parser.parse_args()
    if bool(options.prompt) == bool(options.data_path) or bool(options.data_path) != bool(options.answers):
        parser.error("give --prompt TEXT, or --data_path FILE and --answers FILE")
    model, processor = load(options.model)
    if options.data_path:
        answer_file(model, processor, options)
    else:
        print(answer(model, processor, [(options.prompt, options.image)], options.max_new_tokens)[0])


if __name__ == "__main__":
    main()
