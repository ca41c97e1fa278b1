"""Text to token ids with character offsets, label masks from those offsets, and the place of images among them.

Ids are the tokenizer's ids of each stretch between images of the whole rendered conversation, as in the original.
Labels come from offsets instead of re-tokenised lengths, so a merge across a turn's edge cannot mask a whole sample.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from dc_megatron.data.conversation import IMAGE_MARK, Rendered, render_prompt, stop_text
from dc_megatron.data.picture import Picture
from dc_megatron.errors import UserError

IMAGE_ID = -200  # stands for one whole image in TokenisedSample.input_ids; the original's IMAGE_TOKEN_INDEX
IGNORE = -100
# The first so many stretches are remembered: the system prompt is among them, and begins every text.
_KNOWN_STRETCHES, _LONGEST_KNOWN = 32, 4096

Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class TokenisedSample:
    """One conversation, images not yet expanded.

    input_ids: int32 [n], IMAGE_ID once for every image. labels: int32 [n], NOT shifted, IGNORE where no target.
    images: in order of appearance, those cut off by truncation left out. length: positions after expansion and
    truncation; no image is cut. identifier and record: the record's ``id`` and its index in the file of data source
    ``source``. truncated: something was cut off (not kept in an index).
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[Picture, ...]
    length: int
    identifier: str = ""
    record: int = -1
    truncated: bool = False
    source: int = 0

    @property
    def supervised_tokens(self) -> int:
        """Targets that some position predicts: the first position has none before it."""
        return int((self.labels[1:] != IGNORE).sum())


class TextTokenizer:
    """The tokenizer of a Hugging Face folder, with character offsets.

    folder: holds tokenizer.json or tokenizer.model. Public: ``bos_id``, ``eos_id`` (int or None), ``adds_bos``,
    ``is_legacy``, ``hugging_face`` (the transformers object, for decoding).

    Legacy Llama tokenizers (``legacy`` absent or true in tokenizer_config.json, as the original loads them) are those
    where sentencepiece encodes every stretch between special tokens by itself, dummy prefix included. Where the folder
    has the sentencepiece model the library does exactly that. transformers 5.17 would take an absent ``legacy`` for
    false and an absent ``add_bos_token`` as well, and swallows one space where a stretch starts with a space; all
    three are put right here.
    """

    def __init__(self, folder: str, flag: str = "--model_name_or_path"):
        self.folder = folder
        self.hugging_face = _load_hugging_face(folder, flag)
        self._backend = self.hugging_face.backend_tokenizer
        # tokenizer.json may carry padding and truncation of its own.
        self._backend.no_padding()
        self._backend.no_truncation()
        self.bos_id = self.hugging_face.bos_token_id
        self.eos_id = self.hugging_face.eos_token_id
        is_llama = type(self.hugging_face).__name__.startswith("LlamaTokenizer")
        self.adds_bos = self.bos_id is not None and self._decide_bos(is_llama)
        self.is_legacy = is_llama and _is_legacy(folder)
        # A dummy prefix is due where the text itself starts with a space; transformers then adds none.
        self._restore_prefix = is_llama and getattr(self.hugging_face, "add_prefix_space", True) is not False
        self._special = {
            token.content: number for number, token in self.hugging_face.added_tokens_decoder.items() if token.content
        }
        contents = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("|".join(re.escape(content) for content in contents)) if contents else None
        self._sentencepiece = _load_sentencepiece(folder) if self.is_legacy else None
        self._known: dict[str, tuple[Sequence[int], Offsets]] = {}

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        """Ids of one stretch and their (start, end) characters; no special token is added, those in it are parsed."""
        ids, offsets = [], []
        self.append(ids, offsets, text, 0)
        return ids, offsets

    def append(self, ids: list[int], offsets: Offsets, text: str, position: int) -> None:
        """What ``encode`` gives, at the end of ``ids`` and ``offsets``; ``position``: where ``text`` begins."""
        end = 0
        for match in self._split.finditer(text) if self.is_legacy and self._split else ():
            self._append_stretch(ids, offsets, text[end : match.start()], position + end)
            ids.append(self._special[match.group()])
            offsets.append((position + match.start(), position + match.end()))
            end = match.end()
        self._append_stretch(ids, offsets, text[end:], position + end)

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        return self.hugging_face.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def special_id(self, text: str) -> int | None:
        """The id of ``text`` if it is one special token, else None."""
        return self._special.get(text)

    def _decide_bos(self, is_llama: bool) -> bool:
        """Whether a text starts with BOS: a Llama folder's flag, else its tokenizer.json, else the original's True."""
        if is_llama:
            flag = _read_json(self.folder, "tokenizer_config.json").get("add_bos_token")
            if flag is not None:
                return bool(flag)
            if not os.path.isfile(os.path.join(self.folder, "tokenizer.json")):
                return True
        return self.hugging_face("a").input_ids[:1] == [self.bos_id]

    def _append_stretch(self, ids: list[int], offsets: Offsets, stretch: str, position: int) -> None:
        if not stretch:
            return
        encoded = self._known.get(stretch)
        if encoded is None:
            encoded = self._encode_stretch(stretch)
            if len(self._known) < _KNOWN_STRETCHES and len(stretch) < _LONGEST_KNOWN:
                self._known[stretch] = encoded
        ids += encoded[0]
        offsets += [(start + position, end + position) for start, end in encoded[1]]

    def _encode_stretch(self, text: str) -> tuple[list[int], Offsets]:
        if self._sentencepiece is not None:
            result = self._sentencepiece.encode(text, return_type="offset_mapping")
            return result["ids"], result["offsets"]
        if self._restore_prefix and text[0] in " ▁":
            encoding = self._backend.encode(" " + text, add_special_tokens=False)
            return encoding.ids, [(max(start - 1, 0), max(end - 1, 0)) for start, end in encoding.offsets]
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets


