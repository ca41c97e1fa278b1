"""The flags of tools/preflight.py as one object, with training's names and defaults (a test compares them)."""

from __future__ import annotations

import os
from dataclasses import dataclass

from dc_megatron.config import (
    ConnectorConfig,
    DataConfig,
    LanguageConfig,
    VisionConfig,
    tiling_of_flags,
)
from dc_megatron.errors import UserError

# Rows that training makes by default are at least as long.
PACKED_LENGTH = 4096


@dataclass(frozen=True)
class PreflightSettings:
    """What was asked. data_path, image_folder: words of the flags, as data/sources.py reads them.

    decode: pictures to decode whole, None: all of them. html: where the page goes ("": beside the index, or here).
    index_folder: "" builds the index in a temporary folder.
    """

    data_path: tuple[str, ...]
    model_name_or_path: str
    vision_tower: str
    version: str
    image_folder: tuple[str, ...] = ()
    mm_dense_connector_type: str = "dci"
    image_aspect_ratio: str = "square"
    image_grid_pinpoints: str = ""
    mm_patch_merge_type: str = ""
    model_max_length: int = 2048
    video_frames: int = 8
    max_bad_sample_rate: float = 0.001
    index_folder: str = ""
    seed: int = 1234
    decode: int | None = 500
    html: str = ""
    samples_per_step: int = 128

    def __post_init__(self):
        if self.model_max_length < 1:
            raise UserError(f"--model_max_length {self.model_max_length}: must be a number of tokens above 0")
        if self.video_frames < 1:
            raise UserError(f"--video-frames {self.video_frames}: must be above 0")
        if self.samples_per_step < 1:
            raise UserError(f"--samples-per-step {self.samples_per_step}: must be above 0")
        if not 0 <= self.max_bad_sample_rate <= 1:
            raise UserError(f"--max-bad-sample-rate {self.max_bad_sample_rate}: a share of the records, from 0 to 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed}: must be from 0 to {2**32 - 1}")

    @property
    def page(self) -> str:
        """Where the page is written."""
        return self.html or os.path.join(self.index_folder, "preflight.html")


@dataclass(frozen=True)
class Shapes:
    """What the folders of the models say. language: None where the tokenizer's folder has no config.json."""

    vision: VisionConfig
    connector: ConnectorConfig
    language: LanguageConfig | None


def decode_count(word: str) -> int | None:
    """The value of ``--decode``: a number, ``all`` (None) or ``none`` (0); UserError."""
    if word in ("all", "none"):
        return None if word == "all" else 0
    if not word.isdecimal():
        raise UserError(f"--decode {word}: a number of pictures, all or none")
    return int(word)


def read_shapes(settings: PreflightSettings) -> Shapes:
    """UserError for a tower or model that training would refuse."""
    folder = settings.model_name_or_path
    has_config = os.path.isfile(os.path.join(folder, "config.json"))
    return Shapes(
        vision=VisionConfig.from_folder(settings.vision_tower),
        connector=ConnectorConfig(settings.mm_dense_connector_type),
        language=LanguageConfig.from_folder(folder) if has_config else None,
    )


def data_config(settings: PreflightSettings, shapes: Shapes) -> DataConfig:
    """The DataConfig that training makes of the same flags, but for the length of its rows; same index key."""
    from dc_megatron.data.sources import read_sources

    return DataConfig(
        sources=read_sources(settings.data_path, settings.image_folder),
        tokenizer_path=settings.model_name_or_path,
        version=settings.version,
        image_aspect_ratio=settings.image_aspect_ratio,
        model_max_length=settings.model_max_length,
        seq_length=max(PACKED_LENGTH, settings.model_max_length),
        tiling=tiling_of_flags(
            shapes.vision,
            shapes.connector,
            settings.image_aspect_ratio,
            settings.image_grid_pinpoints,
            settings.mm_patch_merge_type,
        ),
        packing="best-fit",
        seed=settings.seed,
        max_bad_sample_rate=settings.max_bad_sample_rate,
        video_frames=settings.video_frames,
        vocab_size=shapes.language.vocab_size if shapes.language else 0,
    )
