"""Pictures decoded by NVIDIA DALI, on the CPU or the GPU; the only file that imports it.

DALI decodes what goes to it byte for byte as PIL does, in less time; image_resizing.py does the rest. Every decoding
thread has a pipeline of its own and gives it one picture at a time (on a GPU a group): an image that breaks in DALI
takes its pipeline with it, which is built anew in 2 ms, and only that image goes through PIL, then and later.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types

from dc_megatron.config import ImageTiling, VisionConfig
from dc_megatron.data.image_loading import ImageLoader, ImageRequest
from dc_megatron.data.image_reference import check_indexed_size, geometry
from dc_megatron.data.image_resizing import Pixels, fill_tiles
from dc_megatron.data.image_sniffing import plain_size

logger = logging.getLogger(__name__)

# DALI keeps buffers for the largest picture it ever saw; larger ones are PIL's.
MAX_DALI_PIXELS = 1 << 25
# Pictures that a GPU decodes at once.
GPU_GROUP = 16


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
    """An image that DALI takes: its bytes, (width, height) from its header, and where its tiles go."""

    request: ImageRequest
    data: bytes
    size: tuple[int, int]
    place: torch.Tensor


class DaliImageLoader(ImageLoader):
    """ImageLoader that decodes with DALI what DALI decodes as PIL does, and everything else with PIL.

    device: ``gpu`` decodes JPEGs with nvJPEG and resizes on the current GPU; the result comes back to the CPU's memory.
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
        # CUDA's current device belongs to a thread; the decoding threads have others.
        self._gpu = torch.cuda.current_device() if device == "gpu" else None
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
        """(width, height) of an image that DALI is to decode, else None; nothing is decoded for that."""
        if data is None or request.key in self._refused:
            return None
        size = plain_size(data)
        if size is None or size[0] * size[1] > MAX_DALI_PIXELS:
            return None
        try:
            if self.aspect_ratio == "anyres":
                check_indexed_size(*size, request.picture)
            else:
                geometry(*size, self.vision, self.aspect_ratio)
        except ValueError:
            # The reference meets it again, and says so.
            return None
        return size

    def _load_plain(self, images: list[_Plain]) -> list[_Plain]:
        """Decode and fill; returns those that DALI could decode."""
        if not images:
            return []
        if getattr(self._own, "pipeline", None) is None:
            self._own.pipeline = self._built()
        try:
            decoded = self._run(self._own.pipeline, [image.data for image in images])
        except Exception as error:
            # One of them broke, and the pipeline with it. DALI's own errors are of several types.
            self._own.pipeline = None
            if len(images) == 1:
                request = images[0].request
                self._refused.add(request.key)
                logger.info("image %s: DALI does not decode it, PIL will try (%s)", request.picture.name, error)
                return []
            return [done for image in images for done in self._load_plain([image])]
        loaded = []
        for image, pixels in zip(images, decoded, strict=True):
            if tuple(pixels.shape[1::-1]) == image.size:
                fill_tiles(pixels, self.vision, self.aspect_ratio, self.tiling, image.request.tiles, image.place)
                loaded.append(image)
        return loaded

    def _run(self, pipeline: Pipeline, encoded: list[bytes]) -> list[Pixels]:
        """uint8 [H, W, 3] each, valid until this thread decodes again."""
        pipeline.feed_input("encoded", [np.frombuffer(data, dtype=np.uint8) for data in encoded])
        (output,) = pipeline.run()
        if self._gpu is not None:
            return [torch.from_dlpack(image) for image in output]
        return [np.asarray(image) for image in output]

    def _built(self) -> Pipeline:
        # device_id None: DALI looks for no GPU.
        device = "cpu" if self._gpu is None else "mixed"
        pipeline = _pipeline(device, batch_size=self.group, num_threads=1, device_id=self._gpu)
        pipeline.build()
        return pipeline
