"""Files to pixel batches behind one interface; ``--image-backend`` chooses PIL or DALI."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from dc_megatron.config import VisionConfig, one_of
from dc_megatron.data.image_reference import DECODE_ERRORS, open_bytes, preprocess_bytes, substitute
from dc_megatron.errors import UserError

logger = logging.getLogger(__name__)


class ImageLoader(ABC):
    """Decodes, resizes and normalises lists of image files."""

    name: str

    def __init__(self, vision: VisionConfig, aspect_ratio: str):
        self.vision = vision
        self.aspect_ratio = aspect_ratio
        self._warned: set[str] = set()

    def load(self, files: Sequence[str]) -> tuple[torch.Tensor, list[int]]:
        """(float32 [k, 3, H, W], numbers of the files that could not be decoded).

        A failed image is replaced by one of the pad colour, with a warning that names the file (once a file).
        """
        size = self.vision.image_size
        if not files:
            return torch.zeros(0, 3, size, size), []
        encoded: list[bytes | None] = []
        for path in files:
            try:
                encoded.append(open_bytes(path))
            except OSError as error:
                self._warn(path, error)
                encoded.append(None)
        return self._decode(files, encoded)

    @abstractmethod
    def _decode(self, files: Sequence[str], encoded: list[bytes | None]) -> tuple[torch.Tensor, list[int]]:
        """As ``load``, from the files' bytes (None: unreadable, already warned about)."""

    def _reference(self, path: str, data: bytes | None) -> tuple[np.ndarray, bool]:
        """(float32 [3, H, W], decoded) by PIL; the substitute and False where that fails."""
        if data is not None:
            try:
                return preprocess_bytes(data, self.vision, self.aspect_ratio), True
            except DECODE_ERRORS as error:
                self._warn(path, error)
        return substitute(self.vision), False

    def _warn(self, path: str, error: Exception) -> None:
        if path not in self._warned:
            self._warned.add(path)
            logger.warning("image %s cannot be decoded (%s); a blank picture takes its place", path, error)


class PilImageLoader(ImageLoader):
    """The reference, image by image."""

    name = "pil"

    def _decode(self, files: Sequence[str], encoded: list[bytes | None]) -> tuple[torch.Tensor, list[int]]:
        pixels, failed = [], []
        for number, (path, data) in enumerate(zip(files, encoded, strict=True)):
            image, decoded = self._reference(path, data)
            pixels.append(image)
            if not decoded:
                failed.append(number)
        return torch.from_numpy(np.stack(pixels)), failed


def image_loader(backend: str, vision: VisionConfig, aspect_ratio: str, *, threads: int = 1) -> ImageLoader:
    """The loader of ``--image-backend``: ``auto`` takes DALI where it can be imported.

    threads: CPU threads of DALI. Raises UserError where ``dali`` is asked for and not installed.
    """
    one_of(backend, ("auto", "dali", "pil"), "--image-backend")
    if backend != "pil":
        try:
            from dc_megatron.data.image_dali import DaliImageLoader
        except ImportError as error:
            if backend == "dali":
                raise UserError(
                    f"--image-backend dali: DALI cannot be imported ({error}); install nvidia-dali-cuda130 or"
                    " nvidia-dali-cuda120, or use --image-backend pil"
                ) from None
        else:
            return DaliImageLoader(vision, aspect_ratio, threads=threads)
    return PilImageLoader(vision, aspect_ratio)
