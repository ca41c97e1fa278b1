"""Ids against sentencepiece and label masks against the original's procedure, on tiny trained tokenizers."""

import json
import os
import random

import numpy as np
import pytest
import sentencepiece

from dc_megatron.data.conversation import render, render_prompt
from dc_megatron.data.tokenization import IGNORE, IMAGE_ID, encode_prompt, load_tokenizer, tokenise
from dc_megatron.errors import UserError
from tests.helpers.data_files import (
    chatml_tokenizer,
    conversation,
    llama_3_tokenizer,
    phi_tokenizer,
    picture,
    sentencepiece_tokenizer,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("tokenizers")
    return {
        "legacy": sentencepiece_tokenizer(base / "legacy"),
        "legacy_json": sentencepiece_tokenizer(base / "legacy_json", legacy=True, model_file=False),
        "modern": sentencepiece_tokenizer(base / "modern", legacy=False),
        "no_prefix": sentencepiece_tokenizer(base / "no_prefix", dummy_prefix=False),
        "llama_3": llama_3_tokenizer(base / "llama_3"),
        "chatml": chatml_tokenizer(base / "chatml"),
        "phi": phi_tokenizer(base / "phi"),
    }


@pytest.fixture(scope="module")
def load(folders):
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = load_tokenizer(folders[name])
        return loaded[name]

    return get


def sample_of(tokenizer, version, messages, *, tokens_per_image=3, limit=10_000):
    rendered = render(version, messages)
    images = tuple(picture(f"{n}.jpg", tokens_per_image) for n in range(rendered.image_count))
    return tokenise(tokenizer, rendered, images, model_max_length=limit)


def names(sample):
    return [image.name for image in sample.images]


def target_text(tokenizer, sample):
    ids = sample.labels[sample.labels != IGNORE]
    return tokenizer.decode(ids, skip_special_tokens=False)


def pieces_by_sentencepiece(model, text):
    """The definition: sentencepiece on every stretch between special tokens."""
    ids = []
    for number, stretch in enumerate(text.split("</s>")):
        if number:
            ids.append(2)
        ids += model.encode(stretch)
    return ids


TEXTS = [
    "hello world",
    " starts with a space",
    "  with two",
    "\nafter an image",
    " ",
    "\n",
    "a</s>USER: b</s> c</s>",
    "é☃ 你好 b",
    "▁literal",
    "tabs\tand  runs   of spaces ",
]


@pytest.mark.parametrize("name", ["legacy", "legacy_json", "no_prefix"])
def test_legacy_llama_ids_are_sentencepieces(folders, load, name):
    source = folders["no_prefix" if name == "no_prefix" else "legacy"]
    model = sentencepiece.SentencePieceProcessor(model_file=os.path.join(source, "tokenizer.model"))
    generator = random.Random(0)
    alphabet = ["the ", " ", "as", "sist", "\n", "é", "USER:", "</s>", "x", "12", ". "]
    random_texts = ["".join(generator.choices(alphabet, k=12)) for _ in range(200)]
    for text in TEXTS + random_texts:
        assert load(name).encode(text)[0] == pieces_by_sentencepiece(model, text), repr(text)


def test_non_legacy_llama_prefixes_the_first_stretch_only(load):
    pieces = load("modern").hugging_face.convert_ids_to_tokens
    assert pieces(load("modern").encode("a</s>USER")[0]) == ["▁a", "</s>", "US", "ER"]
    assert pieces(load("legacy").encode("a</s>USER")[0]) == ["▁a", "</s>", "▁USER"]
    assert pieces(load("modern").encode(" the")[0]) == ["▁", "▁the"]


@pytest.mark.parametrize("name", ["legacy", "legacy_json", "modern", "llama_3", "chatml"])
def test_offsets_point_at_the_characters(load, name):
    for text in TEXTS:
        ids, offsets = load(name).encode(text)
        assert len(ids) == len(offsets)
        covered = sorted({position for start, end in offsets for position in range(start, end)})
        assert covered == list(range(len(text))), (text, offsets)


def original_v1(tokenizer, text):
    """Label mask by the original's rule: lengths of re-tokenised rounds, BOS counted for </s>, minus two."""

    def ids(chunk):
        out = [tokenizer.bos_id]
        for number, stretch in enumerate(chunk.split("<image>")):
            out += [IMAGE_ID] * (number > 0) + tokenizer.encode(stretch)[0]
        return out

    supervised = [True] * len(ids(text))
    position = 1
    supervised[0] = False
    for turn in text.split("</s>"):
        if not turn:
            break
        instruction = turn.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        length = len(ids(instruction)) - 2
        supervised[position : position + length] = [False] * length
        position += len(ids(turn))
    assert position == len(supervised), "the original would mask this sample"
    return supervised


@pytest.mark.parametrize("name", ["legacy", "legacy_json"])
@pytest.mark.parametrize(
    "messages",
    [
        conversation("What is in the picture?", "A red circle."),
        conversation("<image>\nWhere is the square?", "It is at the bottom.", "And the circle?", "the top", "?", "12"),
        conversation("What?\n<image>", "\nstarts with a new line", "é☃?", "☃ 你好"),
        conversation("<image>", " starts with a space"),
    ],
)
def test_v1_masks_equal_the_originals(load, name, messages):
    tokenizer = load(name)
    sample = sample_of(tokenizer, "v1", messages)
    assert [label != IGNORE for label in sample.labels] == original_v1(tokenizer, render("v1", messages).text)
    # What is supervised is the id itself.
    assert (sample.labels[sample.labels != IGNORE] == sample.input_ids[sample.labels != IGNORE]).all()


def test_v1_non_legacy(load):
    messages = conversation("<image>\nWhat?", "A red circle.", "Where?", "top left")
    assert target_text(load("modern"), sample_of(load("modern"), "v1", messages)) == "A red circle.</s> top left</s>"


def test_plain_masks_only_bos_and_image(load):
    sample = sample_of(load("legacy"), "plain", conversation("<image>\nDescribe.", "a red circle"))
    assert sample.input_ids[:2].tolist() == [1, IMAGE_ID]
    assert (sample.labels[:2] == IGNORE).all()
    assert (sample.labels[2:] == sample.input_ids[2:]).all()
    assert target_text(load("legacy"), sample) == "a red circle\n"


@pytest.mark.parametrize("name", ["legacy", "legacy_json", "llama_3"])
def test_characters_of_several_tokens_are_targets_as_a_whole(load, name):
    sample = sample_of(load(name), "plain", conversation("<image>", "☃é"))
    assert (sample.labels[2:] == sample.input_ids[2:]).all()
    assert target_text(load(name), sample) == "☃é\n"


@pytest.mark.parametrize(
    ("version", "name", "expected"),
    [
        ("llama_3", "llama_3", "A dog.<|eot_id|>It is brown.<|eot_id|>"),
        ("llama_3_chat", "llama_3", "A dog.<|eot_id|>It is brown.<|eot_id|>"),
        ("mpt", "chatml", "A dog.<|im_end|>It is brown.<|im_end|>"),
        ("chatml_direct", "chatml", "A dog.<|im_end|>It is brown.<|im_end|>"),
        # The space in front belongs to the first word's token.
        ("phi", "phi", " A dog.<|endoftext|> It is brown.<|endoftext|>"),
    ],
)
def test_targets_of_the_other_templates(load, version, name, expected):
    messages = conversation("What is it?\n<image>", "A dog.", "Colour?", "It is brown.")
    assert target_text(load(name), sample_of(load(name), version, messages)) == expected


def test_bos_is_there_once_or_not_at_all(load):
    messages = conversation("What is it?", "A dog.")
    for version in ("llama_3", "plain", "v1"):
        sample = sample_of(load("llama_3"), version, messages)
        assert (sample.input_ids == load("llama_3").bos_id).sum() == 1
        assert sample.input_ids[0] == load("llama_3").bos_id
    assert (sample_of(load("chatml"), "mpt", messages).input_ids == load("chatml").bos_id).sum() == 0
    # Phi's begins and ends texts with one token: here it only ends the answer.
    assert sample_of(load("phi"), "phi", messages).input_ids.tolist().count(load("phi").bos_id) == 1
    assert sample_of(load("phi"), "phi", messages).input_ids[-1] == load("phi").eos_id


@pytest.mark.parametrize("model_file", [True, False])
@pytest.mark.parametrize(("flag", "expected"), [(True, True), (False, False), (None, True)])
def test_a_llama_folder_decides_about_bos(tmp_path, model_file, flag, expected):
    """An absent flag means BOS, as the original loads it; transformers 5.17 says no where it has tokenizer.model."""
    written_with = True if flag is None and not model_file else flag
    folder = sentencepiece_tokenizer(tmp_path, add_bos=written_with, model_file=model_file)
    if flag is None:
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config.pop("add_bos_token", None)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.adds_bos is expected
    sample = sample_of(tokenizer, "v1", conversation("a", "b"))
    assert (sample.input_ids == tokenizer.bos_id).sum() == expected


def test_truncation_counts_expanded_positions(load):
    messages = conversation("<image> or <image>?", "A dog, I think.")
    whole = sample_of(load("legacy"), "v1", messages, tokens_per_image=5)
    first, second = np.flatnonzero(whole.input_ids == IMAGE_ID)
    assert whole.length == len(whole.input_ids) + 2 * 4
    assert not whole.truncated

    def cut(limit):
        return sample_of(load("legacy"), "v1", messages, tokens_per_image=5, limit=limit)

    # An image that does not fit whole is not there at all.
    inside_first = cut(int(first) + 2)
    assert (inside_first.length, names(inside_first), len(inside_first.input_ids)) == (first, [], first)
    assert inside_first.truncated
    just_fits = cut(int(first) + 5)
    assert (just_fits.length, names(just_fits)) == (first + 5, ["0.jpg"])
    before_second = cut(int(second) + 4)
    assert (before_second.length, names(before_second)) == (second + 4, ["0.jpg"])
    assert len(before_second.input_ids) == second
    inside_second = cut(int(second) + 8)
    assert names(inside_second) == ["0.jpg"]
    assert (inside_second.length, inside_second.supervised_tokens) == (second + 4, 0)
    with_second = cut(int(second) + 9)
    assert names(with_second) == ["0.jpg", "1.jpg"]
    assert with_second.truncated
    tail = cut(whole.length - 2)
    assert tail.supervised_tokens == whole.supervised_tokens - 2
    assert cut(whole.length).length == whole.length


def test_prompts_for_inference_start_like_training(load):
    tokenizer = load("legacy")
    ids, mask = encode_prompt(tokenizer, "v1", "What is it?", [3])
    sample = sample_of(tokenizer, "v1", conversation("<image>\nWhat is it?", "A dog."))
    where = int(np.flatnonzero(sample.input_ids == IMAGE_ID)[0])
    expected = [*sample.input_ids[:where], 0, 0, 0, *sample.input_ids[where + 1 :]]
    assert ids == expected[: len(ids)]
    assert [n for n, is_image in enumerate(mask) if is_image] == [where, where + 1, where + 2]
    # Everything after the prompt is what the model learned to say.
    assert len(expected) - len(ids) == (sample.labels != IGNORE).sum()
    assert tokenizer.decode(ids[where + 3 :]).endswith(render_prompt("v1", "What is it?", 1)[-20:])


def test_missing_and_unfitting_tokenizers_are_refused(folders, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match=r"--version llama_3.*<\|eot_id\|>"):
        load_tokenizer(folders["legacy"], "llama_3")
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))
