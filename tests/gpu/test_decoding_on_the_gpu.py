"""JPEGs decoded by nvJPEG and resized on the GPU against the CPU's path. Skipped where there is no GPU."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu

# Mean and largest difference of one picture, in steps of 1/255. nvJPEG's inverse transform and chroma upsampling round
# in other ways than libjpeg's. Set by judgement: it was not tried on a GPU yet.
MEAN, LARGEST = 2.0, 64.0


@pytest.mark.parametrize("aspect_ratio", ["pad", "square", "anyres"])
def test_pixels_decoded_on_the_gpu_are_near_the_references(aspect_ratio):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch.cuda.is_available() says there is none")
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from dc_megatron.benchmark.picture_files import KINDS, SMALL_KINDS, varied_pictures
    from dc_megatron.benchmark.pixels import differences, tower

    pictures = varied_pictures(4 * len(KINDS | SMALL_KINDS), 7, (1200, 900))
    for entry in differences(pictures, [tower("clip")], [aspect_ratio], decode_device="gpu"):
        where = (entry["picture"].kind, entry["picture"].width, entry["picture"].height)
        assert entry["mean"] <= (MEAN if entry["plain"] else 0), where
        assert entry["max"] <= LARGEST, where
