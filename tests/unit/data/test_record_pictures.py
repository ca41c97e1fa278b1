"""Pictures and video frames of a record, each at its mark."""

import av
import numpy as np
import pytest

from dc_megatron.data.conversation import render
from dc_megatron.data.faults import RecordFault
from dc_megatron.data.image_store import open_store
from dc_megatron.data.llava_json import parse_record
from dc_megatron.data.record_pictures import PictureReader
from tests.helpers.data_files import conversation, photo, picture, tiling

FRAMES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """a.jpg and b.jpg; frames/ with ten pictures; clip.mp4 with twelve frames; short/ with two pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("a", "b"):
        photo(folder / f"{name}.jpg", 40, 32)
    for number in range(10):
        photo(folder / "frames" / f"{number + 1}.jpg", 30 + number, 24)
    for number in range(2):
        photo(folder / "short" / f"{number}.jpg", 40, 32)
    (folder / "empty").mkdir()
    (folder / "broken.mp4").write_bytes(b"no video")
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number * 20, dtype=np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return folder


@pytest.fixture
def read(folder):
    """read(record) -> (messages' texts, pictures)."""
    reader = PictureReader(open_store(str(folder)), tiling(), FRAMES, source=2)

    def read(question, answer="a dog", **record):
        messages, pictures = reader.read(parse_record({"conversations": conversation(question, answer), **record}, 0))
        return [message["value"] for message in messages], pictures

    return read


def of_source(name, **overrides):
    return picture(name, source=2, **overrides)


A, B = of_source("a.jpg"), of_source("b.jpg")
CLIP = [of_source("clip.mp4", width=64, height=48, frame=number) for number in (0, 5, 11)]
FOLDER = [of_source(f"frames/{number}.jpg", width=29 + number, height=24) for number in (1, 5, 10)]
SHORT = [of_source(f"short/{number}.jpg") for number in (0, 1)]
I3 = "<image>" * 3


@pytest.mark.parametrize(
    ("question", "record", "text", "pictures"),
    [
        ("hello", {}, "hello", []),
        ("<image> or <image>?", {"image": ["b.jpg", "a.jpg"]}, "<image> or <image>?", [B, A]),
        # A mark without a video in the record is text.
        ("<image> in <video>", {"image": "a.jpg"}, "<image> in <video>", [A]),
        ("see <video> now", {"video": "clip.mp4"}, f"see {I3} now", CLIP),
        ("<video>\nx", {"video": "frames"}, f"{I3}\nx", FOLDER),
        ("<video>", {"video": ["short"]}, "<image><image>", SHORT),
        # One image mark for the whole video is placed as that of a picture is.
        ("what? <image>", {"video": "frames"}, f"{I3}\nwhat?", FOLDER),
        (f"{I3} what?", {"video": "clip.mp4"}, f"{I3} what?", CLIP),
        ("<image> and <image>", {"video": ["clip.mp4", "short"]}, f"{I3} and <image><image>", [*CLIP, *SHORT]),
        ("<image> a <image> b <image>", {"video": "clip.mp4"}, "<image> a <image> b <image>", CLIP),
        (
            "<image> <video> <image> <video>",
            {"image": ["a.jpg", "b.jpg"], "video": ["frames", "short"]},
            f"<image> {I3} <image> <image><image>",
            [A, *FOLDER, B, *SHORT],
        ),
    ],
)
def test_every_picture_at_its_mark(read, question, record, text, pictures):
    texts, found = read(question, **record)
    assert (texts[0], found) == (text, pictures)
    assert render("v1", conversation(*texts)).image_count == len(pictures)


def test_marks_of_later_messages_count(read):
    texts, pictures = read("<video> one", "<video> two", video=["short", "clip.mp4"])
    assert texts == ["<image><image> one", f"{I3} two"]
    assert pictures == [*SHORT, *CLIP]


@pytest.mark.parametrize(
    ("question", "record", "words"),
    [
        (
            "<video>",
            {"video": ["frames", "short"]},
            r"1 <video> and 0 <image> .*2 videos \(5 frames\) and 0 images",
        ),
        ("<video><video>", {"video": "frames"}, "2 <video>"),
        ("<image><image>", {"video": "frames"}, "0 <video> and 2 <image>"),
        ("nothing", {"video": "frames"}, "0 <video> and 0 <image>"),
        ("<image>", {"video": "frames", "image": "a.jpg"}, r"0 <video> and 1 <image> marks.*1 videos.*1 images"),
        ("<video>", {"video": "frames", "image": "a.jpg"}, "1 <video> and 0 <image>"),
    ],
)
def test_wrong_counts_name_both_numbers(read, question, record, words):
    with pytest.raises(RecordFault, match=words) as caught:
        read(question, **record)
    assert caught.value.reason == RecordFault.IMAGE_COUNT


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"video": "none.mp4"}, RecordFault.MISSING_IMAGE),
        ({"video": "none"}, RecordFault.MISSING_IMAGE),
        ({"video": "a.jpg"}, RecordFault.MISSING_IMAGE),
        ({"video": "broken.mp4"}, RecordFault.CORRUPT_VIDEO),
        ({"video": "empty"}, RecordFault.CORRUPT_VIDEO),
        ({"video": "../frames"}, RecordFault.UNSAFE_PATH),
        ({"video": "/etc"}, RecordFault.UNSAFE_PATH),
        ({"video": "../clip.mp4"}, RecordFault.UNSAFE_PATH),
        ({"video": 5}, RecordFault.STRUCTURE),
        ({"video": ["clip.mp4", None]}, RecordFault.STRUCTURE),
    ],
)
def test_videos_that_cannot_be_used(read, record, reason):
    with pytest.raises(RecordFault) as caught:
        read("<video>", **record)
    assert caught.value.reason == reason


def test_messages_of_the_wrong_shape_are_left_for_the_template(folder):
    reader = PictureReader(open_store(str(folder)), tiling(), FRAMES)
    messages = ["text", {"value": 3}, {"from": "human", "value": "<video>"}]
    expanded, _ = reader.read(parse_record({"conversations": messages, "video": "short"}, 0))
    assert expanded == ["text", {"value": 3}, {"from": "human", "value": "<image><image>"}]


class FarStore:
    """A folder that says it is far away, and counts how often a file is opened."""

    def __init__(self, folder):
        self._store, self.location, self.opened = open_store(str(folder)), f"far://{folder}", []

    def open(self, name):
        self.opened.append(name)
        return self._store.open(name)

    def where(self, name):
        return name


def test_headers_are_read_once_and_ahead_from_far_stores(folder):
    store = FarStore(folder)
    reader = PictureReader(store, tiling(), FRAMES)
    reader.read_ahead(["a.jpg", "none.jpg", "b.jpg", "a.jpg"])
    assert sorted(store.opened) == ["a.jpg", "b.jpg", "none.jpg"]
    record = {"conversations": conversation("<image>", "x")}
    for _ in range(2):
        assert reader.read(parse_record({**record, "image": "a.jpg"}, 0))[1] == [picture("a.jpg")]
        with pytest.raises(RecordFault, match="missing image"):
            reader.read(parse_record({**record, "image": "none.jpg"}, 0))
    assert len(store.opened) == 3
    reader.forget()
    reader.read(parse_record({**record, "image": "a.jpg"}, 0))
    assert len(store.opened) == 4
