"""Pictures of samples to pixel batches behind one interface; ``--image-backend`` chooses PIL or DALI.

Bytes are read by threads of their own, because a store may be far away, and decoded by ``threads`` others. What a file
holds is decided by its first bytes, never by its name. A picture that cannot be read becomes a blank one, and counts.
"""

from __future__ import annotations

import itertools
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dc_megatron.config import ImageTiling, VisionConfig, one_of
from dc_megatron.data.array_pool import ArrayPool
from dc_megatron.data.faults import RecordFault
from dc_megatron.data.image_reference import DECODE_ERRORS, pixels_of, pixels_of_bytes, substitute
from dc_megatron.data.picture import Picture
from dc_megatron.data.retrying import StoreFailure
from dc_megatron.errors import UserError

if TYPE_CHECKING:
    from dc_megatron.data.image_store import ImageStore

logger = logging.getLogger(__name__)

# Threads that wait for a store; they hardly use a processor.
READERS = 8
# UnsafeName of a store is a ValueError, and what it gives up on an OSError.
LOAD_ERRORS = (*DECODE_ERRORS, RecordFault)


@dataclass(frozen=True)
class ImageRequest:
    """The tiles ``tiles`` (numbers below ``picture.tiles``) of a picture that lies in ``store``."""

    store: ImageStore
    picture: Picture
    tiles: range

    @property
    def key(self) -> tuple[int, str]:
        """What stands for the file, or the video."""
        return self.picture.source, self.picture.name


