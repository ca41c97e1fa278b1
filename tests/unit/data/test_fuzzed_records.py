"""Records and pictures damaged in every way that came to mind: nothing crashes or hangs, and each is counted."""

from __future__ import annotations

import json
import random

import pytest

from dc_megatron.data import index_build
from dc_megatron.data.faults import RecordFault
from dc_megatron.data.index import build_index, open_index
from dc_megatron.data.tokenization import load_tokenizer
from dc_megatron.errors import UserError
from tests.helpers.data_files import conversation, data_config, photo, sentencepiece_tokenizer

REASONS = {value for name, value in vars(RecordFault).items() if name.isupper()}
HOSTILE_NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "a/../../../etc/shadow",
    "..",
    ".",
    "",
    "/",
    "~/x.jpg",
    "..\\..\\windows",
    "C:\\x.jpg",
    "nul\0byte.jpg",
    "\ud800.jpg",
    "x" * 5000,
    "a/" * 2000,
    "good.jpg/more.jpg",
    "folder",
    "file://etc/passwd",
    "s3://bucket/x.jpg",
    "good.jpg\n",
    "🙂.jpg",
    "%2e%2e/x.jpg",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(sentencepiece_tokenizer(folder / "tokenizer"))


@pytest.fixture(scope="module")
def pictures(folder):
    """Names of pictures that are whole, cut off, or changed at random; all below folder / "images"."""
    rng, images = random.Random(3), folder / "images"
    (images / "folder").mkdir(parents=True)
    originals = []
    for kind in ("jpg", "png", "gif", "webp", "bmp", "tiff"):
        photo(images / f"good.{kind}", 40, 32)
        originals.append((images / f"good.{kind}").read_bytes())
    names = []
    for number in range(400):
        content = bytearray(rng.choice(originals))
        if rng.random() < 0.4:
            content = content[: rng.randrange(len(content))]
        for _ in range(rng.randrange(12)):
            if content:
                # Most of what a header says stands in front.
                content[min(int(rng.expovariate(0.02)), len(content) - 1)] = rng.randrange(256)
        names.append(f"damaged_{number}.{rng.choice(['jpg', 'png', 'x'])}")
        (images / names[-1]).write_bytes(rng.choice([bytes(content)] * 9 + [rng.randbytes(300)]))
    return names


class Fuzzer:
    def __init__(self, seed, pictures):
        self.rng, self.pictures = random.Random(seed), pictures

    def scalar(self):
        rng = self.rng
        return rng.choice(
            [
                None,
                True,
                -1,
                0,
                10 ** rng.randrange(1, 300),
                1e308,
                float("nan"),
                float("inf"),
                "",
                "\0",
                "\ud83d",
                [],
                {},
            ]
        )

    def anything(self, depth=0):
        rng = self.rng
        if depth > 4 or rng.random() < 0.5:
            return self.scalar()
        if rng.random() < 0.5:
            return [self.anything(depth + 1) for _ in range(rng.randrange(4))]
        keys = ["id", "image", "conversations", "from", "value", "", "\udc00"]
        return {rng.choice(keys): self.anything(depth + 1) for _ in range(rng.randrange(4))}

    def deep(self):
        depth = self.rng.choice([50, 500, 900, 5000])
        value = self.rng.choice(["x", 1])
        for _ in range(depth):
            value = [value] if self.rng.random() < 0.5 else {"value": value}
        return value

    def text(self):
        rng = self.rng
        pieces = ["<image>", "<video>", "</s>", "<s>", "\0", "\ud800", "\u2028", "é", "🙂", " ", "\n", "USER:", "a dog"]
        pieces += ["<unk>", "▁", "\r\n", "\ufeff", "‮", "<|im_end|>", "{}", "\\", '"']
        return "".join(rng.choices(pieces, k=rng.choice([0, 1, 2, 5, 20])))

    def name(self):
        rng = self.rng
        return rng.choice([rng.choice(HOSTILE_NAMES), rng.choice(self.pictures), "good.jpg", "none.jpg"])

    def names(self):
        rng = self.rng
        kinds = [self.name, self.scalar, lambda: [self.name() for _ in range(rng.randrange(4))]]
        kinds += [lambda: [self.scalar(), self.name()], lambda: {self.name(): 1}]
        return rng.choice(kinds)()

    def messages(self):
        rng = self.rng
        good = conversation("<image>\nwhat?", "a dog", "and?", "a cat")[: rng.choice([1, 2, 2, 2, 3, 4])]
        for message in good:
            if rng.random() < 0.3:
                message["value"] = rng.choice([self.text, self.scalar])()
            if rng.random() < 0.1:
                message["from"] = rng.choice(["gpt", "human", "system", None, 7, ["human"], self.deep()])
            if rng.random() < 0.05:
                del message[rng.choice(["from", "value"])]
        if rng.random() < 0.1:
            good.insert(rng.randrange(len(good) + 1), self.anything())
        return good

    def record(self):
        rng = self.rng
        kind = rng.random()
        if kind < 0.05:
            return self.anything()
        if kind < 0.06:
            return self.deep()
        record = {"id": rng.choice([1, "a", "x" * 3000]), "image": "good.jpg", "conversations": self.messages()}
        if rng.random() < 0.5:
            record[rng.choice(["image", "video"])] = self.names()
        if rng.random() < 0.15:
            record[rng.choice(["id", "image", "conversations", "video"])] = rng.choice([self.anything, self.deep])()
        if rng.random() < 0.1:
            record.pop(rng.choice(list(record)))
        if rng.random() < 0.01:
            record["conversations"] = conversation("<image>" + self.text() * 2000, "x " * rng.randrange(20_000))
        return record

    def written(self):
        """A record as JSON; deeper than json writes is spelled out."""
        record = self.record()
        try:
            text = json.dumps(record)
        except RecursionError:
            text = '{"id": ' + "[" * 3000 + "]" * 3000 + "}"
        if self.rng.random() < 0.01:
            text = text.replace("1", "1" * 5000)
        if self.rng.random() < 0.02:
            text = text.replace('"image":', '"image": 3, "image":')
        return text