def load_tokenizer(folder: str, version: str | None = None, flag: str = "--model_name_or_path") -> TextTokenizer:
    """The tokenizer of ``folder``, checked to know the token that ends an answer of template ``version``.

    Raises UserError where the folder has no usable tokenizer, or where the template was made for another one.
    """
    tokenizer = TextTokenizer(folder, flag)
    if version is not None and version != "plain" and tokenizer.special_id(stop_text(version)) is None:
        raise UserError(
            f"--version {version}: its answers end in {stop_text(version)}, which is no special token of the tokenizer"
            f" in {folder}; choose the template of that model (v1 for Vicuna, llama_3 for Llama 3, mpt for ChatML)"
        )
    return tokenizer


def tokenise(
    tokenizer: TextTokenizer,
    rendered: Rendered,
    images: Sequence[Picture],
    *,
    model_max_length: int,
    identifier: str = "",
    record: int = -1,
    source: int = 0,
) -> TokenisedSample:
    """Ids and labels of a rendered conversation, truncated at ``model_max_length`` positions after expansion.

    images: as many as ``rendered`` has marks. An image that does not fit whole is left out, with all behind it.
    """
    ids, offsets = _encode_between_images(tokenizer, rendered.text)
    input_ids = np.array(ids, dtype=np.int32)
    labels = np.where(_target_mask(offsets, rendered.targets), input_ids, IGNORE).astype(np.int32)
    ends = np.cumsum(image_widths(input_ids, images))
    kept = int(np.searchsorted(ends, model_max_length, side="right"))
    input_ids, labels = input_ids[:kept], labels[:kept]
    return TokenisedSample(
        input_ids=input_ids,
        labels=labels,
        images=tuple(images[: int((input_ids == IMAGE_ID).sum())]),
        length=int(ends[kept - 1]) if kept else 0,
        identifier=identifier,
        record=record,
        truncated=kept < len(ids),
        source=source,
    )


def image_widths(input_ids: np.ndarray, images: Sequence[Picture]) -> np.ndarray:
    """int64 [n]: the positions of every entry of ``input_ids``, 1 for text and an image's own number for it."""
    widths = np.ones(len(input_ids), dtype=np.int64)
    widths[input_ids == IMAGE_ID] = [image.tokens for image in images]
    return widths


