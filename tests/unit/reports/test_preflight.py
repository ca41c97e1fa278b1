"""A whole preflight of a data set with one of everything that can be wrong."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from dc_megatron.data.index import build_index, index_key, read_summary
from dc_megatron.errors import UserError
from dc_megatron.reports import preflight as module
from dc_megatron.reports import preflight_samples
from dc_megatron.reports.preflight import preflight
from dc_megatron.reports.preflight_settings import PreflightSettings, data_config, read_shapes
from dc_megatron.reports.preflight_text import as_text
from tests.helpers.data_files import caption_records, conversation, photo, write_records
from tests.helpers.troubled_data import HOSTILE, HOSTILE_TERMINAL, troubled_data, troubles

CAPTIONS = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("preflight")


@pytest.fixture(scope="module")
def settings(root) -> PreflightSettings:
    files = troubled_data(root, CAPTIONS)
    return PreflightSettings(
        data_path=(files["main"], f"{files['second']}:0.5"),
        image_folder=(files["images"],),
        model_name_or_path=files["model"],
        vision_tower=files["tower"],
        version="v1",
        image_aspect_ratio="pad",
        model_max_length=300,
        index_folder=str(root / "index"),
    )


@pytest.fixture(scope="module")
def report(settings) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        # So that the page has every sample on it.
        patch.setattr(preflight_samples, "MOST_SAMPLES", 1000)
        return preflight(settings)


def good_settings(settings: PreflightSettings, tmp_path: Path, records: list, **more) -> PreflightSettings:
    """``settings`` for other records, whose pictures lie in tmp_path."""
    data = write_records(tmp_path / "data.json", records)
    return replace(settings, data_path=(data,), image_folder=(str(tmp_path),), index_folder=str(tmp_path), **more)


def levels(report: dict, level: str) -> list[str]:
    return [finding["text"] for finding in report["findings"] if finding["level"] == level]


def test_every_record_that_is_dropped_is_listed_with_its_reason(report, root):
    expected = Counter(reason for _, reason in troubles(root / "images") if reason)
    assert report["total"]["dropped_by_reason"] == expected
    listed = {fault["id"]: fault["reason"] for fault in report["dropped_records"] if fault["id"] != "46"}
    named = {record["id"]: reason for record, reason in troubles(root / "images") if reason}
    assert {name: listed[name] for name in named} == named
    assert all(fault["source"] == 0 and fault["record"] >= CAPTIONS for fault in report["dropped_records"])
    assert report["dropped_left_out"] == 0


def test_counts_of_sources_add_up(report):
    main, second = report["sources"]
    assert (second["records"], second["kept"], second["images"], second["text_only"]) == (10, 10, 2, 8)
    assert (second["weight"], main["weight"]) == (0.5, 1)
    for name in ("records", "kept", "dropped", "tokens", "supervised_tokens", "images", "truncated"):
        assert report["total"][name] == main[name] + second[name]
    assert main["records"] == main["kept"] + main["dropped"]
    total = report["total"]
    assert total["text_only"] + total["one_image"] + total["several_images"] == total["kept"]
    assert total["tokens"] == read_summary(report["index"]["folder"]).tokens


def test_odd_and_broken_pictures(report):
    odd = {kind: of["pictures"][0]["name"] for kind, of in report["odd_pictures"].items()}
    assert odd["cmyk"] == "cmyk.jpg"
    assert odd["exif_rotated"] == "turned.jpg"
    assert odd["one_pixel"] == "speck.png"
    assert odd["gif"] == odd["animated"] == "moving.gif"
    assert odd["huge"] == "huge.png"
    assert [one["name"] for one in report["decoding"]["failures"]] == ["torn.jpg"]
    assert report["decoding"]["checked"] == report["decoding"]["pictures"] == report["total"]["different_images"]


def test_marks_duplicates_and_ids(report):
    marks = report["template_marks"]["marks"]
    assert set(marks) == {"USER:", "ASSISTANT:", "</s>", "<|im_start|>", "### Human:", "[INST]"}
    assert report["template_marks"]["records"] == 2
    assert [one["id"] for one in marks["[INST]"]["examples"]] == ["other-template"]
    assert [one["id"] for one in report["answers_with_image"]["examples"]] == ["image-in-answer"]
    content = report["duplicates"]["content"]
    assert (content["groups"], content["extra"]) == (2, 2)
    assert content["examples"][0]["places"] == [
        {"source": 0, "record": 0, "id": "caption-0"},
        {"source": 1, "record": 0, "id": "caption-0"},
    ]
    assert report["duplicates"]["ids"]["ids"] == 1


def test_it_is_refused_for_the_reasons_that_training_has(report, settings):
    assert report["verdict"] == "refused"
    refused = levels(report, "refused")
    assert len(refused) == 2
    assert refused[0].startswith("8 of 73 records")
    assert "torn.jpg" in refused[1]
    config = data_config(settings, read_shapes(settings))
    with pytest.raises(UserError, match=r"8 of 73 records .*tools/preflight\.py"):
        build_index(config, settings.index_folder)


def test_training_finds_the_index_finished(report, settings):
    assert report["index"]["found"] is False
    config = data_config(settings, read_shapes(settings))
    # Nothing of what differs between a preflight and a run counts.
    run = replace(config, seq_length=8192, packing="none", max_bad_sample_rate=1.0, seed=5, vocab_size=0)
    assert report["index"]["key"] == index_key(run)
    built = []
    build_index(run, settings.index_folder, lambda done, total: built.append(done))
    assert built == []


def test_the_report_is_json_and_the_screen_is_harmless(report):
    assert json.loads(json.dumps(report, allow_nan=False))["total"] == report["total"]
    text = as_text(report)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert max(map(len, text.splitlines())) < 400
    assert len(text.splitlines()) < 40
    for part in ("main.json", "--seq-length", "refused: 2 reasons", "preflight.html"):
        assert part in text


class Page(HTMLParser):
    """Collects tags, attributes and text; fails where an element is not closed."""

    def __init__(self, path: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], Counter(), [], []
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += attributes
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.texts.append(text)


def test_nothing_from_the_data_becomes_markup(report):
    page = Page(report["page"])
    known = "html head meta title style body h1 h2 h3 p b span div code table thead tbody tr th td img details summary"
    assert set(page.tags) <= set(known.split())
    names = "lang charset http-equiv content name class src alt open"
    assert {name for name, _ in page.attributes} <= set(names.split())
    sources = [value for name, value in page.attributes if name == "src"]
    assert sources
    assert all(value.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for value in sources)
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    assert next(value for name, value in page.attributes if name == "content").startswith("default-src 'none'")
    text = "".join(page.texts)
    # As a name of a picture and an id, and within a sample's text: shown, but as text.
    assert text.count("<script>alert(1)</script>") >= 4
    assert "\\x1b]0;owned\\x07" in text
    assert not any(ord(char) < 32 and char not in "\n\t" for char in text)
    assert HOSTILE_TERMINAL[0] not in Path(report["page"]).read_text(encoding="utf-8")
    assert HOSTILE not in Path(report["page"]).read_text(encoding="utf-8")


def test_the_page_shows_what_was_found(report):
    page = Page(report["page"])
    text = " ".join("".join(page.texts).split())
    for words in (
        "Preflight of",
        "no picture that can be read",
        "leads out of the image folder",
        "2 <image> marks in the text, 1 files",
        "CMYK colours: 1",
        "image file is truncated",
        "### Human:",
        "A red circle and 3 green triangles.",
    ):
        assert words in text, words
    targets = sum(value == "target" for name, value in page.attributes if name == "class")
    assert targets >= report["total"]["kept"]


def test_good_data_is_fine(settings, tmp_path):
    report = preflight(good_settings(settings, tmp_path, caption_records(tmp_path, 5)))
    assert report["verdict"] == "fine"
    assert report["findings"] == []
    assert report["page"] == str(tmp_path / "preflight.html")


def test_videos_are_counted_and_decoded(settings, tmp_path):
    """A folder of frames, and a file with three; one file that breaks off."""
    caption_records(tmp_path / "frames", 5)
    frames = [Image.new("RGB", (60, 40), (value, 0, 0)) for value in (40, 120, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    answer = conversation("<video>\nWhat happens?", "A red circle.")
    records = [
        {"id": "folder", "video": "frames", "conversations": answer},
        {"id": "file", "video": "moving.gif", "conversations": answer},
        *caption_records(tmp_path, 2),
    ]
    report = preflight(good_settings(settings, tmp_path, records, video_frames=4))
    assert report["verdict"] == "fine"
    total = report["total"]
    assert (total["videos"], total["with_video"], total["images"], total["several_images"]) == (2, 2, 4 + 3 + 2, 2)
    assert report["decoding"]["checked"] == 9
    assert "moving.gif frame 2" in " ".join(Page(report["page"]).texts)
    (tmp_path / "moving.gif").write_bytes((tmp_path / "moving.gif").read_bytes()[:60])
    broken = preflight(good_settings(settings, tmp_path, records, video_frames=4))
    assert [one["name"] for one in broken["decoding"]["failures"]] == ["moving.gif"] * 3


def test_without_an_index_folder_nothing_is_left_but_the_page(settings, tmp_path):
    page = tmp_path / "page.html"
    good = good_settings(settings, tmp_path, caption_records(tmp_path, 3))
    report = preflight(replace(good, index_folder="", html=str(page)))
    assert report["index"]["folder"] is None
    assert {path.name for path in tmp_path.iterdir()} == {"data.json", "page.html", *(f"{n:04}.jpg" for n in range(3))}
    assert "not kept" in as_text(report)


def test_an_exchanged_picture_and_a_lone_failure_are_warnings(settings, tmp_path):
    records = caption_records(tmp_path, 30)
    good = good_settings(settings, tmp_path, records)
    preflight(good)
    photo(tmp_path / "0003.jpg", 99, 55)
    (tmp_path / "0004.jpg").write_bytes((tmp_path / "0004.jpg").read_bytes()[:400])
    some = preflight(replace(good, decode=29))
    while not (some["decoding"]["resized"] and some["decoding"]["failed"]):
        some = preflight(replace(good, decode=29, seed=some["settings"]["seed"] + 1))
    assert some["verdict"] == "fine"
    assert some["index"]["found"]
    assert "decodes to 99 x 55 pixels" in some["decoding"]["other_sizes"][0]["reason"]
    assert len(levels(some, "warning")) == 2
    assert levels(some, "note") == ["29 of 30 pictures were decoded; --decode all looks at every one"]
    # Where every picture was looked at, one in thirty is more than the rate.
    assert preflight(replace(good, decode=None))["verdict"] == "refused"
    assert preflight(replace(good, decode=0))["decoding"]["checked"] == 0


def test_too_short_a_limit_leaves_nothing_and_the_right_one_is_advised(settings, tmp_path):
    report = preflight(good_settings(settings, tmp_path, caption_records(tmp_path, 5), model_max_length=20))
    assert report["verdict"] == "refused"
    assert "nothing of" in levels(report, "refused")[0]
    assert report["packing"] is None
    assert report["suggestions"]["model_max_length"]["value"] == 1024
    assert [one["share"] for one in report["cut"]] == [1, 0, 0, 0, 0, 0]
    assert "nothing is left to pack" in as_text(report)


def test_conversations_that_a_template_wrote_before_are_refused(settings, tmp_path):
    records = caption_records(tmp_path, 5)
    for record in records[:2]:
        record["conversations"][1]["value"] = "ASSISTANT: it </s>"
    report = preflight(good_settings(settings, tmp_path, records))
    assert "written out by a template before" in levels(report, "refused")[0]


def test_long_lists_are_capped_and_counted(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_DROPPED", 2)
    missing = [{"id": str(n), "image": "no.jpg", "conversations": []} for n in range(5)]
    report = preflight(good_settings(settings, tmp_path, [*caption_records(tmp_path, 5), *missing]))
    assert (len(report["dropped_records"]), report["dropped_left_out"]) == (2, 3)
    assert report["total"]["dropped"] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"html": "no/such/folder/page.html"}, "--html no/such/folder"),
        ({"index_folder": __file__}, "--index-folder .*test_preflight"),
        ({"image_folder": ("nowhere",)}, "--image_folder nowhere"),
        ({"data_path": ("nowhere.json",)}, "--data_path nowhere.json"),
        ({"vision_tower": "nowhere"}, "--vision_tower nowhere"),
        ({"version": "llama_3"}, "--version llama_3"),
        ({"max_bad_sample_rate": 2.0}, "--max-bad-sample-rate 2.0"),
    ],
)
def test_wrong_use_is_said_before_the_work(settings, tmp_path, change, message):
    good = good_settings(settings, tmp_path, caption_records(tmp_path, 1))
    with pytest.raises(UserError, match=message):
        preflight(replace(good, **change))
