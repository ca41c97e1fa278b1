"""Frames out of video files, by number in the order they are shown, with PyAV (FFmpeg).

The one file that imports ``av``. What FFmpeg raises becomes an OSError, so that a broken video is what a broken picture
is. Frames are turned as their container says, as video players do.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from dc_megatron.data.image_store import ImageStore
from dc_megatron.data.retrying import StoreFailure
from dc_megatron.errors import UserError

# Types of av, which is imported only where a video is read.
Container = Stream = Frame = Any

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".gif"),
    *(".mpg", ".mpeg", ".ts", ".flv", ".wmv"),
)
# Containers by FFmpeg's names. Playlists and their like are left out: they name more files, and addresses.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,flv,asf"
# Nearly all of a video's bytes are needed, so they come in large pieces.
_BLOCK_BYTES = 4 << 20
# 8K video has 33 million.
_MAX_FRAME_PIXELS = 1 << 25
# Pixels decoded for one call: 96,000 frames of 1920 x 1080. A small file can hold hours.
_MAX_DECODED_PIXELS = 2 * 10**11


class _NotByTime(Exception):
    """Frames have no usable times, or the container cannot be sought in: frames have to be counted from the start."""


def is_video_file(name: str) -> bool:
    """Whether ``name`` is a video in one file; else it is a folder of frames."""
    return name.lower().endswith(VIDEO_SUFFIXES)


def evenly_spread(total: int, wanted: int) -> tuple[int, ...]:
    """Numbers of ``wanted`` frames out of ``total``, the first and the last among them; all where there are not more.

    LLaVA's ``np.linspace(0, total - 1, wanted)``, cut to integers.
    """
    if total <= wanted:
        return tuple(range(total))
    return tuple(np.linspace(0, total - 1, wanted, dtype=int).tolist())


def frame_count_and_size(store: ImageStore, name: str) -> tuple[int, int, int]:
    """(frames, width, height) of a video; size in pixels as shown. Decodes one frame.

    The count is the container's where it has an index (MP4, MOV, AVI), else packets are counted, which reads the file.
    Raises FileNotFoundError, UnsafeName, and OSError for what cannot be read or decoded (it says why, not which file).
    """
    with _opened(store, name) as video:
        index = video.stream.index_entries
        counted = len(index) == video.stream.frames > 0
        count = sum(not entry.is_discard for entry in index) if counted else 0
        frame = next(video.decoded(), None)
        if frame is None:
            raise OSError("no frame can be decoded")
        height, width = video.pixels(frame).shape[:2]
    return count if counted else len(_times(store, name)[0]), width, height


def read_frame(store: ImageStore, name: str, frame: int) -> np.ndarray:
    """uint8 [H, W, 3]: frame number ``frame``. For several of one video ``read_frames`` is much cheaper."""
    return read_frames(store, name, [frame])[0]


def read_frames(store: ImageStore, name: str, frames: Sequence[int]) -> list[np.ndarray]:
    """uint8 [H, W, 3] of each of ``frames``, counted from 0 in the order they are shown.

    One pass over the file for the frames' times, then from the keyframe before each wanted frame. Raises as
    ``frame_count_and_size``, and OSError for a number that the video does not have.
    """
    times, keys = _times(store, name)
    beyond = [frame for frame in frames if not 0 <= frame < len(times)]
    if beyond:
        raise OSError(f"there is no frame {beyond[0]}, only {len(times)}")
    try:
        if None in times or not keys:
            raise _NotByTime
        shown = sorted(times)
        with _opened(store, name) as video:
            found = _at_times(video, sorted({shown[frame] for frame in frames}), keys)
        return [found[shown[frame]] for frame in frames]
    except _NotByTime:
        with _opened(store, name) as video:
            found = _counted(video, set(frames))
        return [found[frame] for frame in frames]


@dataclass
class _Video:
    """An open video: its first picture stream, and the size in pixels that the container states."""

    container: Container
    stream: Stream
    width: int
    height: int
    decoded_pixels: int = 0

    def decoded(self) -> Iterator[Frame]:
        """Frames from where the container stands, in the order they are shown."""
        for frame in self.container.decode(self.stream):
            self.decoded_pixels += frame.width * frame.height
            if frame.width * frame.height > _MAX_FRAME_PIXELS or self.decoded_pixels > _MAX_DECODED_PIXELS:
                raise OSError(f"more is to be decoded than the limit of {_MAX_DECODED_PIXELS} pixels")
            yield frame

    def pixels(self, frame: Frame) -> np.ndarray:
        """uint8 [H, W, 3]. Frames of another size than the video's are scaled to it."""
        pixels = frame.to_ndarray(format="rgb24", width=self.width, height=self.height)
        return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))


