"""Writes what the quickstart starts from: a tiny tokenizer, a random Llama and a random CLIP tower.

Usage: python examples/quickstart/make_models.py --out runs/quickstart/models [--seed 0]

In OUT: language_model/ (config.json, model.safetensors, tokenizer files) and vision_tower/ (config.json,
model.safetensors, preprocessor_config.json), Hugging Face folders like any other.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re

import photographs
import scenes
import sentencepiece
import torch
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging as transformers_logging

VOCABULARY_SIZE = 640
# The system prompt of the `v1` template (Vicuna). The tokenizer learns it as one piece: with word pieces it would be
# half of every sequence, and a step on two CPU cores costs in proportion.
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# A random tower mixes position into its features only as strongly as its position embedding; at CLIP's own 0.02 beside
# patch embeddings of about 0.3 a connector cannot read where the shape is (held-out "Where" stays at chance).
POSITION_STD = 0.2


def corpus() -> list[str]:
    """Words one by one, so that none merge across a space, and the fixed parts of the `v1` template whole."""
    rng = random.Random(0)
    texts = [scenes.describe(scenes.random_scene(rng), rng) for _ in range(300)]  # enough to hold every word
    texts += [photographs.describe(caption) for caption in photographs.CAPTIONS.values()]
    texts += [*scenes.QUESTIONS.values(), photographs.QUESTION]
    words = sorted(set(re.findall(r"\w+", " ".join(texts))))
    return words * 50 + [SYSTEM_PROMPT, "USER:", "ASSISTANT:"] * 2000


def save_tokenizer(folder: str) -> None:
    """Train a sentencepiece BPE model with byte fallback, as Llama's is, and save it in both file formats."""
    os.makedirs(folder, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=os.path.join(folder, "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_by_whitespace=False,
        split_by_unicode_script=False,
        max_sentencepiece_length=200,
        num_threads=1,
        minloglevel=2,
    )
    os.remove(os.path.join(folder, "tokenizer.vocab"))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    _write_json(folder, "tokenizer_config.json", settings)
    # Built from tokenizer.model by transformers; saving the backend alone leaves the settings above as they are.
    AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(os.path.join(folder, "tokenizer.json"))


def save_language_model(folder: str) -> None:
    """A random Llama: 4 layers, 128 wide, about 0.8 million parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def save_vision_tower(folder: str) -> None:
    """A random CLIP tower: 12 layers, 64 wide, 64 x 64 pixels in 16 patches."""
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=12,
        num_attention_heads=4,
        image_size=64,
        patch_size=16,
        projection_dim=64,
    )
    tower = CLIPVisionModel(config)
    with torch.no_grad():
        position = next(p for name, p in tower.named_parameters() if name.endswith("position_embedding.weight"))
        position.normal_(std=POSITION_STD)
    tower.save_pretrained(folder)
    side = config.image_size
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # PIL's number for bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
    _write_json(folder, "preprocessor_config.json", processor)


def _write_json(folder: str, name: str, content: dict) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default %(default)s)")
    options = parser.parse_args()

    transformers_logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    language_model = os.path.join(options.out, "language_model")
    save_tokenizer(language_model)
    save_language_model(language_model)
    save_vision_tower(os.path.join(options.out, "vision_tower"))
    print(f"tokenizer of {VOCABULARY_SIZE} pieces, random Llama and random CLIP tower in {options.out}")


if __name__ == "__main__":
    main()
