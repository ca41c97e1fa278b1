"""Pictures with words: for readable files, and for those that are not."""

import numpy as np
import pytest
from PIL import Image

from dc_megatron.data.picture_captions import picture_with_words
from tests.helpers.data_files import photo


def test_a_picture_keeps_its_colours_above_the_words(tmp_path):
    Image.new("RGB", (80, 40), (255, 0, 0)).save(tmp_path / "red.png")
    page = picture_with_words(str(tmp_path / "red.png"), "a word")
    assert page.dtype == np.uint8
    assert (page[:168] == (255, 0, 0)).all()
    strip = page[168:]
    assert (strip == 255).mean() > 0.8
    assert (strip < 100).any()


@pytest.mark.parametrize("damage", ["missing", "text", "cut"])
def test_a_picture_that_cannot_be_decoded_is_blank_and_says_so(tmp_path, damage):
    path = tmp_path / "bad.jpg"
    if damage == "text":
        path.write_text("no picture")
    elif damage == "cut":
        photo(path)
        path.write_bytes(path.read_bytes()[:300])
    page = picture_with_words(str(path), "a word")
    picture = page[:336]
    assert picture.shape == (336, 336, 3)
    assert (picture == 200).mean() > 0.95
    assert (picture < 100).any(), "no words on it"
    assert (page[336:] < 100).any()
