"""DALI against the PIL reference, what happens to files that cannot be decoded, and how requests are worked through."""

import logging
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dc_megatron.benchmark.picture_files import StoreInMemory
from dc_megatron.data import video
from dc_megatron.data.image_loading import LOAD_ERRORS, PilImageLoader, image_loader, tile_requests
from dc_megatron.data.image_reference import preprocess, substitute, tiles_of
from dc_megatron.data.image_store import open_store
from dc_megatron.data.picture import make_picture
from dc_megatron.data.retrying import StoreFailure
from dc_megatron.errors import UserError
from tests.helpers.data_files import photo, vision_config
from tests.helpers.image_requests import file_requests, request, tiling_for

SIZES = [(80, 64), (64, 80), (41, 67), (150, 33), (33, 150), (56, 56), (57, 56), (20, 20), (333, 251)]


def loader_of(backend, vision, aspect_ratio, **options):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    return image_loader(backend, vision, aspect_ratio, tiling_for(vision, aspect_ratio), **options)


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("aspect_ratio", ["square", "pad", "anyres"])
def test_dali_is_close_to_the_reference(tmp_path, family, aspect_ratio):
    vision = vision_config(family, 56)
    loader = loader_of("dali", vision, aspect_ratio, threads=2)
    files = [photo(tmp_path / f"{n}.jpg", w, h, seed=n, quality=90) for n, (w, h) in enumerate(SIZES)]
    files += [photo(tmp_path / "grey.jpg", mode="L"), photo(tmp_path / "progressive.jpg", progressive=True)]
    files += [photo(tmp_path / f"{n}.png", w, h, seed=n) for n, (w, h) in enumerate(SIZES[:3])]
    requests = file_requests(files, loader.tiling)
    pixels, failed = loader.load(requests)
    assert failed == []
    assert pixels.dtype == torch.float32
    expected, failed = loader_of("pil", vision, aspect_ratio).load(requests)
    assert failed == []
    assert pixels.shape == expected.shape
    difference = (pixels - expected).abs() * 255 * torch.tensor(vision.image_std)[:, None, None]
    for path, part in zip(files, difference.split([len(r.tiles) for r in requests]), strict=True):
        # Both resize bytes with the same weights, kept with fewer bits by one.
        assert part.mean() < 0.05, path
        assert part.max() < 2.1, path


def test_dali_really_decodes_plain_files(tmp_path, monkeypatch):
    loader = loader_of("dali", vision_config(image_size=56), "square")
    monkeypatch.setattr(loader, "_fill", lambda *_: pytest.fail("went through PIL"))
    files = [photo(tmp_path / "a.jpg"), photo(tmp_path / "b.png"), photo(tmp_path / "c.jpg", mode="L")]
    # The first bytes count, not the name.
    os.rename(files[0], tmp_path / "a.png")
    loader.load(file_requests([tmp_path / "a.png", *files[1:]], loader.tiling))


def odd_files(folder):
    """Files that DALI refuses or reads in another way; PIL reads them all."""
    first, second = (Image.open(photo(folder / f"{n}.bmp", seed=n)) for n in (1, 2))
    first.save(folder / "two.mpo", format="MPO", save_all=True, append_images=[second])
    files = [
        photo(folder / "a.gif"),
        photo(folder / "gif_named.jpg", format="GIF"),
        photo(folder / "cmyk.jpg", mode="CMYK"),
        photo(folder / "palette.png", mode="P"),
        photo(folder / "alpha.png", mode="RGBA"),
        photo(folder / "one_transparent_colour.png", transparency=(1, 2, 3)),
        photo(folder / "a.webp"),
        photo(folder / "a.bmp"),
        photo(folder / "a.tif"),
        photo(folder / "coded_as_rgb.jpg", keep_rgb=True),
        str(folder / "two.mpo"),
    ]
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 15).save(folder / "sixteen.png")
    return [*files, str(folder / "sixteen.png")]


@pytest.mark.parametrize("aspect_ratio", ["pad", "anyres"])
def test_what_dali_cannot_take_is_the_reference_exactly(tmp_path, aspect_ratio):
    vision = vision_config(image_size=56)
    loader = loader_of("dali", vision, aspect_ratio, threads=2)
    files = odd_files(tmp_path)
    requests = file_requests([photo(tmp_path / "plain.jpg"), *files], loader.tiling)
    pixels, failed = loader.load(requests)
    assert failed == []
    parts = pixels.split([len(r.tiles) for r in requests])[1:]
    for path, one, part in zip(files, requests[1:], parts, strict=True):
        whole = aspect_ratio == "pad"
        expected = preprocess(path, vision, "pad")[None] if whole else tiles_of(path, vision, loader.tiling, one.tiles)
        assert (part.numpy() == expected).all(), path


