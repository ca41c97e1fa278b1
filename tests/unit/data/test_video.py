"""Frames of videos that the test writes: frame n has a grey of its own, so a wrong frame is seen."""

from __future__ import annotations

import io
import random
import struct
import threading

import av
import fsspec
import numpy as np
import pytest

from dc_megatron.data import video
from dc_megatron.data.image_reference import DECODE_ERRORS
from dc_megatron.data.image_store import UnsafeName, open_store
from dc_megatron.data.video import evenly_spread, frame_count_and_size, is_video_file, read_frame, read_frames
from tests.unit.data.test_tar_store import write_tar

FRAMES = 40
SIZE = (64, 48)
# Containers with a count of frames and without, codecs with frames out of order, with hidden frames, without times.
KINDS = {
    "mp4": ("mp4", "mpeg4", {"bf": "2"}),
    "h264.mp4": ("mp4", "libx264", {"x264-params": "open-gop=1:bframes=4"}),
    "mov": ("mov", "mpeg4", {}),
    "mkv": ("matroska", "mpeg4", {"bf": "2"}),
    "webm": ("webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "8", "deadline": "realtime"}),
    "avi": ("avi", "mpeg4", {"bf": "2"}),
    "gif": ("gif", "gif", {}),
    "ts": ("mpegts", "mpeg2video", {}),
    "mpg": ("mpeg", "mpeg2video", {}),
}


def grey(number: int) -> int:
    return 20 + 5 * number


def make(kind: str, frames: int = FRAMES, size: tuple[int, int] = SIZE) -> bytes:
    """A video at 10 frames a second with a keyframe every 12; left half in grey(number), right half black."""
    container_format, codec, options = KINDS[kind]
    output = io.BytesIO()
    with av.open(output, "w", format=container_format) as container:
        # Or every new grey would be a new scene, with a keyframe.
        same_scene = {"sc_threshold": "1000000000"} if codec.startswith("mpeg") else {}
        stream = container.add_stream(codec, rate=25, options={**options, **same_scene})
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if codec != "gif":
            stream.gop_size, stream.bit_rate = 12, 4_000_000
        for number in range(frames):
            pixels = np.zeros((size[1], size[0], 3), np.uint8)
            pixels[:, : size[0] // 2] = grey(number)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return output.getvalue()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for kind in KINDS:
        (folder / f"v.{kind}").write_bytes(make(kind))
    return folder


@pytest.fixture(scope="module")
def store(videos):
    return open_store(str(videos))


def in_order(path) -> list[np.ndarray]:
    """All frames, decoded from the start: what every other way of reading has to equal."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_decoding_from_the_start(videos, store, kind):
    name = f"v.{kind}"
    expected = in_order(videos / name)
    assert frame_count_and_size(store, name) == (len(expected), *SIZE) == (FRAMES, *SIZE)
    wanted = [39, 0, 12, 11, 13, 12, 25, 37]
    found = read_frames(store, name, wanted)
    for number, frame in zip(wanted, found, strict=True):
        assert frame.dtype == np.uint8
        assert frame.flags.c_contiguous
        np.testing.assert_array_equal(frame, expected[number])
        # GIF has few colours; the rest differ from their neighbours by five levels.
        assert abs(int(frame[10, 10, 0]) - grey(number)) <= (20 if kind == "gif" else 4)
        assert frame[10, -10].max() < 10
    np.testing.assert_array_equal(read_frame(store, name, 29), expected[29])
    np.testing.assert_array_equal(read_frames(store, name, range(FRAMES)), expected)


def test_only_what_leads_to_the_wanted_frames_is_decoded(store, monkeypatch):
    decoded = []
    pixels = video._Video.decoded

    def counting(self):
        for frame in pixels(self):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video._Video, "decoded", counting)
    read_frames(store, "v.mp4", [2, 38])
    assert len(decoded) <= 3 + 3
    decoded.clear()
    read_frames(store, "v.mp4", [0, 3, 6, 9])
    assert len(decoded) == 10


def test_frames_that_cannot_be_sought_are_counted_from_the_start(videos, store, monkeypatch):
    def never(*_):
        raise video._NotByTime

    monkeypatch.setattr(video, "_from_keyframe", never)
    expected = in_order(videos / "v.mkv")
    np.testing.assert_array_equal(read_frames(store, "v.mkv", [30, 5]), [expected[30], expected[5]])


def test_colours_are_as_encoded(tmp_path):
    output = io.BytesIO()
    colours = [(220, 30, 40), (30, 200, 60), (20, 60, 210)]
    with av.open(output, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 4_000_000
        for colour in colours:
            pixels = np.full((64, 64, 3), colour, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    (tmp_path / "c.mp4").write_bytes(output.getvalue())
    for frame, colour in zip(read_frames(open_store(str(tmp_path)), "c.mp4", range(3)), colours, strict=True):
        assert np.abs(frame.astype(int) - colour).max() <= 6


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_the_turn_in_the_container_is_applied(tmp_path, matrix, turns):
    data = bytearray(make("mp4", frames=3))
    # The track header: type, version and flags, times and identity (20 bytes), reserved and layers (16), the matrix.
    start = data.find(b"tkhd") + 4 + 4 + 20 + 16
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    store = open_store(str(tmp_path))
    expected = np.rot90(in_order(tmp_path / "turned.mp4")[1], turns)
    assert frame_count_and_size(store, "turned.mp4") == (3, *expected.shape[1::-1])
    np.testing.assert_array_equal(read_frame(store, "turned.mp4", 1), expected)


@pytest.mark.parametrize("skipped", [5, 14])
def test_frames_before_the_start_of_an_edit_list_are_not_there(tmp_path, skipped):
    data = bytearray(make("mp4"))
    start = data.find(b"elst") + 16
    scale = struct.unpack(">I", data[data.find(b"mdhd") + 16 :][:4])[0]
    begin = struct.unpack(">i", data[start : start + 4])[0] + skipped * scale // 25
    data[start : start + 4] = struct.pack(">i", begin)
    (tmp_path / "cut.mp4").write_bytes(data)
    store = open_store(str(tmp_path))
    expected = in_order(tmp_path / "cut.mp4")
    count = frame_count_and_size(store, "cut.mp4")[0]
    assert count == len(expected) < FRAMES
    np.testing.assert_array_equal(read_frames(store, "cut.mp4", range(count)), expected)


@pytest.mark.parametrize("wrong", [-1, FRAMES, 10**9])
def test_a_frame_that_is_not_there_is_an_error(store, wrong):
    with pytest.raises(OSError, match=f"no frame {wrong}, only {FRAMES}"):
        read_frames(store, "v.mp4", [0, wrong])


def test_what_is_no_video_is_an_error(videos, store):
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{videos}/v.ts\n#EXT-X-ENDLIST\n"
    for name, content in {
        "empty.mp4": b"",
        "noise.mp4": random.Random(0).randbytes(5000),
        "playlist.mp4": playlist.encode(),
        "list.mp4": f"ffconcat version 1.0\nfile {videos}/v.mp4\n".encode(),
        "text.mkv": b"just words" * 100,
        "half.mp4": make("mp4")[:3000],
    }.items():
        (videos / name).write_bytes(content)
        for read in (frame_count_and_size, lambda *video: read_frame(*video, 0)):
            with pytest.raises(OSError, match=r"[a-z]{4}") as caught:
                read(store, name)
            assert isinstance(caught.value, DECODE_ERRORS)
    with pytest.raises(FileNotFoundError):
        frame_count_and_size(store, "none.mp4")
    with pytest.raises(UnsafeName):
        read_frame(store, "../none.mp4", 0)


def test_the_frames_before_a_cut_can_be_read(videos, store):
    whole = make("mkv")
    (videos / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    count = frame_count_and_size(store, "cut.mkv")[0]
    assert 0 < count < FRAMES
    np.testing.assert_array_equal(read_frame(store, "cut.mkv", 3), in_order(videos / "v.mkv")[3])


def test_videos_changed_at_random_are_read_or_refused(videos, store):
    chance = random.Random(0)
    wholes = [(kind, make(kind, frames=12)) for kind in ("mp4", "webm", "avi", "gif", "ts")]
    ends = {"read": 0, "refused": 0}
    for number in range(60):
        kind, whole = wholes[number % len(wholes)]
        data = bytearray(whole)
        for _ in range(chance.choice((1, 5, 40))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        cut = chance.randrange(len(data)) if chance.random() < 0.3 else len(data)
        (videos / f"changed.{kind}").write_bytes(data[:cut])
        try:
            count, width, height = frame_count_and_size(store, f"changed.{kind}")
            for frame in read_frames(store, f"changed.{kind}", evenly_spread(count, 4)):
                assert frame.shape == (height, width, 3)
            ends["read"] += 1
        except OSError:
            ends["refused"] += 1
    assert min(ends.values()) > 6


@pytest.mark.parametrize("limit", ["_MAX_FRAME_PIXELS", "_MAX_DECODED_PIXELS"])
def test_there_is_a_limit_to_what_is_decoded(store, monkeypatch, limit):
    monkeypatch.setattr(video, limit, SIZE[0] * SIZE[1] - 1)
    with pytest.raises(OSError, match="limit"):
        read_frame(store, "v.mp4", 0)


def test_videos_come_out_of_tars_and_object_stores(videos, store, tmp_path):
    write_tar(tmp_path / "a.tar", {"clips/v.mp4": (videos / "v.mp4").read_bytes()})
    fsspec.filesystem("memory").pipe("/video_test/clips/v.mp4", (videos / "v.mp4").read_bytes())
    expected = read_frames(store, "v.mp4", [1, 30])
    for location in (str(tmp_path / "a.tar"), "memory://video_test"):
        other = open_store(location)
        assert frame_count_and_size(other, "clips/v.mp4") == (FRAMES, *SIZE)
        np.testing.assert_array_equal(read_frames(other, "clips/v.mp4", [1, 30]), expected)


def test_threads_read_side_by_side(store):
    expected, found = read_frames(store, "v.mkv", range(8)), {}

    def read(number: int) -> None:
        found[number] = read_frame(store, "v.mkv", number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal([found[number] for number in range(8)], expected)


@pytest.mark.parametrize(
    ("total", "wanted", "frames"),
    [
        (100, 4, (0, 33, 66, 99)),
        (5, 8, (0, 1, 2, 3, 4)),
        (8, 8, tuple(range(8))),
        (9, 1, (0,)),
        (0, 8, ()),
        (3, 2, (0, 2)),
    ],
)
def test_frames_are_spread_evenly(total, wanted, frames):
    assert evenly_spread(total, wanted) == frames
    assert all(type(number) is int for number in evenly_spread(total, wanted))


def test_files_of_videos_are_told_by_their_suffix():
    assert is_video_file("a/B.MP4")
    assert not is_video_file("a/b.mp4/frames")
    assert not is_video_file("mp4")
