"""What only the data files themselves tell: the same twice, words of another template, how long cut samples would be.

One pass over the records, beside the finished index; of every record two hashes are kept.
"""

from __future__ import annotations

import json
import random
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import xxhash

from dc_megatron.config import DataConfig
from dc_megatron.data.conversation import IMAGE_MARK
from dc_megatron.data.faults import RecordFault
from dc_megatron.data.image_store import ImageStore
from dc_megatron.data.index_samples import SampleMaker
from dc_megatron.data.json_stream import json_chunks, parse_chunk
from dc_megatron.data.llava_json import identifier
from dc_megatron.data.tokenization import TextTokenizer
from dc_megatron.reports.preflight_columns import Columns

# What templates write around messages; inside of a message it was written by another program, or by another template.
_MARKS = (
    r"\b(?:USER|ASSISTANT):",
    r"<\|[^|<>\s]{1,40}\|>",
    r"</s>",
    r"###\s*(?:Human|Assistant|Instruction|Response|User|System)\s*:",
    r"\[/?INST\]",
    r"<</?SYS>>",
)
# One of these is in every text with a mark; looking for them is much cheaper than the pattern.
_HINTS = ("<", "[", "###", "USER:", "ASSISTANT:")
# Different words that are told apart; a text may hold any number of them.
_MOST_MARKS = 50
_OTHER_MARKS = "others"
EXAMPLES = 5
# Of samples that were cut, so many are tokenised once more to learn how long they are.
_MOST_DOUBTFUL = 2000
_AROUND = 30
_NOBODY = (-1, -1)


@dataclass
class MarkCount:
    """Records with one kind of words, and a few of them: (source, record, id, what stands around it)."""

    records: int = 0
    examples: list[tuple[int, int, str, str]] = field(default_factory=list)


@dataclass
class RecordFindings:
    """What a pass over the data files found.

    content, ids: uint64 [records], hashes, 0 where there is none; starts: where each source's records begin in them.
    marks: by the words; marked: records with any, by source. answers_with_image: examples as in MarkCount of answers
    with an ``<image>``. videos: of kept records, by source; with_video: kept records that have one.

    whole: bool [kept samples], those that nothing was cut from. doubtful: int64, the full lengths of the other ones and
    of records that lack a target, or of a fair choice of them; 0 where there is no target at all. doubtful_samples: how
    many they stand for.
    """

    content: np.ndarray
    ids: np.ndarray
    starts: list[int]
    marks: dict[str, MarkCount]
    marked: Counter
    answers_with_image: MarkCount
    videos: Counter
    with_video: Counter
    whole: np.ndarray
    doubtful: np.ndarray
    doubtful_samples: int

    def place(self, number: int) -> tuple[int, int]:
        """(source, record) of an entry of ``content``."""
        source = int(np.searchsorted(self.starts, number, side="right")) - 1
        return source, number - self.starts[source]


def read_records(
    config: DataConfig,
    columns: Columns,
    without_target: Sequence[tuple[int, int]],
    tokenizer: TextTokenizer,
    stores: Sequence[ImageStore],
    progress: Callable[[int], None] = lambda done: None,
) -> RecordFindings:
    """Go over all records of ``config.sources``, of which ``columns`` are those that were kept.

    without_target: (source, record) of those dropped for want of a target, in order. progress(records).
    """
    reader = _Reader(config, columns, without_target, tokenizer, stores)
    for source in range(len(config.sources)):
        for done in reader.read(source):
            progress(done)
    return reader.findings()


class Marks:
    """Finds words of templates, and the tokenizer's special tokens: it takes those for tokens wherever they stand."""

    def __init__(self, tokenizer: TextTokenizer):
        added = tokenizer.hugging_face.added_tokens_decoder.values()
        known = re.compile("|".join(_MARKS))
        # The mark for an image is put there by the format itself.
        special = {token.content for token in added if token.special and token.content.strip()} - {IMAGE_MARK}
        special = sorted((one for one in special if not known.fullmatch(one)), key=len, reverse=True)
        self._pattern = re.compile("|".join([*_MARKS, *map(re.escape, special)]))
        self._hints = (*_HINTS, *(one for one in special if not any(hint in one for hint in _HINTS)))

    def find(self, text: str) -> Iterator[tuple[str, str]]:
        """(mark, what stands around it) of every one; ``text`` without its ``<image>``."""
        text = text.replace(IMAGE_MARK, "")
        if any(hint in text for hint in self._hints):
            for match in self._pattern.finditer(text):
                yield " ".join(match.group().split()), _around(text, match.start(), match.end())