def broken_files(folder):
    good = Path(photo(folder / "good.jpg", 80, 64)).read_bytes()
    png = Path(photo(folder / "good.png")).read_bytes()
    contents = {
        "text.jpg": b"no image",
        "empty.jpg": b"",
        "cut.jpg": good[: len(good) // 2],
        "cut.png": png[:900],
        # Looks whole from outside: only the decoder finds out.
        "header_only.jpg": good[:200] + b"\xff\xd9",
        "hidden.png": _without_pixels(png),
        # A bomb: 60,000 x 60,000 pixels, and a strip that padding would make one.
        "huge.png": png[:16] + (60_000).to_bytes(4, "big") * 2 + png[24:],
        "strip.png": png[:16] + (20_000).to_bytes(4, "big") + (200).to_bytes(4, "big") + png[24:],
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in contents] + [str(folder / "missing.jpg")]


def _without_pixels(png):
    start = png.index(b"IDAT") + 4
    return png[:start] + b"\0" * 200 + png[start + 200 :]


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_broken_files_are_substituted_and_named_once(tmp_path, caplog, backend):
    vision = vision_config(image_size=56)
    broken = broken_files(tmp_path)
    good = photo(tmp_path / "good.jpg", 80, 64)
    loader = loader_of(backend, vision, "pad", threads=2)
    requests = file_requests([good, *broken, good], loader.tiling, (80, 64))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            pixels, failed = loader.load(requests)
            assert failed == list(range(1, len(broken) + 1))
            for image in pixels[1:-1].numpy():
                assert (image == substitute(vision)).all()
            for image in (pixels[0], pixels[-1]):
                assert np.abs(image.numpy() - preprocess(good, vision, "pad")).mean() < 0.01
    for path in broken:
        assert sum(os.path.basename(path) in record.getMessage() for record in caplog.records) == 1


def test_a_file_that_breaks_dali_costs_one_pipeline_once(tmp_path, monkeypatch):
    broken = [path for path in broken_files(tmp_path) if os.path.basename(path) in ("cut.jpg", "cut.png", "hidden.png")]
    good = [photo(tmp_path / f"{n}.jpg", seed=n) for n in range(3)]
    loader = loader_of("dali", vision_config(image_size=56), "pad")
    built, build = [], loader._built
    monkeypatch.setattr(loader, "_built", lambda: built.append(1) or build())
    requests = file_requests([good[0], *broken, *good[1:]], loader.tiling, (80, 64))
    pixels, failed = loader.load(requests)
    # Files that were cut off are told from their bytes: the others are the first pipeline and the one after the break.
    assert (failed, len(built)) == ([1, 2, 3], 2)
    # A thread takes several at a time on a GPU; then each is tried by itself.
    grouped = loader_of("dali", vision_config(image_size=56), "pad")
    grouped.group = 6
    again, failed = grouped.load(requests)
    assert (failed, (again == pixels).all()) == ([1, 2, 3], True)
    assert loader.load(requests)[1] == [1, 2, 3]
    assert len(built) == 2


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_only_the_wanted_tiles_are_made(tmp_path, backend):
    vision = vision_config(image_size=28)
    loader = loader_of(backend, vision, "anyres")
    wide = photo(tmp_path / "wide.jpg", 200, 60)
    (whole,) = file_requests([wide], loader.tiling)
    pixels, _ = loader.load([whole])
    assert len(pixels) == whole.picture.tiles == 4
    for tiles in (range(1), range(2), range(1, 4), range(2, 3)):
        part, failed = loader.load([request(whole.store, wide, loader.tiling, (200, 60), tiles)])
        assert failed == []
        assert (part == pixels[tiles.start : tiles.stop]).all()


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_anyres_refuses_a_picture_of_another_size_than_indexed(tmp_path, caplog, backend):
    vision = vision_config(image_size=28)
    loader = loader_of(backend, vision, "anyres")
    path = photo(tmp_path / "a.jpg", 80, 64)
    store = open_store("")
    other, same = request(store, path, loader.tiling, (200, 60)), request(store, path, loader.tiling)
    pixels, failed = loader.load([other, same])
    assert failed == [0]
    assert (pixels[: len(other.tiles)].numpy() == substitute(vision)).all()
    assert "80 x 64 pixels and had 200 x 60" in caplog.text
    # Where a picture is one tile whatever its size, another size changes nothing.
    assert loader_of(backend, vision, "pad").load([request(store, path, tiling_for(vision, "pad"), (200, 60))])[1] == []


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_order_and_pixels_do_not_depend_on_threads(tmp_path, backend, threads):
    vision = vision_config(image_size=28)
    files = [photo(tmp_path / f"{n}.{'png' if n % 3 else 'gif'}", 30 + 17 * n, 40, seed=n) for n in range(12)]
    loader = loader_of(backend, vision, "square", threads=threads)
    pixels, _ = loader.load(file_requests(files, loader.tiling))
    # A second batch may not be put where the first one still is.
    second, _ = loader.load(file_requests(files[::-1], loader.tiling))
    assert (pixels == second.flip(0)).all()
    for path, image in zip(files, pixels.numpy(), strict=True):
        assert np.abs(image - preprocess(path, vision, "square")).mean() < 0.01


class MeetingStore(StoreInMemory):
    """Answers when four threads ask at once."""

    def __init__(self, files):
        super().__init__(files)
        self.meeting = threading.Barrier(4, timeout=20)

    def read(self, name):
        self.meeting.wait()
        return super().read(name)


def test_files_are_read_by_several_threads_even_where_one_decodes(tmp_path):
    vision = vision_config(image_size=28)
    data = Path(photo(tmp_path / "a.jpg")).read_bytes()
    store = MeetingStore({str(n): data for n in range(4)})
    loader = loader_of("pil", vision, "pad", threads=1)
    assert loader.load([request(store, str(n), loader.tiling) for n in range(4)])[1] == []


def test_the_frames_of_one_video_are_read_in_one_pass(monkeypatch):
    vision, calls = vision_config(image_size=28), []
    frames = np.random.RandomState(0).randint(0, 256, (4, 30, 40, 3), dtype=np.uint8)

    def read_frames(store, name, numbers):
        calls.append((name, list(numbers)))
        if name == "broken.mp4":
            raise OSError("no video")
        return [frames[number] for number in numbers]

    monkeypatch.setattr(video, "read_frames", read_frames)
    loader = loader_of("auto", vision, "pad")
    shown = [("a.mp4", 3), ("b.mp4", 0), ("broken.mp4", 1), ("a.mp4", 1)]
    pictures = [make_picture(loader.tiling, name, 40, 30, frame=frame) for name, frame in shown]
    pixels, failed = loader.load(tile_requests(pictures, [StoreInMemory({})], range(4)))
    assert sorted(calls) == [("a.mp4", [3, 1]), ("b.mp4", [0]), ("broken.mp4", [1])]
    assert failed == [2]
    for number, frame in ((0, 3), (1, 0), (3, 1)):
        expected = preprocess(Image.fromarray(frames[frame]), vision, "pad")
        assert (pixels[number].numpy() == expected).all()


class FailingStore(StoreInMemory):
    location = "far://away"

    def read(self, name):
        raise StoreFailure(f"{name}: failed 5 times")


def test_a_store_that_fails_stops_the_run():
    loader = loader_of("auto", vision_config(), "pad")
    with pytest.raises(UserError, match=r"--image_folder far://away: a.jpg: failed 5 times; start again"):
        loader.load([request(FailingStore({}), "a.jpg", loader.tiling)])


def test_a_share_of_tiles_may_begin_and_end_inside_a_picture():
    tiling = tiling_for(vision_config(image_size=28), "anyres")
    pictures = [
        make_picture(tiling, name, *size) for name, size in (("a", (200, 60)), ("b", (50, 50)), ("c", (28, 84)))
    ]
    assert [picture.tiles for picture in pictures] == [4, 5, 4]
    stores = [StoreInMemory({})]

    def asked(start, stop):
        return [(one.picture.name, one.tiles) for one in tile_requests(pictures, stores, range(start, stop))]

    assert asked(0, 13) == [("a", range(4)), ("b", range(5)), ("c", range(4))]
    assert asked(3, 6) == [("a", range(3, 4)), ("b", range(2))]
    assert asked(4, 9) == [("b", range(5))]
    assert asked(10, 12) == [("c", range(1, 3))]
    assert asked(6, 6) == asked(13, 20) == []
    # Every third tile of the 13, from the second one on: 1, 4, 7, 10.
    dealt = tile_requests(pictures, stores, range(1, 13, 3))
    assert [(one.picture.name, list(one.tiles)) for one in dealt] == [("a", [1]), ("b", [0, 3]), ("c", [1])]
    # 2 and 11: none of the second picture.
    dealt = tile_requests(pictures, stores, range(2, 13, 9))
    assert [(one.picture.name, list(one.tiles)) for one in dealt] == [("a", [2]), ("c", [2])]


@pytest.mark.parametrize("backend", ["pil", "auto"])
def test_no_pictures_give_an_empty_batch(backend):
    pixels, failed = loader_of(backend, vision_config(image_size=56), "pad").load([])
    assert (tuple(pixels.shape), failed) == ((0, 3, 56, 56), [])


def test_faults_of_records_are_among_the_errors_of_loading():
    assert issubclass(FileNotFoundError, LOAD_ERRORS)
    assert not issubclass(UserError, LOAD_ERRORS)


def test_backends_are_chosen_by_name(monkeypatch):
    vision = vision_config()
    tiling = tiling_for(vision, "pad")
    assert isinstance(image_loader("pil", vision, "pad", tiling), PilImageLoader)
    with pytest.raises(UserError, match=r"--image-backend dal: .*did you mean 'dali'"):
        image_loader("dal", vision, "pad", tiling)
    # As on a machine without DALI.
    monkeypatch.setitem(sys.modules, "dc_megatron.data.image_dali", None)
    assert image_loader("auto", vision, "pad", tiling).name == "pil"
    with pytest.raises(UserError, match="--image-backend pil"):
        image_loader("dali", vision, "pad", tiling)