def tile_requests(pictures: Sequence[Picture], stores: Sequence[ImageStore], share: range) -> list[ImageRequest]:
    """Requests for the tiles ``share``, counted over all tiles of ``pictures`` in their order.

    stores: one for every data source. A picture may be asked for a part of its tiles only.
    """
    requests, first = [], 0
    for picture in pictures:
        skipped = max(0, -(-(first - share.start) // share.step)) * share.step
        wanted = range(share.start + skipped - first, min(share.stop - first, picture.tiles), share.step)
        if wanted:
            requests.append(ImageRequest(stores[picture.source], picture, wanted))
        first += picture.tiles
    return requests


class ImageLoader(ABC):
    """Decodes, resizes, cuts and normalises the pictures of a list of requests.

    threads: how many decode at once. group: how many pictures a thread takes at a time.
    """

    name: str

    def __init__(
        self, vision: VisionConfig, aspect_ratio: str, tiling: ImageTiling, *, threads: int = 1, group: int = 1
    ):
        self.vision = vision
        self.aspect_ratio = aspect_ratio
        self.tiling = tiling
        self.group = group
        self._blank = torch.from_numpy(substitute(vision))
        self._results = ArrayPool(np.float32)
        self._warned: set[tuple[int, str]] = set()
        self._warning = threading.Lock()
        self._readers = ThreadPoolExecutor(READERS, "image-reader")
        self._decoders = ThreadPoolExecutor(max(threads, 1), "image-decoder")

    def load(self, requests: Sequence[ImageRequest]) -> tuple[torch.Tensor, list[int]]:
        """(float32 [sum of len(r.tiles), 3, H, W], numbers of the requests that failed), both in the requests' order.

        The tiles of a failed request are of the pad colour, with a warning that names the file (once a file).
        UserError: the store itself fails.
        """
        size = self.vision.image_size
        ends = np.cumsum([0, *(len(request.tiles) for request in requests)]).tolist()
        pixels = torch.from_numpy(self._results.take(ends[-1], 3, size, size))
        places = [pixels[start:end] for start, end in itertools.pairwise(ends)]
        # (numbers of requests, what fills their places and gives those of them that failed)
        jobs: list[tuple[list[int], Future]] = []
        for numbers in _same_video(requests):
            mine = ([requests[n] for n in numbers], [places[n] for n in numbers])
            jobs.append((numbers, self._decoders.submit(self._load_video, *mine)))
        images = [number for number, request in enumerate(requests) if request.picture.frame < 0]
        # The largest first, so that the threads finish together.
        images.sort(key=lambda n: -requests[n].picture.width * requests[n].picture.height)
        reading = {number: self._readers.submit(self._read, requests[number]) for number in images}
        for numbers in (images[start : start + self.group] for start in range(0, len(images), self.group)):
            mine = ([table[n] for n in numbers] for table in (requests, reading, places))
            jobs.append((numbers, self._decoders.submit(self._load_images, *mine)))
        return pixels, sorted(numbers[place] for numbers, job in jobs for place in job.result())

    @abstractmethod
    def _load_images(
        self, requests: Sequence[ImageRequest], reading: Sequence[Future], places: Sequence[torch.Tensor]
    ) -> list[int]:
        """Fill ``places``; returns the places in ``requests`` of those that failed. Called by a decoding thread.

        reading: the files' bytes, still on their way (None: unreadable, already warned about).
        """

    def _read(self, request: ImageRequest) -> bytes | None:
        try:
            return request.store.read(request.picture.name)
        except StoreFailure as error:
            raise _store_failed(request, error) from None
        except LOAD_ERRORS as error:
            self._warn(request, error)
            return None

    def _load_video(self, requests: Sequence[ImageRequest], places: Sequence[torch.Tensor]) -> list[int]:
        """Fill ``places`` with frames of one video, read in one pass; returns the numbers that failed."""
        from dc_megatron.data.video import read_frames

        first = requests[0]
        try:
            frames = read_frames(first.store, first.picture.name, [request.picture.frame for request in requests])
        except StoreFailure as error:
            raise _store_failed(first, error) from None
        except LOAD_ERRORS as error:
            self._warn(first, error)
            frames = [None] * len(requests)
        return [n for n, (r, f, p) in enumerate(zip(requests, frames, places, strict=True)) if not self._fill(r, f, p)]

    def _fill(self, request: ImageRequest, source: bytes | np.ndarray | None, place: torch.Tensor) -> bool:
        """Put the reference's tiles into ``place``; blank ones, and False, where that fails.

        source: an encoded image, a decoded frame uint8 [H, W, 3], or None (unreadable, already warned about).
        """
        if source is not None:
            make = pixels_of_bytes if isinstance(source, bytes) else pixels_of
            try:
                tiles = make(source, self.vision, self.aspect_ratio, self.tiling, request.picture, request.tiles)
            except LOAD_ERRORS as error:
                self._warn(request, error)
            else:
                place.copy_(torch.from_numpy(tiles))
                return True
        place[:] = self._blank
        return False

    def _warn(self, request: ImageRequest, error: Exception) -> None:
        """One line, once a file."""
        with self._warning:
            if request.key in self._warned:
                return
            self._warned.add(request.key)
        logger.warning("image %s cannot be decoded (%s); a blank picture takes its place", request.key[1], error)


class PilImageLoader(ImageLoader):
    """The reference, ``threads`` pictures at a time; PIL works outside of Python's lock."""

    name = "pil"

    def _load_images(
        self, requests: Sequence[ImageRequest], reading: Sequence[Future], places: Sequence[torch.Tensor]
    ) -> list[int]:
        images = enumerate(zip(requests, reading, places, strict=True))
        return [n for n, (request, data, place) in images if not self._fill(request, data.result(), place)]


def _store_failed(request: ImageRequest, error: StoreFailure) -> UserError:
    return UserError(f"--image_folder {request.store.location}: {error}; start again when the store answers")


def _same_video(requests: Sequence[ImageRequest]) -> list[list[int]]:
    """Numbers of the requests for frames, those of one video together, so that one pass over it reads them all."""
    videos: dict[tuple[int, str], list[int]] = {}
    for number, request in enumerate(requests):
        if request.picture.frame >= 0:
            videos.setdefault(request.key, []).append(number)
    return list(videos.values())


def image_loader(
    backend: str,
    vision: VisionConfig,
    aspect_ratio: str,
    tiling: ImageTiling,
    *,
    threads: int = 1,
    decode_device: str = "cpu",
) -> ImageLoader:
    """The loader of ``--image-backend``: ``auto`` takes DALI where it can be imported.

    threads: how many decode at once. decode_device: ``gpu`` has DALI decode on the GPU. Raises UserError where ``dali``
    is asked for and not installed.
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
            return DaliImageLoader(vision, aspect_ratio, tiling, threads=threads, device=decode_device)
    return PilImageLoader(vision, aspect_ratio, tiling, threads=threads)