def built(folder, tokenizer, monkeypatch, data, **overrides):
    monkeypatch.setattr(index_build, "load_tokenizer", lambda *_: tokenizer)
    config = data_config(folder / "images", data, tokenizer.folder, max_bad_sample_rate=1.0, **overrides)
    summary = build_index(config, str(data) + ".index", check=False)
    return summary, open_index(str(data) + ".index")


def check_all_counted(summary, index, data, records):
    assert summary.records == records
    assert summary.kept + summary.dropped_samples == records
    assert set(summary.dropped) <= REASONS
    with open(f"{data}.index/faults.jsonl", encoding="utf-8") as file:
        faults = [json.loads(line) for line in file]
    assert len(faults) == summary.dropped_samples
    assert all(len(fault["detail"]) < 1000 and len(fault["id"]) < 1000 for fault in faults)
    found = [index[number] for number in range(len(index))]
    assert sorted([fault["record"] for fault in faults] + [sample.record for sample in found]) == list(range(records))
    for sample in found:
        assert 0 < sample.supervised_tokens < sample.length <= 192
        assert all(image.width > 0 and image.height > 0 and ".." not in image.name for image in sample.images)
    return faults


@pytest.mark.parametrize("version", ["v1", "plain"])
def test_fuzzed_records(folder, tokenizer, pictures, monkeypatch, version):
    """Ten thousand over the two templates."""
    fuzzer, count = Fuzzer(version, pictures), 5000
    data = folder / f"{version}.jsonl"
    data.write_text("\n".join(fuzzer.written() for _ in range(count)) + "\n", encoding="utf-8")
    summary, index = built(folder, tokenizer, monkeypatch, data, version=version)
    faults = check_all_counted(summary, index, data, count)
    # The fuzz reaches every reason, and lets some through.
    assert summary.kept > count / 20
    assert set(summary.dropped) == REASONS
    unsafe = [fault["detail"] for fault in faults if fault["reason"] == RecordFault.UNSAFE_PATH]
    assert any("../../etc/passwd" in detail for detail in unsafe)
    assert not any("root:" in json.dumps(fault) for fault in faults)


@pytest.mark.parametrize("name", ["cut.json", "cut.jsonl"])
def test_files_cut_or_changed_anywhere_give_one_error_or_their_records(folder, tokenizer, pictures, monkeypatch, name):
    fuzzer, rng = Fuzzer(5, pictures), random.Random(5)
    texts = [fuzzer.written() for _ in range(12)]
    whole = ("\n".join(texts) if name.endswith("l") else "[" + ", ".join(texts) + "]").encode()
    refusals = []
    for number in range(60):
        content = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randrange(1, 4) if content else 0):
            content[rng.randrange(len(content))] = rng.choice([*b'"\\{}[],\n', 0, 0xFF, 0xC3])
        data = folder / f"{number}_{name}"
        data.write_bytes(content)
        try:
            summary, index = built(folder, tokenizer, monkeypatch, data)
        except UserError as error:
            refusals.append((str(data), str(error)))
            continue
        check_all_counted(summary, index, data, summary.records)
    assert len(refusals) > 20
    assert all(data in words for data, words in refusals)


def test_enormous_texts(folder, tokenizer, pictures, monkeypatch):
    """Without a space, of one letter, of marks, of images that are all the same; megabytes are refused."""
    good = {"image": "good.jpg", "conversations": conversation("<image>", "a dog")}
    texts = ["x" * 500_000, "the fox " * 50_000, "🙂" * 50_000, "<image>" * 300_000, "</s>" * 50_000, "y" * 4_000_000]
    records = [{**good, "conversations": conversation("<image>", text)} for text in texts]
    records += [{**good, "conversations": conversation("<image>" + text, "a dog")} for text in texts]
    records.append({"image": ["good.jpg"] * 50_000, "conversations": conversation("<image>" * 50_000, "a dog")})
    records.append(good)
    data = folder / "enormous.json"
    data.write_text(json.dumps(records), encoding="utf-8")
    summary, index = built(folder, tokenizer, monkeypatch, data)
    faults = check_all_counted(summary, index, data, len(records))
    assert [fault["record"] for fault in faults if "a text of 4000" in fault["detail"]] == [5, 11]
    assert index[len(index) - 1].identifier == str(len(records) - 1)
