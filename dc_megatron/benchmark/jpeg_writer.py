"""A small baseline JPEG encoder, for chroma subsamplings that PIL reads and cannot write, such as 4:1:1 and 4:4:0."""

from __future__ import annotations

import struct

import numpy as np

_ORDER = sorted(range(64), key=lambda p: (p // 8 + p % 8, (p // 8 if (p // 8 + p % 8) % 2 else p % 8)))
# Every symbol has a code of the same length, its place in this list: simple, not small. Sizes of DC differences 0..11;
# run of zeros and size of AC values, end of block and sixteen zeros among them.
_SYMBOLS = {0: list(range(12)), 1: [0x00, 0xF0, *(16 * run + size for run in range(16) for size in range(1, 11))]}
_CODE_BITS = {0: 4, 1: 8}
_CODES = {table: {symbol: code for code, symbol in enumerate(symbols)} for table, symbols in _SYMBOLS.items()}


def write_jpeg(pixels: np.ndarray, sampling: tuple[int, int], quantiser: int = 6) -> bytes:
    """uint8 [H, W, 3] RGB as a JPEG with ``sampling`` (horizontal, vertical) samples of luma to one of chroma.

    (4, 1) is 4:1:1, (1, 2) is 4:4:0. quantiser: the step of every coefficient. Python loops over coefficients: for
    pictures of some 100 x 100 pixels.
    """
    height, width = pixels.shape[:2]
    across, down = sampling
    planes = _planes(pixels, across, down, quantiser)
    bits = "".join(_interleaved(planes, across, down))
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    frame = struct.pack(">BHHB", 8, height, width, 3) + bytes([1, 16 * across + down, 0, 2, 0x11, 0, 3, 0x11, 0])
    tables = b"".join(_table(kind) for kind in _SYMBOLS)
    scan = bytes([3, 1, 0, 2, 0, 3, 0, 0, 63, 0])
    parts = [
        (0xE0, b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0"),
        (0xDB, bytes([0] + [quantiser] * 64)),
        (0xC0, frame),
        (0xC4, tables),
        (0xDA, scan),
    ]
    head = b"".join(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in parts)
    return b"\xff\xd8" + head + data + b"\xff\xd9"


def _table(kind: int) -> bytes:
    counts = [0] * 16
    counts[_CODE_BITS[kind] - 1] = len(_SYMBOLS[kind])
    return bytes([16 * kind, *counts, *_SYMBOLS[kind]])


def _planes(pixels: np.ndarray, across: int, down: int, quantiser: int) -> list[np.ndarray]:
    """Quantised coefficients in zigzag order, int [rows, columns, 64] of blocks, of luma and the two chromas."""
    height, width = pixels.shape[:2]
    edges = ((0, -height % (8 * down)), (0, -width % (8 * across)), (0, 0))
    red, green, blue = np.pad(pixels, edges, mode="edge").astype(np.float64).transpose(2, 0, 1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = [luma - 128, (blue - luma) / 1.772, (red - luma) / 1.402]
    rows, columns = luma.shape
    small = [p.reshape(rows // down, down, columns // across, across).mean((1, 3)) for p in planes[1:]]
    place = np.arange(8)
    cosine = np.cos((2 * place[None] + 1) * place[:, None] * np.pi / 16) / 2
    cosine[0] /= np.sqrt(2)
    result = []
    for plane in [planes[0], *small]:
        blocks = plane.reshape(plane.shape[0] // 8, 8, plane.shape[1] // 8, 8).transpose(0, 2, 1, 3)
        values = np.rint(cosine @ blocks @ cosine.T / quantiser).astype(int)
        result.append(values.reshape(*values.shape[:2], 64)[:, :, _ORDER])
    return result


def _interleaved(planes: list[np.ndarray], across: int, down: int):
    """Codes of all blocks, a group of luma and one block of each chroma at a time."""
    before = [0, 0, 0]
    for row in range(planes[1].shape[0]):
        for column in range(planes[1].shape[1]):
            for number, plane in enumerate(planes):
                wide, high = (across, down) if number == 0 else (1, 1)
                for y in range(row * high, (row + 1) * high):
                    for x in range(column * wide, (column + 1) * wide):
                        block = plane[y, x].tolist()
                        yield from _block(block, before[number])
                        before[number] = block[0]


def _block(values: list[int], before: int):
    yield _coded(0, 0, values[0] - before)
    zeros = 0
    for value in values[1:]:
        if value == 0:
            zeros += 1
            continue
        for _ in range(zeros // 16):
            yield format(_CODES[1][0xF0], "08b")
        yield _coded(1, zeros % 16, value)
        zeros = 0
    if zeros:
        yield format(_CODES[1][0x00], "08b")


def _coded(table: int, zeros: int, value: int) -> str:
    """The code for the zeros before ``value`` and its size, then its bits, those of a negative one inverted."""
    size = abs(value).bit_length()
    code = format(_CODES[table][16 * zeros + size], f"0{_CODE_BITS[table]}b")
    bits = value if value > 0 else value + (1 << size) - 1
    return code + (format(bits, f"0{size}b") if size else "")
