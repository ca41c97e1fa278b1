"""The pictures of a record, and its messages with one ``<image>`` for each of them.

A video is a few of its frames, evenly spread; from here on a frame is a picture like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from dc_megatron.config import ImageTiling
from dc_megatron.data.conversation import IMAGE_MARK, place_image
from dc_megatron.data.faults import RecordFault
from dc_megatron.data.image_header import Header, read_header
from dc_megatron.data.image_store import ImageStore, UnsafeName
from dc_megatron.data.llava_json import Record
from dc_megatron.data.picture import Picture, make_picture
from dc_megatron.data.retrying import StoreFailure
from dc_megatron.errors import UserError

VIDEO_MARK = "<video>"
_REQUESTS_AT_ONCE = 16
_MARK = re.compile(f"{re.escape(IMAGE_MARK)}|{re.escape(VIDEO_MARK)}")


class PictureReader:
    """Reads headers of one source's pictures. ``notes``: (name, kind) of every odd one, collected as they come.

    Headers that were read are remembered until ``forget``: neighbours often share their picture.
    """

    def __init__(self, store: ImageStore, tiling: ImageTiling, video_frames: int, source: int = 0):
        self._store, self._tiling, self._video_frames, self._source = store, tiling, video_frames, source
        self._headers: dict[str, Header | RecordFault] = {}
        self.notes: list[tuple[str, str]] = []

    def forget(self) -> None:
        self._headers.clear()
        self.notes = []

    def read_ahead(self, names: Sequence[str]) -> None:
        """Read headers of ``names`` side by side where each is a request to somewhere far."""
        if "://" in self._store.location:
            names = list(dict.fromkeys(names))
            with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as threads:
                self._headers |= zip(names, threads.map(self._header, names), strict=True)

    def read(self, record: Record) -> tuple[list, list[Picture]]:
        """(messages, pictures): one ``<image>`` for each picture, in the same order. RecordFault.

        That there are as many is left to the caller, who knows which messages count.
        """
        images = [self._image(name) for name in record.images]
        if not record.videos:
            return record.messages, images
        videos = [self._video(name) for name in record.videos]
        return _with_frames(record.messages, images, videos)

    def _image(self, name: str) -> Picture:
        header = self._headers.get(name)
        if header is None:
            header = self._headers[name] = self._header(name)
        if isinstance(header, RecordFault):
            raise header.with_traceback(None)
        self.notes += [(name, kind) for kind in header.notes]
        return make_picture(self._tiling, name, header.width, header.height, source=self._source)

    def _header(self, name: str) -> Header | RecordFault:
        try:
            return read_header(self._store, name)
        except RecordFault as fault:
            return fault

    def _video(self, name: str) -> list[Picture]:
        """The frames that are taken of a video file, or of a folder of frames."""
        from dc_megatron.data.video import evenly_spread, frame_count_and_size, is_video_file

        try:
            if not is_video_file(name):
                frames = self._store.list(name)
                if not frames:
                    raise RecordFault(RecordFault.CORRUPT_VIDEO, f"{self._store.where(name)}: a folder without frames")
                return [self._image(frames[number]) for number in evenly_spread(len(frames), self._video_frames)]
            count, width, height = frame_count_and_size(self._store, name)
        except UnsafeName as error:
            raise RecordFault(RecordFault.UNSAFE_PATH, str(error)) from None
        except FileNotFoundError:
            raise RecordFault(RecordFault.MISSING_IMAGE, f"no video {self._store.where(name)}") from None
        except StoreFailure as error:
            raise UserError(f"--image_folder {self._store.location}: {error}; start again when it answers") from None
        except OSError as error:
            raise RecordFault(RecordFault.CORRUPT_VIDEO, f"{self._store.where(name)}: {error}") from None
        return [
            make_picture(self._tiling, name, width, height, source=self._source, frame=number)
            for number in evenly_spread(count, self._video_frames)
        ]


def _with_frames(messages: list, images: list[Picture], videos: list[list[Picture]]) -> tuple[list, list[Picture]]:
    """Messages with an ``<image>`` for every frame, and the pictures in the order of their marks.

    A ``<video>`` stands for one video. Without any, and without images, an ``<image>`` may stand for a whole video or
    for one frame, whichever the numbers say.
    """
    texts = list(_texts(messages))
    image_marks = sum(text.count(IMAGE_MARK) for text in texts)
    video_marks = sum(text.count(VIDEO_MARK) for text in texts)
    frames = [frame for video in videos for frame in video]
    if not video_marks and not images:
        if image_marks == len(frames):
            return messages, frames
        if image_marks == len(videos):
            placed = _mapped(messages, place_image)
            return _expanded(placed, {IMAGE_MARK: iter(videos)})
    if video_marks != len(videos) or image_marks != len(images):
        raise RecordFault(
            RecordFault.IMAGE_COUNT,
            f"{video_marks} {VIDEO_MARK} and {image_marks} {IMAGE_MARK} marks in the text, {len(videos)} videos"
            f" ({len(frames)} frames) and {len(images)} images",
        )
    return _expanded(messages, {VIDEO_MARK: iter(videos), IMAGE_MARK: iter([image] for image in images)})


def _expanded(messages: list, waiting: dict[str, Iterator[Sequence[Picture]]]) -> tuple[list, list[Picture]]:
    """Each mark takes the next entry of its kind and becomes as many ``<image>`` marks as that has pictures."""
    pictures: list[Picture] = []

    def take(mark: re.Match) -> str:
        if mark.group() not in waiting:
            return mark.group()
        taken = next(waiting[mark.group()])
        pictures.extend(taken)
        return IMAGE_MARK * len(taken)

    return _mapped(messages, lambda text: _MARK.sub(take, text)), pictures


def _mapped(messages: list, function) -> list:
    """The messages with ``function`` of every text; what is no message is left for others to complain about."""
    return [{**message, "value": function(message["value"])} if _has_text(message) else message for message in messages]


def _texts(messages: list) -> Iterator[str]:
    return (message["value"] for message in messages if _has_text(message))


def _has_text(message) -> bool:
    return isinstance(message, dict) and isinstance(message.get("value"), str)
