"""The small JPEG encoder: PIL reads what it writes, with the subsampling asked for."""

import io

import numpy as np
import pytest
from PIL import Image

from dc_megatron.benchmark.jpeg_writer import write_jpeg
from dc_megatron.benchmark.picture_files import photograph


@pytest.mark.parametrize("sampling", [(1, 1), (2, 1), (2, 2), (4, 1), (1, 2), (1, 4), (4, 2)])
@pytest.mark.parametrize("size", [(1, 1), (33, 17), (64, 48)])
def test_pil_reads_the_picture_back(sampling, size):
    # Grey: nothing is lost by subsampling.
    pixels = np.asarray(photograph(np.random.default_rng(1), *size).convert("L").convert("RGB"))
    with Image.open(io.BytesIO(write_jpeg(pixels, sampling, quantiser=1))) as image:
        assert image.size == size
        assert image.layer[0][1:3] == sampling
        assert image.layer[1][1:3] == image.layer[2][1:3] == (1, 1)
        assert np.abs(np.asarray(image).astype(int) - pixels).max() <= 2


def test_colours_are_kept():
    pixels = np.full((16, 16, 3), (200, 30, 90), dtype=np.uint8)
    with Image.open(io.BytesIO(write_jpeg(pixels, (2, 2), quantiser=1))) as image:
        assert np.abs(np.asarray(image).astype(int) - pixels).max() <= 2
