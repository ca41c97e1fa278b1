"""Pictures decoded by NVIDIA DALI, on the CPU or the GPU; the only file that imports it.

DALI decodes what goes to it byte for byte as PIL does, in less time; image_resizing.py does the rest. Every decoding
thread has a pipeline of its own and gives it one picture at a time (on a GPU a group): an image that breaks in DALI
takes its pipeline with it, which is built anew in 2 ms, and only that image goes through PIL, then and later.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from PIL import Image

from dc_megatron.config import ImageTiling, VisionConfig
from dc_megatron.data.image_loading import LOAD_ERRORS, ImageLoader, ImageRequest
from dc_megatron.data.image_reference import check_indexed_size, open_image
from dc_megatron.data.image_resizing import Pixels, fill_tiles

# DALI keeps buffers for the largest picture it ever saw; larger ones are PIL's.
MAX_DALI_PIXELS = 1 << 25
# Pictures that a GPU decodes at once.
GPU_GROUP = 16
# JPEG frames that DALI decodes: baseline, extended and progressive, all in Huffman code.
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)


@pipeline_def(prefetch_queue_depth=1, exec_async=False, exec_pipelined=False)
def _pipeline(device: str):
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    # The accurate transform and smooth chroma are libjpeg's defaults, which PIL uses.
    return fn.decoders.image(
        encoded,
        device=device,
        output_type=types.RGB,
        adjust_orientation=False,
        use_fast_idct=False,
        jpeg_fancy_upsampling=True,
    )


@dataclass(frozen=True)
class _Plain:
    """An image that DALI takes: its bytes, (height, width) from its header, and where its tiles go."""

    request: ImageRequest
    data: bytes
    size: tuple[int, int]
    place: torch.Tensor


class DaliImageLoader(ImageLoader):
    """ImageLoader that decodes with DALI what DALI decodes as PIL does, and everything else with PIL.

    device: ``gpu`` decodes JPEGs with nvJPEG, and resizes on the GPU; the result comes back to the CPU's memory.
    """

    name = "dali"

    def __init__(
        self,
        vision: VisionConfig,
        aspect_ratio: str,
        tiling: ImageTiling,
        *,
        threads: int = 1,
        device: str = "cpu",
    ):
        super().__init__(vision, aspect_ratio, tiling, threads=threads, group=GPU_GROUP if device == "gpu" else 1)
        self._device = device
        self._own = threading.local()
        # Files that DALI failed on although they looked right: (source, name).
        self._refused: set[tuple[int, str]] = set()

    def _load_images(
        self, requests: Sequence[ImageRequest], reading: Sequence[Future], places: Sequence[torch.Tensor]
    ) -> list[int]:
        encoded = [future.result() for future in reading]
        sizes = [self._size(request, data) for request, data in zip(requests, encoded, strict=True)]
        plain = [_Plain(*all_) for all_ in zip(requests, encoded, sizes, places, strict=True) if all_[2] is not None]
        done = {id(image.request) for image in self._load_plain(plain)}
        return [
            number
            for number, request in enumerate(requests)
            if id(request) not in done and not self._fill(request, encoded[number], places[number])
        ]

    def _size(self, request: ImageRequest, data: bytes | None) -> tuple[int, int] | None:
        """(height, width) of an image that DALI decodes as PIL does, else None; nothing is decoded for that."""
        if data is None or request.key in self._refused:
            return None
        try:
            with open_image(io.BytesIO(data)) as image:
                if self.aspect_ratio == "anyres":
                    check_indexed_size(image.width, image.height, request.picture)
                alike = image.width * image.height <= MAX_DALI_PIXELS and decodes_alike(image, data)
                return (image.height, image.width) if alike else None
        except LOAD_ERRORS:
            # The reference meets it again, and says so.
            return None

    def _load_plain(self, images: list[_Plain]) -> list[_Plain]:
        """Decode and fill; returns those that DALI could decode."""
        if not images:
            return []
        try:
            decoded = self._run([image.data for image in images])
        except RuntimeError:
            # One of them broke, and the pipeline with it.
            self._own.pipeline = None
            if len(images) == 1:
                self._refused.add(images[0].request.key)
                return []
            return [done for image in images for done in self._load_plain([image])]
        loaded = []
        for image, pixels in zip(images, decoded, strict=True):
            if tuple(pixels.shape[:2]) == image.size:
                arguments = (self.vision, self.aspect_ratio, self.tiling, image.request.tiles, image.place)
                fill_tiles(pixels, *arguments)
                loaded.append(image)
        return loaded

    def _run(self, encoded: list[bytes]) -> list[Pixels]:
        """uint8 [H, W, 3] each, valid until this thread decodes again; RuntimeError where DALI fails on one."""
        pipeline = getattr(self._own, "pipeline", None)
        if pipeline is None:
            pipeline = self._own.pipeline = self._built()
        pipeline.feed_input("encoded", [np.frombuffer(data, dtype=np.uint8) for data in encoded])
        (output,) = pipeline.run()
        if self._device == "gpu":
            return [torch.from_dlpack(image) for image in output]
        return [np.asarray(image) for image in output]

    def _built(self) -> Pipeline:
        if self._device == "gpu":
            device, number = "mixed", torch.cuda.current_device()
        else:
            # None: DALI looks for no GPU.
            device, number = "cpu", None
        pipeline = _pipeline(device, batch_size=self.group, num_threads=1, device_id=number)
        pipeline.build()
        return pipeline


def decodes_alike(image: Image.Image, data: bytes) -> bool:
    """Whether DALI decodes an opened image as PIL does: 8-bit JPEG and PNG in grey or RGB that look whole."""
    if image.format == "JPEG":
        # CMYK and RGB-coded JPEGs are read differently. A file without its end marker was cut off (a download that
        # broke), and would cost a pipeline.
        return (
            image.mode in ("RGB", "L")
            and image.info.get("adobe_transform") in (None, 1)
            and _frame_marker(data) in _HUFFMAN_FRAMES
            and data.rstrip(b"\x00").endswith(b"\xff\xd9")
        )
    if image.format == "PNG":
        # IHDR: bit depth at byte 24, colour type at 25 (0 grey, 2 RGB), interlacing at 28.
        plain = data[24] == 8 and data[25] in (0, 2) and data[28] == 0
        return plain and "transparency" not in image.info and b"IEND" in data[-64:]
    return False


def _frame_marker(data: bytes) -> int:
    """The second byte of a JPEG's start-of-frame marker, which says how it is coded; 0 where there is none."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 0
