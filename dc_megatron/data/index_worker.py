"""A worker of the data index: a program that index_workers.py starts.

Messages are pickles behind their length. In come the settings once and then chunks, out goes an answer to each chunk:
("result", ChunkResult), ("refused", a user error's words) or ("failed", a traceback).
"""

from __future__ import annotations

import os
import pickle
import queue
import struct
import sys
import threading
import traceback
from typing import BinaryIO

_LENGTH = struct.Struct("<Q")


def write_message(pipe: BinaryIO, message: bytes) -> None:
    pipe.write(_LENGTH.pack(len(message)))
    pipe.write(message)
    pipe.flush()


def read_message(pipe: BinaryIO) -> bytes:
    """The next message; EOFError where the other side is gone."""
    length = _read(pipe, _LENGTH.size)
    return _read(pipe, _LENGTH.unpack(length)[0])


def _read(pipe: BinaryIO, size: int) -> bytes:
    content = pipe.read(size)
    if len(content) < size:
        raise EOFError
    return content


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    # What a library prints must not end up among the answers.
    os.dup2(2, 1)
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, messages), daemon=True).start()

    makers: list = []
    settings = pickle.loads(messages.get())
    while True:
        source, chunk = pickle.loads(messages.get())
        write_message(answers, pickle.dumps(_answer(makers, settings, source, chunk), protocol=5))


def _receive(pipe: BinaryIO, messages: queue.SimpleQueue) -> None:
    try:
        while True:
            messages.put(read_message(pipe))
    except (EOFError, OSError):
        # Nobody waits for an answer any more.
        os._exit(0)


def _answer(makers: list, settings: tuple, source: int, chunk) -> tuple[str, object]:
    """``makers`` gets the one SampleMaker of this process at the first chunk: stores may refuse to open, too."""
    from dc_megatron.data.index_samples import SampleMaker
    from dc_megatron.errors import UserError

    try:
        if not makers:
            makers.append(SampleMaker(*settings))
        return "result", makers[0].chunk(chunk, source)
    except UserError as error:
        return "refused", str(error)
    except Exception:
        return "failed", traceback.format_exc()
