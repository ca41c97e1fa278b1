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

    stores: of the pictures' sources. A token costs a forward pass over the whole row: nothing is kept between tokens
    but the features of the pictures.
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
    rows = [_Row(list(ids), list(mask), []) for ids, mask in prompts]
    stops = _stop_ids(tokenizer, resolved.version)
    index, tiles = feature_rows(pictures, resolved.tiling)
    features, blank = _features(session, pictures, stores, tiles, image_backend)
    images = {
        "image_features": features,
        "image_feature_index": torch.from_numpy(index),
        "num_images": tiles,
    }
    for _ in range(max_new_tokens):
        _append(rows, _next_tokens(session, rows, images).tolist(), stops)
        if all(row.done for row in rows):
            break
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


def _next_tokens(session: Runner, rows: list[_Row], images: dict) -> Tensor:
    """int64 [rows]: the likeliest next token of every row, on all ranks. ``images``: that part of the batch."""
    batch, ends = _batch(rows, session.resolved.source.tensor_model_parallel_size)
    logits = session.forward({**batch, **images}, positions=ends)
    chosen = torch.zeros(len(rows), dtype=torch.int64, device=session.device)
    if logits is not None:
        chosen = logits.argmax(dim=-1)
    return session.from_last_stage(chosen)


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
    }, ends