@contextmanager
def _opened(store: ImageStore, name: str) -> Iterator[_Video]:
    """The video; whatever goes wrong inside, but _NotByTime and StoreFailure, is an OSError. Callers add the name."""
    av = _av()
    with store.open(name, _BLOCK_BYTES) as file:
        try:
            with av.open(file, container_options={"format_whitelist": _FORMATS}, io_open=_refused) as container:
                if not container.streams.video:
                    raise OSError("has no pictures in it")
                stream = container.streams.video[0]
                if stream.codec_context is None:
                    raise OSError("no decoder for its pictures")
                # Videos are read side by side by the caller's threads, where there are any.
                stream.codec_context.thread_count = 1
                width, height = stream.codec_context.width, stream.codec_context.height
                if not 0 < width * height <= _MAX_FRAME_PIXELS:
                    raise OSError(f"frames of {width} x {height} pixels (limit {_MAX_FRAME_PIXELS} pixels)")
                yield _Video(container, stream, width, height)
        except (_NotByTime, StoreFailure):
            raise
        except Exception as error:
            raise OSError(getattr(error, "strerror", None) or str(error)) from error


@functools.cache
def _av():
    try:
        import av
    except ImportError as error:
        raise UserError(f"videos need the package av (PyAV), which cannot be imported: {error}") from None
    return av


def _refused(url: str, flags: int, options: dict):
    raise PermissionError(f"it names another file: {url}")


def _times(store: ImageStore, name: str) -> tuple[list[int | None], list[int]]:
    """(time of every frame in the file's order, times of the keyframes, sorted), in the stream's unit; undecoded."""
    times, keys = [], []
    with _opened(store, name) as video:
        for packet in video.container.demux(video.stream):
            # The last packet is empty. Those to be discarded come before the start that an edit list sets.
            if packet.size and not packet.is_discard:
                times.append(packet.pts)
            if packet.size and packet.is_keyframe and packet.pts is not None:
                keys.append(packet.pts)
    return times, sorted(keys)


def _at_times(video: _Video, wanted: Sequence[int], keys: Sequence[int]) -> dict[int, np.ndarray]:
    """The frame at each of the times ``wanted`` (sorted). A time at which nothing is shown means the next frame."""
    found: dict[int, np.ndarray] = {}
    frame, frames = None, iter(())
    for time in wanted:
        before = bisect.bisect_right(keys, time)
        if frame is None or (before and keys[before - 1] > frame.pts):
            frame, frames = _from_keyframe(video, time, keys[:before])
        while frame.pts < time:
            frame = next(frames, None)
            if frame is None or frame.pts is None:
                raise _NotByTime
        found[time] = video.pixels(frame)
    return found


def _from_keyframe(video: _Video, time: int, keys: Sequence[int]) -> tuple[Frame, Iterator[Frame]]:
    """(first frame, further frames) from the keyframe before ``time``; ``keys``: those at or before it."""
    # Containers seek by decoding time, which may lead to a later keyframe: then the one before is tried.
    for key in [*reversed(keys[-3:]), *keys[:1]]:
        video.container.seek(key, stream=video.stream)
        frames = video.decoded()
        frame = next(frames, None)
        if frame is not None and frame.pts is not None and frame.pts <= time:
            return frame, frames
    raise _NotByTime


def _counted(video: _Video, wanted: set[int]) -> dict[int, np.ndarray]:
    """The frames with the numbers ``wanted``, decoded from the start."""
    found: dict[int, np.ndarray] = {}
    for number, frame in enumerate(video.decoded()):
        if number in wanted:
            found[number] = video.pixels(frame)
        if len(found) == len(wanted):
            return found
    raise OSError(f"ends before frame {min(wanted - found.keys())}")
