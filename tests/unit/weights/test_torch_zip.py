"""Places found in archives of torch.save are those torch itself reads, and headers are all that is read."""

import os
import zipfile
from collections import OrderedDict

import pytest
import torch

from dc_megatron.weights import torch_zip
from dc_megatron.weights.positioned_reads import PositionedFile
from dc_megatron.weights.torch_zip import BrokenArchive, find_tensor, find_tensors

BASE = torch.arange(24.0)
TENSORS = {
    "plain": BASE.reshape(6, 4),
    "view of the same storage": BASE[8:20].reshape(3, 4),
    "transposed": BASE.reshape(6, 4).t(),
    "every other row": BASE.reshape(6, 4)[::2],
    "expanded": torch.ones(1, 4).expand(3, 4),
    "parameter": torch.nn.Parameter(torch.ones(2, 3)),
    "half": torch.ones(3, 2, dtype=torch.bfloat16),
    "eight bits": torch.ones(4, dtype=torch.float8_e4m3fn),
    "unsigned": torch.arange(4, dtype=torch.int32).to(torch.uint16),
    "truth": torch.tensor([True, False]),
    "empty": torch.empty(0, 5),
}


def read(file, place):
    out = torch.empty(place.shape, dtype=place.dtype)
    torch_zip.read_rows(file, place, 0, place.shape[0], out)
    return out


@pytest.mark.parametrize("make", [dict, OrderedDict])
def test_every_kind_of_tensor(make, tmp_path):
    content = make(TENSORS)
    if make is OrderedDict:
        content._metadata = OrderedDict({"": {"version": 1}})  # as Module.state_dict() writes
    torch.save(content, tmp_path / "a.bin")
    file = PositionedFile(str(tmp_path / "a.bin"))
    places = find_tensors(file)
    assert list(places) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert (places[name].shape, places[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert places[name].contiguous == tensor.is_contiguous(), name
        assert torch.equal(read(file, places[name]).double(), tensor.detach().double()), name


def test_an_archive_in_the_middle_of_a_file(tmp_path):
    path = tmp_path / "__0_0.distcp"
    torch.save(TENSORS["plain"], tmp_path / "one")
    data = (tmp_path / "one").read_bytes()
    path.write_bytes(b"x" * 1001 + data + b"y" * 70_000)
    file = PositionedFile(str(path))
    place = find_tensor(file, 1001, len(data))
    assert torch.equal(read(file, place), TENSORS["plain"])
    for wrong in ((1000, len(data)), (1001, len(data) - 1), (1001, len(data) + 1), (1001, 1 << 40), (-1, 10)):
        with pytest.raises(BrokenArchive):
            find_tensor(file, *wrong)


def test_sizes_beyond_32_bits(tmp_path):
    """An archive of 5 GB of zeros, sparse on disk: the places are right and only headers are read."""
    path = str(tmp_path / "large.bin")
    tensors = {"large": torch.empty(5 << 30, dtype=torch.uint8, device="meta"), "after": torch.arange(5)}
    with torch.serialization.skip_data():
        torch.save({name: torch.empty_like(t, device="cpu") for name, t in tensors.items()}, path)
    assert os.stat(path).st_blocks * 512 < 1 << 30
    read_bytes = 0
    original = os.preadv

    def counting(descriptor, buffers, offset):
        nonlocal read_bytes
        count = original(descriptor, buffers, offset)
        read_bytes += count
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", counting)
        places = find_tensors(PositionedFile(path))
    assert read_bytes < 20_000
    assert places["after"].offset > 5 << 30
    expected = torch.load(path, map_location="meta", weights_only=True)
    assert places["large"].shape == tuple(expected["large"].shape)


def rewrite(path, change, compression=zipfile.ZIP_STORED):
    """The archive at ``path`` with entries changed by ``change(name, data) -> data or None``."""
    with zipfile.ZipFile(path) as old:
        entries = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in entries.items():
            data = change(name, data)
            if data is not None:
                new.writestr(name, data)


def drop(part):
    return lambda name, data: None if name.endswith(part) else data


def replace(part, value):
    return lambda name, data: value if name.endswith(part) else data


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop("data.pkl"), "no data.pkl"),
        (drop("data/0"), "a storage that the archive has not"),
        (replace("data/0", b"short"), "asks for 96 bytes of storage 0, which has 5"),
        (replace("byteorder", b"big"), "big-endian"),
        (replace("data.pkl", b"\x80\x02"), "its pickle is broken"),
        (replace("data.pkl", b"\x80\x02]."), "not a table of tensors by name"),
    ],
)
def test_damaged_archives(change, reason, tmp_path):
    path = tmp_path / "a.bin"
    torch.save({"a": TENSORS["plain"]}, path)
    rewrite(path, change)
    with pytest.raises(BrokenArchive, match=reason):
        find_tensors(PositionedFile(str(path)))


def test_compressed_entries(tmp_path):
    path = tmp_path / "a.bin"
    torch.save({"a": TENSORS["plain"]}, path)
    rewrite(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(BrokenArchive, match="compressed"):
        find_tensors(PositionedFile(str(path)))


def test_a_changed_byte_never_gives_a_wrong_place(tmp_path):
    """Every third byte of an archive is changed in turn: what is still accepted lies inside the file."""
    path = tmp_path / "a.bin"
    torch.save({"a": TENSORS["plain"]}, path)
    data = path.read_bytes()
    for place in range(0, len(data), 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        file = PositionedFile(str(path))
        try:
            found = find_tensors(file)
        except BrokenArchive:
            continue
        for tensor in found.values():
            assert tensor.offset >= 0
            assert tensor.offset + tensor.extent * tensor.dtype.itemsize <= len(data)
