"""A data set on disk that costs as much to read as LLaVA-1.5's: made-up words, a tokenizer of 32,000 pieces, JPEGs.

Texts are as long in tokens as ``llava_lengths`` draws them, and of words whose frequencies fall as in a language, so
that the tokenizer merges as it would there. Pictures are a few files under many names.
"""

from __future__ import annotations

import json
import os
import random

import numpy as np
from PIL import Image

from dc_megatron.benchmark.llava_lengths import IMAGE_TOKENS, llava_lengths
from dc_megatron.data.conversation import template

VOCABULARY = 32_000
_WORDS = 60_000
_TRAINING_WORDS, _SYSTEM_PROMPTS = 1_500_000, 2000
_TOKENS_PER_TURN = 80
_TEMPLATE_TOKENS = 60  # the system prompt of v1 and the names of the turns
_PICTURES = 200
_RECORDS_AT_ONCE = 2000
_STARTS = (*"bcdfghklmnprstvw", "th", "ch", "st", "br", "tr", "pl", "sh")
_VOWELS = (*"aeiou", "ai", "ea", "ou", "ee")
_ENDS = ("", "", "n", "r", "s", "t", "l", "nd", "ng", "ly")


def made_up_words(count: int = _WORDS, seed: int = 0) -> np.ndarray:
    """``count`` different words of one to four syllables, the shortest first, as strings."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = rng.choices((1, 2, 3, 4), weights=(3, 4, 2, 1))[0]
        found["".join(rng.choice(_STARTS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_ENDS)] = None
    return np.array(sorted(found, key=len))


class Writer:
    """Draws texts of made-up words; the r-th word comes with a frequency of 1 / (r + 2)."""

    def __init__(self, seed: int = 0):
        self._words = made_up_words()
        self._state = np.random.RandomState(seed)
        weights = 1 / np.arange(2, len(self._words) + 2)
        self._ends = np.cumsum(weights / weights.sum())

    def words(self, count: int) -> np.ndarray:
        """``count`` words, every eighth with a comma, every fifteenth the end of a sentence."""
        chosen = self._words[np.searchsorted(self._ends, self._state.random_sample(count))].astype(object)
        chosen[::8] += ","
        chosen[::15] += "."
        return chosen


def write_tokenizer(folder: str, writer: Writer) -> str:
    """A Llama-style tokenizer folder with VOCABULARY pieces, trained on words of ``writer``."""
    import sentencepiece

    os.makedirs(folder, exist_ok=True)
    corpus = os.path.join(folder, "corpus.txt")
    with open(corpus, "w", encoding="utf-8") as file:
        for line in writer.words(_TRAINING_WORDS).reshape(-1, 20):
            file.write(" ".join(line) + "\n")
        # Its words are as usual to a real tokenizer as any.
        file.write(f"{template('v1').system}USER: ASSISTANT:\n" * _SYSTEM_PROMPTS)
    sentencepiece.SentencePieceTrainer.train(
        input=corpus,
        model_prefix=os.path.join(folder, "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    os.remove(corpus)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump({**config, "add_bos_token": True}, file)
    return folder


def write_pictures(folder: str, names: list[str], seed: int = 0) -> None:
    """A JPEG under each of ``names``: _PICTURES different ones, further names are links to them."""
    os.makedirs(folder, exist_ok=True)
    state = np.random.RandomState(seed)
    for number, name in enumerate(names):
        path = os.path.join(folder, name)
        if number >= _PICTURES:
            os.link(os.path.join(folder, names[number % _PICTURES]), path)
            continue
        width, height = (int(edge) for edge in state.randint(300, 641, size=2))
        coarse = state.randint(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=85)


def write_records(path: str, count: int, stage: int, writer: Writer, pictures: bool = True) -> dict:
    """``count`` records in the form that the file's ending says; returns {"mb", "pictures": names}.

    pictures=False: text alone, as long as it would be beside a picture.
    """
    lengths, tiles = llava_lengths(count, stage)
    names = []
    with open(path, "w", encoding="utf-8") as file:
        is_list = not path.endswith(".jsonl")
        file.write("[" if is_list else "")
        for first in range(0, count, _RECORDS_AT_ONCE):
            for number in range(first, min(first + _RECORDS_AT_ONCE, count)):
                tokens = int(lengths[number] - IMAGE_TOKENS * tiles[number])
                record = {"id": f"{number:012}", "conversations": _turns(writer, tokens, stage)}
                if pictures and tiles[number]:
                    names.append(f"{number:012}.jpg")
                    record |= {"image": names[-1]}
                    first_turn = record["conversations"][0]
                    first_turn["value"] = f"<image>\n{first_turn['value']}"
                separator = ("," if number else "") if is_list else "\n" if number else ""
                file.write(separator + json.dumps(record))
        file.write("]" if is_list else "\n")
    return {"mb": os.path.getsize(path) / 1e6, "pictures": names}


def _turns(writer: Writer, tokens: int, stage: int) -> list[dict]:
    """Questions and answers of about ``tokens`` tokens in all, the template included."""
    # A made-up word is a little more than one token.
    words = writer.words(max(2, int((tokens - (0 if stage == 1 else _TEMPLATE_TOKENS)) / 1.35)))
    turns = max(1, tokens // _TOKENS_PER_TURN) if stage == 2 else 1
    messages = []
    for part in np.array_split(words, turns):
        question = max(1, len(part) // 5)
        messages.append({"from": "human", "value": " ".join(part[:question]) + "?"})
        messages.append({"from": "gpt", "value": " ".join(part[question:]) or "yes"})
    return messages
