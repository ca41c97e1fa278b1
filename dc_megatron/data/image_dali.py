"""Pixels through NVIDIA DALI on the CPU; the only file that imports it.

DALI differs from PIL's bicubic by some 0.2/255 on average where both cut whole pixels, so sizes and offsets are
computed per image as the reference does. One bad image fails a whole DALI batch and invalidates the pipeline: only
plain 8-bit JPEG and PNG whose header looks right are sent to it, everything else goes through the reference.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from dc_megatron.config import ImageTiling, VisionConfig
from dc_megatron.data.image_loading import ImageLoader, ImageRequest
from dc_megatron.data.image_reference import DECODE_ERRORS, Geometry, geometry

# Feeds of the pipeline, one entry an image.
_GEOMETRY_FEEDS = ("canvas_start", "canvas_size", "resized", "crop_start")


@pipeline_def(prefetch_queue_depth=1, exec_async=False, exec_pipelined=False)
def _pipeline(vision: VisionConfig):
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    canvas_start, canvas_size, resized, crop_start = (
        fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in _GEOMETRY_FEEDS
    )
    # The accurate transform and smooth chroma are libjpeg's defaults, which PIL uses.
    images = fn.decoders.image(
        encoded,
        device="cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        use_fast_idct=False,
        jpeg_fancy_upsampling=True,
    )
    images = fn.slice(
        images, canvas_start, canvas_size, axes=(0, 1), out_of_bounds_policy="pad", fill_values=list(vision.pad_color)
    )
    images = fn.resize(images, size=fn.cast(resized, dtype=types.FLOAT), interp_type=types.INTERP_CUBIC, antialias=True)
    images = fn.slice(images, crop_start, [vision.image_size, vision.image_size], axes=(0, 1))
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in vision.image_mean],
        std=[255 * value for value in vision.image_std],
    )


class DaliImageLoader(ImageLoader):
    """ImageLoader on one DALI pipeline that is built at first use and fed batches of any size."""

    name = "dali"

    def __init__(
        self,
        vision: VisionConfig,
        aspect_ratio: str,
        tiling: ImageTiling,
        *,
        threads: int = 1,
        device: str = "cpu",
        max_batch_size: int = 64,
    ):
        super().__init__(vision, aspect_ratio, tiling, threads=threads)
        self._threads = threads
        self._max_batch_size = max_batch_size
        self._pipeline = None

    def _load_images(
        self, requests: Sequence[ImageRequest], encoded: dict[int, Future], places: Sequence[torch.Tensor]
    ) -> list[int]:
        encoded = {number: future.result() for number, future in encoded.items()}
        shapes = {number: shape for number, data in encoded.items() if (shape := self._place(data)) is not None}
        numbers = list(shapes)
        for start in range(0, len(numbers), self._max_batch_size):
            chunk = numbers[start : start + self._max_batch_size]
            try:
                batch = self._run([encoded[n] for n in chunk], [shapes[n] for n in chunk])
            except RuntimeError:
                # A file passed the sniffing and still failed: the pipeline is gone, and PIL decides image by image.
                self._pipeline = None
                for number in chunk:
                    del shapes[number]
            else:
                for number, image in zip(chunk, batch, strict=True):
                    places[number].copy_(image)
        others = [number for number in encoded if number not in shapes]
        filled = self._decoders.map(lambda n: self._fill(requests[n], encoded[n], places[n]), others)
        return [number for number, decoded in zip(others, filled, strict=True) if not decoded]

    def _place(self, data: bytes | None) -> Geometry | None:
        """The geometry of an image that DALI decodes as PIL does, else None."""
        if data is None or self.aspect_ratio == "anyres":
            return None
        try:
            with Image.open(io.BytesIO(data)) as image:
                if not _is_plain(image, data):
                    return None
                return geometry(image.width, image.height, self.vision, self.aspect_ratio)
        except DECODE_ERRORS:
            return None

    def _run(self, encoded: list[bytes], places: list[Geometry]) -> torch.Tensor:
        """float32 [k, 3, H, W]; RuntimeError where DALI cannot decode one of the images."""
        if self._pipeline is None:
            # device_id None: DALI looks for no GPU.
            self._pipeline = _pipeline(
                self.vision, batch_size=self._max_batch_size, num_threads=self._threads, device_id=None
            )
            self._pipeline.build()
        self._pipeline.feed_input("encoded", [np.frombuffer(data, dtype=np.uint8) for data in encoded])
        for name in _GEOMETRY_FEEDS:
            self._pipeline.feed_input(name, [np.array(getattr(place, name), dtype=np.int32) for place in places])
        (output,) = self._pipeline.run()
        return torch.from_numpy(output.as_array())


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether DALI reads this file as PIL does."""
    if image.format == "JPEG":
        # CMYK and RGB-coded JPEGs are read differently. A file without its end marker was cut off (a download that
        # broke): it would cost the whole batch its pipeline.
        return (
            image.mode in ("RGB", "L")
            and image.info.get("adobe_transform") != 0
            and data.rstrip(b"\x00").endswith(b"\xff\xd9")
        )
    if image.format == "PNG":
        # IHDR: bit depth at byte 24, colour type at 25 (0 grey, 2 RGB); palettes, alpha and 16 bit are PIL's.
        return data[24] == 8 and data[25] in (0, 2) and b"IEND" in data[-64:]
    return False