class _Reader:
    def __init__(self, config: DataConfig, columns: Columns, without_target, tokenizer: TextTokenizer, stores):
        self._config, self._columns, self._finder = config, columns, Marks(tokenizer)
        self._maker = SampleMaker(replace(config, model_max_length=1 << 40, seq_length=1 << 40), tokenizer, stores)
        self._kept = _places(columns)
        self._next_kept = next(self._kept, _NOBODY)
        self._position = 0
        self._without_target = iter(without_target)
        self._next_without = next(self._without_target, _NOBODY)
        self._largest_picture = int(columns.tokens.max(initial=config.tiling.tile_tokens))
        self._content, self._ids, self._starts = array("Q"), array("Q"), []
        self._marks: dict[str, MarkCount] = {}
        self._marked, self._videos, self._with_video = Counter(), Counter(), Counter()
        self._answers = MarkCount()
        self._whole = np.ones(len(columns.length), dtype=bool)
        self._doubtful = _Reservoir(_MOST_DOUBTFUL, config.seed)

    def read(self, source: int) -> Iterator[int]:
        """Records that were read so far, after every chunk."""
        self._starts.append(len(self._content))
        for chunk in json_chunks(self._config.sources[source].data_path):
            for number, record in parse_chunk(chunk):
                self._add(source, number, record)
            yield len(self._content)

    def _add(self, source: int, number: int, record) -> None:
        whole = record if isinstance(record, dict) else {}
        self._content.append(_content_hash(whole, self._config.sources[source].image_folder))
        self._ids.append(_id_hash(whole))
        self._look_at_texts(source, number, whole)
        videos = _names(whole, "video")
        if (source, number) == self._next_kept:
            if videos:
                self._videos[source] += videos
                self._with_video[source] += 1
            if self._may_be_cut(_names(whole, "image"), videos):
                self._whole[self._position] = False
                self._doubtful.add(lambda: self._full_length(source, number, whole))
            self._next_kept = next(self._kept, _NOBODY)
            self._position += 1
        elif (source, number) == self._next_without:
            self._doubtful.add(lambda: self._full_length(source, number, whole))
            self._next_without = next(self._without_target, _NOBODY)

    def _may_be_cut(self, images: int, videos: int) -> bool:
        """Whether the kept sample lost something; True as well where it fits exactly."""
        length, longest = int(self._columns.length[self._position]), self._config.model_max_length
        if length == longest:
            return True
        pictures = int(self._columns.pictures[self._position])
        return length + self._largest_picture > longest and (pictures < images or videos > 0)

    def _full_length(self, source: int, number: int, record: dict) -> int:
        """Positions of the record if nothing is cut."""
        try:
            return self._maker.sample(record, number, source).length
        except RecordFault:
            # No target anywhere in it, or a picture that went away since.
            return 0

    def _look_at_texts(self, source: int, number: int, record: dict) -> None:
        messages = record.get("conversations")
        found: dict[str, str] = {}
        with_image = ""
        for message in messages if isinstance(messages, list) else ():
            value = message.get("value") if isinstance(message, dict) else None
            if not isinstance(value, str):
                continue
            for mark, text in self._finder.find(value):
                found.setdefault(mark, text)
            if not with_image and message.get("from") == "gpt" and IMAGE_MARK in value:
                start = value.index(IMAGE_MARK)
                with_image = _around(value, start, start + len(IMAGE_MARK))
        name = identifier(record, number)
        for mark, text in found.items():
            mark = mark if mark in self._marks or len(self._marks) < _MOST_MARKS else _OTHER_MARKS
            _count(self._marks.setdefault(mark, MarkCount()), (source, number, name, text))
        self._marked[source] += bool(found)
        if with_image:
            _count(self._answers, (source, number, name, with_image))

    def findings(self) -> RecordFindings:
        return RecordFindings(
            content=np.frombuffer(self._content, dtype=np.uint64) if self._content else np.zeros(0, np.uint64),
            ids=np.frombuffer(self._ids, dtype=np.uint64) if self._ids else np.zeros(0, np.uint64),
            starts=self._starts,
            marks=dict(sorted(self._marks.items(), key=lambda entry: -entry[1].records)),
            marked=self._marked,
            answers_with_image=self._answers,
            videos=self._videos,
            with_video=self._with_video,
            whole=self._whole,
            doubtful=np.array(self._doubtful.chosen, dtype=np.int64),
            doubtful_samples=self._doubtful.seen,
        )


class _Reservoir:
    """A fair choice of at most ``room`` numbers out of any number that come one by one; only those are computed."""

    def __init__(self, room: int, seed: int):
        self._room, self._random = room, random.Random(seed)
        self.chosen: list[int] = []
        self.seen = 0

    def add(self, number: Callable[[], int]) -> None:
        self.seen += 1
        if len(self.chosen) < self._room:
            self.chosen.append(number())
        elif (place := self._random.randrange(self.seen)) < self._room:
            self.chosen[place] = number()


def _places(columns: Columns) -> Iterator[tuple[int, int]]:
    """(source, record) of every kept sample, in order."""
    for start in range(0, len(columns.source), 1 << 14):
        part = slice(start, start + (1 << 14))
        yield from zip(columns.source[part].tolist(), columns.record[part].tolist(), strict=True)


def _content_hash(record: dict, image_folder: str) -> int:
    """Of pictures and messages; 0 for a record without messages."""
    messages = record.get("conversations")
    if not messages:
        return 0
    pictures = [record.get("image"), record.get("video")]
    try:
        text = json.dumps([image_folder if any(pictures) else "", pictures, messages], sort_keys=True)
    except (RecursionError, ValueError, TypeError):
        return 0
    return xxhash.xxh3_64_intdigest(text.encode()) or 1


def _id_hash(record: dict) -> int:
    value = record.get("id")
    if not isinstance(value, str | int | float):
        return 0
    return xxhash.xxh3_64_intdigest(repr(value).encode("utf-8", "backslashreplace")) or 1


def _names(record: dict, key: str) -> int:
    value = record.get(key)
    return len(value) if isinstance(value, list) else int(isinstance(value, str))


def _around(text: str, start: int, end: int) -> str:
    return text[max(start - _AROUND, 0) : min(end, start + 2 * _AROUND) + _AROUND]


def _count(counted: MarkCount, example: tuple[int, int, str, str]) -> None:
    counted.records += 1
    if len(counted.examples) < EXAMPLES:
        counted.examples.append(example)
