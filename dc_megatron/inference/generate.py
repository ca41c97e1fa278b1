"""Greedy answers to questions about pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dc_megatron.config import image_share
from dc_megatron.data.conversation import stop_text
from dc_megatron.data.image_loading import tile_requests
from dc_megatron.data.image_store import ImageStore
from dc_megatron.data.picture import Picture
from dc_megatron.data.rows import feature_rows
from dc_megatron.data.tokenization import TextTokenizer, check_largest_id, encode_prompt
from dc_megatron.inference.session import Runner

# Most rows whose keys and values are kept at once: half a megabyte a position of a row for a model of 7B in 16 bits.
_CACHED_ROWS = 16


@dataclass(frozen=True)
class Question:
    """``pictures``: in the order of the ``<image>`` marks in ``text`` (or in front of it)."""

    text: str
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Answers:
    """``texts``: one a question. ``blank``: numbers of the pictures, counted over all questions, that were blank ones
    to the model because their file could not be read or decoded."""

    texts: list[str]
    blank: frozenset[int] = frozenset()


@dataclass
class _Row:
    ids: list[int]
    mask: list[bool]
    # int64: the row among all pictures' features of every image position.
    features: Tensor
    answer: list[int]
    done: bool = False


def answer(
    session: Runner,
    tokenizer: TextTokenizer,
    questions: Sequence[Question],
    stores: Sequence[ImageStore],
    max_new_tokens: int = 64,
    image_backend: str = "auto",
) -> Answers:
    """The greedy answer to each of ``questions``, which are run as one batch. Every rank calls it and gets them all.

    stores: of the pictures' sources. Prompts of one length go on together, each token after the first one resting on
    kept keys and values; where the session keeps none, all go on together, and a token costs a pass over the whole row.
    """
    version = session.resolved.version
    prompts = [
        encode_prompt(tokenizer, version, question.text, [picture.tokens for picture in question.pictures])
        for question in questions
    ]
    pictures = [picture for question in questions for picture in question.pictures]
    return continue_prompts(session, tokenizer, prompts, pictures, stores, max_new_tokens, image_backend)


def continue_prompts(
    session: Runner,
    tokenizer: TextTokenizer,
    prompts: Sequence[tuple[Sequence[int], Sequence[bool]]],
    pictures: Sequence[Picture],
    stores: Sequence[ImageStore],
    max_new_tokens: int,
    image_backend: str = "auto",
) -> Answers:
    """As ``answer`` for prompts that are tokenised: (ids, image mask) each, and all pictures in their order.

    stores: of the pictures' sources. Raises UserError for a token id that the model has not.
    """
    resolved = session.resolved
    largest = max((token for ids, _ in prompts for token in ids), default=0)
    check_largest_id(largest, resolved.language.vocab_size, tokenizer.folder, "a question")
    stops = _stop_ids(tokenizer, resolved.version)
    index, tiles = feature_rows(pictures, resolved.tiling)
    features, blank = _features(session, pictures, stores, tiles, image_backend)
    own = torch.from_numpy(index).split([sum(mask) for _, mask in prompts])
    rows = [_Row(list(ids), list(mask), part, []) for (ids, mask), part in zip(prompts, own, strict=True)]
    for group in _groups(rows, session.keeps_keys):
        _continue(session, group, features, tiles, max_new_tokens, stops)
    text = [tokenizer.decode(row.answer) for row in rows]
    end = stop_text(resolved.version)
    return Answers([t.split(end)[0].strip() if end.strip() else t.split(end)[0] for t in text], blank)


def _stop_ids(tokenizer: TextTokenizer, version: str) -> set[int]:
    end = stop_text(version)
    special = tokenizer.special_id(end)
    ids = {special} if special is not None else set()
    if not ids:
        ids = {tokenizer.encode("a" + end)[0][-1]}
    return ids | ({tokenizer.eos_id} if tokenizer.eos_id is not None else set())


def _features(
    session: Runner, pictures: Sequence[Picture], stores: Sequence[ImageStore], tiles: int, image_backend: str
) -> tuple[Tensor | None, frozenset[int]]:
    """Features [tiles * tile tokens, h] on the first stage, and on all ranks the numbers of pictures that failed.

    Every tensor-parallel rank encodes its share of tiles.
    """
    if not pictures:
        return None, frozenset()
    model, features = session.unwrapped, None
    failed = torch.zeros(len(pictures), dtype=torch.int32, device=session.device)
    if model.connector is not None:
        group = model.pg_collection.tp
        requests = tile_requests(pictures, stores, image_share(tiles, group.rank(), group.size()))
        pixels, numbers = session.image_loader(image_backend).load(requests)
        unreadable = {requests[number].key for number in numbers}
        for number, picture in enumerate(pictures):
            failed[number] = (picture.source, picture.name) in unreadable
        with torch.no_grad():
            features = model.image_features(pixels.to(session.device), tiles).flatten(0, 1)
    return features, frozenset(session.anywhere(failed).nonzero().flatten().tolist())


def _groups(rows: list[_Row], of_one_length: bool) -> list[list[_Row]]:
    """Rows that go on together: kept keys of a batch end at one position."""
    if not of_one_length:
        return [rows]
    lengths: dict[int, list[_Row]] = {}
    for row in rows:
        lengths.setdefault(len(row.ids), []).append(row)
    return [
        same[first : first + _CACHED_ROWS] for same in lengths.values() for first in range(0, len(same), _CACHED_ROWS)
    ]


def _continue(
    session: Runner, rows: list[_Row], features: Tensor | None, tiles: int, new_tokens: int, stops: set[int]
) -> None:
    """Append up to ``new_tokens`` tokens to each of ``rows``. features: of all pictures, ``tiles`` tiles."""
    cache = session.new_cache(len(rows), max(len(row.ids) for row in rows) + new_tokens)
    for number in range(new_tokens):
        if cache is not None and number:
            batch, ends = _last_positions(rows)
        else:
            # Padding would be kept as well.
            multiple = 1 if cache is not None else session.resolved.source.tensor_model_parallel_size
            batch, ends = _batch(rows, multiple)
            batch |= {"image_features": features, "num_images": tiles}
        logits = session.forward(batch, positions=ends, cache=cache)
        chosen = torch.zeros(len(rows), dtype=torch.int64, device=session.device)
        if logits is not None:
            chosen = logits.argmax(dim=-1)
        _append(rows, session.from_last_stage(chosen).tolist(), stops)
        if all(row.done for row in rows):
            break


def _append(rows: list[_Row], tokens: list[int], stops: set[int]) -> None:
    for row, token in zip(rows, tokens, strict=True):
        if row.done or token in stops:
            row.done = True
            continue
        row.answer.append(token)
        row.ids.append(token)
        row.mask.append(False)


def _batch(rows: list[_Row], multiple: int) -> tuple[dict, Tensor]:
    """Rows padded on the right to a common length, and the flat index of the last real position of each."""
    length = max(len(row.ids) for row in rows)
    length = -(-length // multiple) * multiple
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        mask[number, : len(row.mask)] = torch.tensor(row.mask)
    ends = torch.tensor([number * length + len(row.ids) - 1 for number, row in enumerate(rows)])
    return {
        "input_ids": ids,
        "position_ids": torch.arange(length).expand(len(rows), -1),
        "image_mask": mask,
        "image_feature_index": torch.cat([row.features for row in rows]),
    }, ends


def _last_positions(rows: list[_Row]) -> tuple[dict, Tensor]:
    """The newest token of every row, and where it stands in that batch."""
    return {
        "input_ids": torch.tensor([row.ids[-1:] for row in rows]),
        "position_ids": torch.tensor([[len(row.ids) - 1] for row in rows]),
        "image_mask": torch.zeros(len(rows), 1, dtype=torch.bool),
        "num_images": 0,
    }, torch.arange(len(rows))
