"""What the data room needs to know about a run."""

from __future__ import annotations

from dataclasses import dataclass

from dc_megatron.config.choices import IMAGE_ASPECT_RATIOS, TEMPLATES, one_of
from dc_megatron.config.tiling import ImageTiling
from dc_megatron.errors import UserError

PACKINGS = ("best-fit", "none")


@dataclass(frozen=True)
class DataSource:
    """One data file, where its pictures are (a folder, tar shards or an address), and its weight in an epoch.

    An epoch has ``weight`` times the file's samples: whole copies, and of the rest a part that changes every epoch.
    """

    data_path: str
    image_folder: str
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """Settings of data, primitives and plain dataclasses only, so that it can be stored and hashed."""

    sources: tuple[DataSource, ...]
    tokenizer_path: str
    version: str
    image_aspect_ratio: str
    model_max_length: int
    seq_length: int
    tiling: ImageTiling
    packing: str = "none"
    group_by_modality_length: bool = False
    order: str = "shuffled"
    seed: int = 1234
    image_backend: str = "auto"
    # "gpu": DALI decodes and resizes on the GPU of the process.
    image_decode_device: str = "cpu"
    max_bad_sample_rate: float = 0.001
    # Frames taken from a video, evenly spread.
    video_frames: int = 8
    # Ids of the language model; no sample may hold another. 0: not checked.
    vocab_size: int = 0

    def __post_init__(self):
        one_of(self.version, TEMPLATES, "--version")
        one_of(self.image_aspect_ratio, IMAGE_ASPECT_RATIOS, "--image_aspect_ratio")
        one_of(self.order, ("shuffled", "sequential"), "--data-order")
        one_of(self.image_backend, ("auto", "dali", "pil"), "--image-backend")
        one_of(self.image_decode_device, ("cpu", "gpu"), "--image-decode-device")
        one_of(self.packing, PACKINGS, "--packing")
        if self.model_max_length > self.seq_length:
            raise UserError(
                f"--model_max_length {self.model_max_length}: longer than --seq-length {self.seq_length};"
                " raise --seq-length or lower --model_max_length"
            )

    @property
    def data_path(self) -> str:
        """The data files as a user would name them, for messages."""
        return " ".join(source.data_path for source in self.sources)

    @property
    def image_folder(self) -> str:
        """The picture folders as a user would name them, for messages."""
        return " ".join(dict.fromkeys(source.image_folder for source in self.sources))