def check_largest_id(largest: int, vocab_size: int, folder: str, what: str) -> None:
    """UserError where a token id lies beyond the model's ``vocab_size`` (0: not checked): it has no embedding.

    folder: of tokenizer and model. what: the flag, and its value, that the id came from.
    """
    if 0 < vocab_size <= largest:
        raise UserError(
            f"{what}: the tokenizer in {folder} makes token id {largest} of it, and config.json there says vocab_size"
            f" {vocab_size}, so ids go up to {vocab_size - 1}; resize the model's embeddings to its tokenizer, or give"
            " the tokenizer that belongs to the model"
        )


def encode_prompt(
    tokenizer: TextTokenizer, version: str, question: str, image_tokens: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """(ids, image_mask) of one question, images expanded: 0 and True at image positions.

    image_tokens: the positions of each of its images.
    """
    ids, _ = _encode_between_images(tokenizer, render_prompt(version, question, len(image_tokens)))
    expanded, mask, widths = [], [], iter(image_tokens)
    for token in ids:
        is_image = token == IMAGE_ID
        width = next(widths) if is_image else 1
        expanded += [0] * width if is_image else [token]
        mask += [is_image] * width
    return expanded, mask


def _encode_between_images(tokenizer: TextTokenizer, text: str) -> tuple[list[int], Offsets]:
    """Ids with IMAGE_ID for every mark, and (start, end) characters; BOS and images have the empty span (-1, -1)."""
    ids, offsets, position = [], [], 0
    for number, stretch in enumerate(text.split(IMAGE_MARK)):
        if number:
            ids.append(IMAGE_ID)
            offsets.append((-1, -1))
            position += len(IMAGE_MARK)
        tokenizer.append(ids, offsets, stretch, position)
        position += len(stretch)
    # Llama 3's template spells BOS out; a tokenizer that adds its own must not double it.
    if tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
        offsets.insert(0, (-1, -1))
    return ids, offsets


def _target_mask(offsets: Offsets, targets: tuple[tuple[int, int], ...]) -> np.ndarray:
    """bool [n]: the token overlaps a target span.

    A token without width (a dummy prefix, all but the last byte of a character) counts for the character it precedes.
    """
    spans = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets)).reshape(-1, 2)
    starts, ends = spans[:, 0], np.maximum(spans[:, 1], spans[:, 0] + 1)
    mask = np.zeros(len(spans), dtype=bool)
    for target_start, target_end in targets:
        mask |= (ends > target_start) & (starts < target_end) & (starts >= 0)
    return mask


def _load_hugging_face(folder: str, flag: str):
    from transformers import AutoTokenizer

    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder}: no such folder; a tokenizer is read from there")
    if not any(os.path.isfile(os.path.join(folder, name)) for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{flag} {folder}: has no tokenizer.json and no tokenizer.model; copy the model's tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen types for unreadable files
        raise UserError(f"{flag} {folder}: the tokenizer cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise UserError(
            f"{flag} {folder}: {type(tokenizer).__name__} has no fast form, and label masks need its character"
            " offsets; add a tokenizer.json"
        )
    return tokenizer


def _is_legacy(folder: str) -> bool:
    """What the folder says of a Llama tokenizer: its flag, else the original's default, else its tokenizer.json."""
    flag = _read_json(folder, "tokenizer_config.json").get("legacy")
    if flag is not None:
        return bool(flag)
    if os.path.isfile(os.path.join(folder, "tokenizer.model")):
        return True
    content = _read_json(folder, "tokenizer.json")
    # Written by transformers 4 (a Prepend normalizer) or 5 (Metaspace); the legacy form prepends to every stretch.
    return '"Prepend"' in json.dumps(content.get("normalizer")) or (
        (content.get("pre_tokenizer") or {}).get("prepend_scheme") == "always"
    )


def _read_json(folder: str, name: str) -> dict:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _load_sentencepiece(folder: str):
    """The sentencepiece model of the folder, or None where there is none."""
    path = os.path.join(folder, "tokenizer.model")
    if not os.path.isfile(path):
        return None
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: not a sentencepiece model: {error}") from None
