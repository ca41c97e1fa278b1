"""Questions of a data file before any model is built: their texts, their pictures, and what is refused."""

import pytest

from dc_megatron.config import ImageTiling
from dc_megatron.data.image_store import open_store
from dc_megatron.data.record_pictures import PictureReader
from dc_megatron.errors import UserError
from dc_megatron.inference.ask import _question
from tests.helpers.data_files import photo

ANYRES = ImageTiling(28, 16, 4, ((28, 56), (56, 28), (56, 56)), "spatial_unpad")


@pytest.fixture
def ask(tmp_path):
    photo(tmp_path / "a.jpg", 50, 27)
    for number in range(4):
        photo(tmp_path / "clip" / f"{number}.jpg", 40, 40)
    reader = PictureReader(open_store(str(tmp_path)), ANYRES, 2)

    def call(**record):
        return _question({"id": "7", **record}, 3, reader, "q.json")

    return call


def says(*texts):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def test_a_question_with_a_picture_in_tiles(ask):
    asked = ask(image="a.jpg", conversations=says("<image>\nWhat?", "A cup."))
    assert (asked["id"], asked["question"], asked["expected"]) == ("7", "<image>\nWhat?", "A cup.")
    (picture,) = asked["pictures"]
    assert (picture.width, picture.height, picture.tiles) == (50, 27, 3)
    assert picture.tokens == ANYRES.of(50, 27).tokens


def test_a_video_is_a_few_of_its_frames(ask):
    asked = ask(video="clip", conversations=says("<video>\nWhat moves?"))
    assert (asked["asked"], asked["question"]) == ("<image><image>\nWhat moves?", "<video>\nWhat moves?")
    assert [picture.name for picture in asked["pictures"]] == ["clip/0.jpg", "clip/3.jpg"]
    assert asked["expected"] is None


def test_words_alone(ask):
    asked = ask(conversations=says("Who are you?", "Nobody.", "<image> later"))
    assert (asked["asked"], asked["pictures"], asked["expected"]) == ("Who are you?", (), "Nobody.")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"image": "b.jpg", "conversations": says("What?")}, "missing image"),
        ({"image": "../a.jpg", "conversations": says("What?")}, "unsafe path"),
        ({"image": ["a.jpg", "a.jpg"], "conversations": says("<image> What?")}, "1 <image> marks and 2 pictures"),
        ({"conversations": [{"from": "human"}]}, "the first message has no text"),
        ({"conversations": [3]}, "the first message has no text"),
        ({"conversations": []}, "bad structure"),
    ],
)
def test_what_cannot_be_asked_is_said_with_its_record(ask, record, words):
    with pytest.raises(UserError, match=f"--data_path q.json: record 3: .*{words}"):
        ask(**record)
