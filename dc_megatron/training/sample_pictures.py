"""A few held-out pictures (of training where there are none) with the model's own words, for TensorBoard."""

from __future__ import annotations

import io
from typing import BinaryIO

import numpy as np
from megatron.core.utils import get_model_config

from dc_megatron.config import DataConfig
from dc_megatron.data.image_store import open_stores
from dc_megatron.data.index import SampleIndex
from dc_megatron.data.picture import Picture
from dc_megatron.data.picture_captions import picture_with_words
from dc_megatron.data.rows import expand
from dc_megatron.data.tokenization import IGNORE, IMAGE_ID, TokenisedSample, load_tokenizer
from dc_megatron.inference.generate import continue_prompts
from dc_megatron.inference.session import Runner
from dc_megatron.inference.source import Resolved, Source
from dc_megatron.training.fp8_band import without_fp8
from dc_megatron.training.run import Checked

_NEW_TOKENS = 32
_MOST_SEARCHED = 10_000  # samples; a data set that begins with so much text has no pictures shown


class SamplePictures:
    """The first ``count`` samples with exactly one picture; ``write`` asks the model about them as it stands, once an
    iteration.

    The prompt is the sample's own, up to its first target. ``folder``: of the index.
    """

    def __init__(self, checked: Checked, index: SampleIndex, config: DataConfig, folder: str, count: int):
        self._checked, self._config = checked, config
        self._tokenizer = load_tokenizer(checked.settings.model_name_or_path, checked.settings.version)
        self._samples = _with_one_picture(index, count)
        self._stores = open_stores(config.sources, cache=folder)
        self._written: int | None = None

    def write(self, model, iteration: int, writer) -> None:
        """Every rank calls it with its (single) model chunk; the rank that has a ``writer`` writes."""
        if not self._samples or iteration == self._written:
            return
        self._written = iteration
        prompts = [self._prompt(sample) for sample in self._samples]
        pictures = [sample.images[0] for sample in self._samples]
        model.eval()
        try:
            runner = Runner(self._resolved(), model)
            # Rows of a prompt's length are no multiple of what FP8 takes.
            with without_fp8(get_model_config(model)):
                answered = continue_prompts(
                    runner, self._tokenizer, prompts, pictures, self._stores, _NEW_TOKENS, self._config.image_backend
                )
        finally:
            model.train()
        if writer is None:
            return
        for number, (sample, words) in enumerate(zip(self._samples, answered.texts, strict=True)):
            expected = self._tokenizer.decode(sample.labels[sample.labels != IGNORE])
            writer.add_image(
                f"samples/{number}",
                picture_with_words(self._file(sample.images[0]), words),
                iteration,
                dataformats="HWC",
            )
            writer.add_text(f"samples/{number}", f"model: {words}\n\nexpected: {expected}", iteration)

    def _prompt(self, sample: TokenisedSample) -> tuple[list[int], list[bool]]:
        ids, labels, mask = expand(sample)
        first = int(np.argmax(labels != IGNORE))
        return ids[:first].tolist(), mask[:first].tolist()

    def _file(self, picture: Picture) -> BinaryIO:
        try:
            return io.BytesIO(self._stores[picture.source].read(picture.name))
        except OSError:
            # No picture in it, which the page then says.
            return io.BytesIO()

    def _resolved(self) -> Resolved:
        settings = self._checked.settings
        return Resolved(
            source=Source(
                tensor_model_parallel_size=settings.tensor_model_parallel_size,
                pipeline_model_parallel_size=settings.pipeline_model_parallel_size,
            ),
            language=self._checked.language,
            vision=self._checked.vision,
            connector=self._checked.connector,
            version=settings.version,
            image_aspect_ratio=settings.image_aspect_ratio,
            tiling=self._checked.tiling,
            iteration_folder="",
            model_max_length=settings.model_max_length,
        )


def _with_one_picture(index: SampleIndex, count: int) -> list[TokenisedSample]:
    found = []
    for number in range(min(len(index), _MOST_SEARCHED)):
        if len(found) == count:
            break
        sample = index[number]
        whole = (sample.input_ids == IMAGE_ID).sum() == len(sample.images) == 1
        if whole and sample.images[0].frame < 0 and (sample.labels != IGNORE).any():
            found.append(sample)
    return found
