"""Records to tokenised samples to columns of the index: the work that is done for every record of a data set."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dc_megatron.config import DataConfig
from dc_megatron.data.conversation import render
from dc_megatron.data.faults import RecordFault
from dc_megatron.data.image_store import open_stores
from dc_megatron.data.json_stream import Chunk, parse_chunk
from dc_megatron.data.llava_json import identifier, image_names, parse_record
from dc_megatron.data.picture import Picture
from dc_megatron.data.record_pictures import PictureReader
from dc_megatron.data.tokenization import TextTokenizer, TokenisedSample, tokenise

# One entry a picture: where it lies, pixels, positions, tiles, and the frame of a video file (-1: an image).
PICTURE_COLUMNS = pa.struct(
    [
        ("name", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("tokens", pa.int32()),
        ("tiles", pa.int32()),
        ("frame", pa.int32()),
    ]
)
# One row a sample. ``images`` are the pictures that were not cut off; length: positions; tiles: of all its pictures.
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.int16()),
        ("record", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("images", pa.list_(PICTURE_COLUMNS)),
        ("length", pa.int32()),
        ("tiles", pa.int32()),
    ]
)

LONGEST_TEXT = 4_000_000


@dataclass
class Counts:
    """Sums over kept samples. tokens: positions after expansion and truncation; tiles: what the tower encodes;
    text_only: samples without a picture; truncated: samples that were cut; largest_id: the largest token id."""

    kept: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    images: int = 0
    tiles: int = 0
    text_only: int = 0
    truncated: int = 0
    largest_id: int = -1

    def add(self, sample: TokenisedSample) -> None:
        self.kept += 1
        self.tokens += sample.length
        self.supervised_tokens += sample.supervised_tokens
        self.images += len(sample.images)
        self.tiles += sum(image.tiles for image in sample.images)
        self.text_only += not sample.images
        self.truncated += sample.truncated
        self.largest_id = max(self.largest_id, int(sample.input_ids.max()))


@dataclass
class ChunkResult:
    """What became of the records of a chunk.

    source: number of the data source. next_start: byte of its file behind the chunk. batch: the kept samples, in the
    order of their records. faults: (record, id, reason, detail) of the others. notes: (record, name, kind) of odd
    pictures.
    """

    source: int
    records: int
    next_start: int
    batch: pa.RecordBatch
    counts: Counts
    faults: list[tuple[int, str, str, str]]
    notes: list[tuple[int, str, str]]


class SampleMaker:
    """Makes samples of the records of ``config.sources``. Opens their stores; ``cache``: see ``open_store``."""

    def __init__(self, config: DataConfig, tokenizer: TextTokenizer, cache: str | None = None):
        self._config, self._tokenizer = config, tokenizer
        self._pictures = [
            PictureReader(store, config.tiling, config.video_frames, number)
            for number, store in enumerate(open_stores(config.sources, cache=cache))
        ]

    def sample(self, record, number: int, source: int = 0) -> TokenisedSample:
        """The sample of one parsed record; raises RecordFault."""
        config, parsed = self._config, parse_record(record, number)
        messages, pictures = self._pictures[source].read(parsed)
        rendered = render(config.version, messages)
        if rendered.image_count != len(pictures):
            raise RecordFault(
                RecordFault.IMAGE_COUNT, f"{rendered.image_count} <image> marks in the text, {len(pictures)} files"
            )
        _check_text(rendered.text)
        sample = tokenise(
            self._tokenizer,
            rendered,
            pictures,
            model_max_length=config.model_max_length,
            identifier=parsed.identifier,
            record=number,
            source=source,
        )
        if not sample.supervised_tokens:
            raise RecordFault(
                RecordFault.NO_TARGET, f"none within --model_max_length {config.model_max_length} positions"
            )
        return sample

    def chunk(self, chunk: Chunk, source: int = 0) -> ChunkResult:
        """All records of a chunk. UserError: what is not JSON, a store that fails."""
        reader, samples = self._pictures[source], []
        counts, faults, notes = Counts(), [], []
        records = list(parse_chunk(chunk))
        reader.forget()
        with warnings.catch_warnings():
            # Of PIL, about large pictures and odd EXIF blocks.
            warnings.simplefilter("ignore")
            reader.read_ahead([name for _, record in records for name in image_names(record)])
            for number, record in records:
                reader.notes = []
                try:
                    sample = self.sample(record, number, source)
                except RecordFault as fault:
                    faults.append((number, identifier(record, number), fault.reason, fault.detail))
                except RecursionError:
                    faults.append((number, str(number), RecordFault.STRUCTURE, "nested too deeply"))
                else:
                    samples.append(sample)
                    counts.add(sample)
                notes += [(number, *note) for note in reader.notes]
        return ChunkResult(source, chunk.records, chunk.next_start, record_batch(samples), counts, faults, notes)


def sample_from_record(
    config: DataConfig, tokenizer: TextTokenizer, record, number: int, source: int = 0
) -> TokenisedSample:
    """One record of data source ``source``, checked and tokenised; raises RecordFault. For single records."""
    return SampleMaker(config, tokenizer).sample(record, number, source)


def record_batch(samples: Sequence[TokenisedSample]) -> pa.RecordBatch:
    """The samples as rows of SCHEMA."""
    pictures = [image for sample in samples for image in sample.images]
    columns = [
        pa.array([sample.identifier for sample in samples], type=pa.string()),
        _numbers((sample.source for sample in samples), np.int16),
        _numbers((sample.record for sample in samples), np.int64),
        _lists([sample.input_ids for sample in samples]),
        _lists([sample.labels for sample in samples]),
        pa.ListArray.from_arrays(_offsets(len(sample.images) for sample in samples), _picture_array(pictures)),
        _numbers((sample.length for sample in samples), np.int32),
        _numbers((sum(image.tiles for image in sample.images) for sample in samples), np.int32),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _picture_array(pictures: list[Picture]) -> pa.StructArray:
    numbers = [
        _numbers((getattr(picture, kind.name) for picture in pictures), np.int32) for kind in list(PICTURE_COLUMNS)[1:]
    ]
    names = pa.array([picture.name for picture in pictures], type=pa.string())
    return pa.StructArray.from_arrays([names, *numbers], fields=list(PICTURE_COLUMNS))


def _numbers(values: Iterator[int], kind: type) -> pa.Array:
    return pa.array(np.fromiter(values, dtype=kind))


def _lists(arrays: list[np.ndarray]) -> pa.ListArray:
    flat = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32)
    return pa.ListArray.from_arrays(_offsets(len(array) for array in arrays), pa.array(flat, type=pa.int32()))


def _offsets(lengths: Iterator[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *lengths]), type=pa.int32())


def _check_text(text: str) -> None:
    """Tokenizers take text that can be written down; a JSON escape may stand for half of a character.

    They take any length, too, at a second and some hundred megabytes for a million characters.
    """
    if len(text) > LONGEST_TEXT:
        raise RecordFault(RecordFault.STRUCTURE, f"a text of {len(text)} characters (limit {LONGEST_TEXT})")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise RecordFault(RecordFault.STRUCTURE, f"{half} in the text is half of a surrogate pair") from None
