"""AutoProcessor of the files written gives the ids, positions and pixels of training."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from dc_megatron.config import ConnectorConfig, image_tiling, image_tokens
from dc_megatron.data.conversation import render
from dc_megatron.data.hf_processor import image_token, stop_ids, write_processor
from dc_megatron.data.image_reference import preprocess, tiles_of
from dc_megatron.data.picture import Picture
from dc_megatron.data.tokenization import IMAGE_ID, encode_prompt, load_tokenizer, tokenise
from dc_megatron.errors import UserError
from tests.helpers.data_files import (
    byte_level_tokenizer,
    chatml_tokenizer,
    conversation,
    llama_3_tokenizer,
    phi_tokenizer,
    photo,
    sentencepiece_tokenizer,
    vision_config,
)

SIZES = [(40, 40), (41, 67), (67, 41), (300, 17), (17, 300), (5, 3), (28, 28), (29, 28), (99, 100), (640, 479)]
ROWS = 480  # of the embedding; the byte-level tokenizers have fewer tokens, the sentencepiece ones as many

# tokenizer -> the templates that it can speak
SPEAKS = {
    "legacy": ("v1", "plain"),
    "legacy_json": ("v1", "plain"),
    "modern": ("v1", "plain"),
    "no_prefix": ("v1",),
    "legacy_chatml": ("mpt",),
    "modern_chatml": ("chatml_direct",),
    "llama_3": ("llama_3", "llama_3_chat", "plain"),
    "chatml": ("mpt", "chatml_direct", "plain"),
    "phi": ("phi", "plain"),
}
PAIRS = [(name, version) for name, versions in SPEAKS.items() for version in versions]


def with_chatml(folder: str) -> str:
    """Adds ChatML's tokens to a sentencepiece tokenizer, as Yi and Mistral derivatives have them."""
    path = os.path.join(folder, "tokenizer_config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    names = {"480": "<|im_start|>", "481": "<|im_end|>"}
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    config["added_tokens_decoder"] = {number: {"content": name, **flags} for number, name in names.items()}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    base = tmp_path_factory.mktemp("tokenizers")
    return {
        "legacy": sentencepiece_tokenizer(base / "legacy"),
        "legacy_json": sentencepiece_tokenizer(base / "legacy_json", legacy=True, model_file=False),
        "modern": sentencepiece_tokenizer(base / "modern", legacy=False),
        "no_prefix": sentencepiece_tokenizer(base / "no_prefix", dummy_prefix=False),
        "legacy_chatml": with_chatml(sentencepiece_tokenizer(base / "legacy_chatml", add_bos=False)),
        "modern_chatml": with_chatml(sentencepiece_tokenizer(base / "modern_chatml", legacy=False)),
        "llama_3": llama_3_tokenizer(base / "llama_3", reserved=3),
        "chatml": chatml_tokenizer(base / "chatml"),
        "phi": phi_tokenizer(base / "phi"),
    }


def write(folder, source, version, *, vision=None, connector="dci", aspect="pad", **options):
    """(folder, id of <image>) of an export."""
    vision = vision or vision_config()
    place = image_token(source, ROWS)
    values = {
        "tokenizer_folder": source,
        "vision": vision,
        "tokens_per_image": image_tokens(vision, ConnectorConfig(connector)),
        "version": version,
        "image_aspect_ratio": aspect,
        "image_token_id": place.token_id,
        "vocab_rows": place.rows,
        "model_max_length": 4096,
    }
    names = write_processor(str(folder), **{**values, **options})
    assert sorted(names) == sorted(os.listdir(folder))
    return str(folder), place.token_id


@pytest.fixture(scope="module")
def exported(sources, tmp_path_factory):
    """(tokenizer, version) -> (processor, id of <image>, the tokenizer of training)."""
    base, made = tmp_path_factory.mktemp("exports"), {}

    def get(name, version):
        if (name, version) not in made:
            folder, number = write(base / f"{name}-{version}", sources[name], version)
            made[name, version] = AutoProcessor.from_pretrained(folder), number, load_tokenizer(sources[name], version)
        return made[name, version]

    return get


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    base = tmp_path_factory.mktemp("pictures")
    return [photo(base / f"{n}.png", *size, seed=n) for n, size in enumerate(SIZES)]


def ask(question, images=0):
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": question}]}]


def training_ids(tokenizer, version, question, images, tokens, image_id):
    ids, mask = encode_prompt(tokenizer, version, question, [tokens] * images)
    return [image_id if is_image else token for token, is_image in zip(ids, mask, strict=True)]


@pytest.mark.parametrize(("name", "version"), PAIRS)
@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("question", ["What is in the picture?", " the\n  top\t12 é☃ 你好 ", "USER: ▁x</s>"])
def test_ids_of_a_question(exported, pictures, name, version, images, question):
    processor, image_id, tokenizer = exported(name, version)
    opened = [Image.open(path) for path in pictures[:images]] or None
    text = processor.apply_chat_template(ask(question, images), add_generation_prompt=True)
    got = processor(text=text, images=opened)["input_ids"][0]
    assert got == training_ids(tokenizer, version, question, images, 4, image_id)
    if tokenizer.adds_bos:
        assert got[0] == tokenizer.bos_id
        assert got.count(tokenizer.bos_id) == 1


@pytest.mark.parametrize(("name", "version"), PAIRS)
def test_ids_in_one_step_and_of_a_conversation(exported, pictures, name, version):
    processor, image_id, tokenizer = exported(name, version)
    chat = ask("Where is it?", 1)
    chat[0]["content"][0]["image"] = Image.open(pictures[1])
    got = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert got["input_ids"][0] == training_ids(tokenizer, version, "Where is it?", 1, 4, image_id)
    turns = ["<image>\nWhere is it?", "at the top", "And the circle?", " at the bottom "]
    chat = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    count = 2 if version == "plain" else 4
    text = processor.apply_chat_template(chat[:count])
    got = processor(text=text, images=[Image.open(pictures[1])])["input_ids"][0]
    picture = Picture("a", 40, 40, tokens=4)
    sample = tokenise(tokenizer, render(version, conversation(*turns[:count])), [picture], model_max_length=4096)
    ids = np.where(sample.input_ids == IMAGE_ID, image_id, sample.input_ids)
    assert got == np.repeat(ids, np.where(sample.input_ids == IMAGE_ID, 4, 1)).tolist()


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("image_size", [28, 35, 56])
def test_pixels_are_the_references_to_the_bit(sources, pictures, tmp_path, family, aspect, image_size):
    vision = vision_config(family, image_size)
    folder, _ = write(tmp_path, sources["legacy"], "v1", vision=vision, aspect=aspect)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    expected = np.stack([preprocess(path, vision, aspect) for path in pictures])
    opened = [Image.open(path) for path in pictures]
    got = processor(text=["<image>"] * len(opened), images=opened, return_tensors="np", padding=True)["pixel_values"]
    assert got.dtype == np.float32
    assert (got == expected).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_pictures_of_other_modes(sources, tmp_path, mode):
    folder, _ = write(tmp_path / "out", sources["legacy"], "v1")
    path = photo(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), 50, 33, mode=mode)
    got = AutoProcessor.from_pretrained(folder, backend="pil").image_processor(Image.open(path), return_tensors="np")
    assert (got["pixel_values"][0] == preprocess(path, vision_config(), "pad")).all()


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_torchvision_is_two_steps_of_a_byte_away_at_most(sources, pictures, tmp_path, family, aspect):
    pytest.importorskip("torchvision")
    vision = vision_config(family, 56)
    folder, _ = write(tmp_path, sources["legacy"], "v1", vision=vision, aspect=aspect)
    processor = AutoProcessor.from_pretrained(folder)
    for path in pictures:
        got = processor.image_processor(Image.open(path), return_tensors="np")["pixel_values"][0]
        step = 1 / 255 / np.array(vision.image_std, dtype=np.float32)[:, None, None]
        assert (np.abs(got - preprocess(path, vision, aspect)) <= 2.01 * step).all()


@pytest.mark.parametrize(
    ("family", "image_size", "connector", "count"),
    [
        ("clip", 336, "dci", 576),
        ("clip", 336, "sti", 720),
        ("clip", 35, "none", 4),
        ("siglip", 384, "sci", 729),
        ("siglip", 384, "sti", 911),
    ],
)
@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_an_image_takes_its_positions(sources, pictures, tmp_path, family, image_size, connector, count, aspect):
    vision = vision_config(family, image_size)
    folder, image_id = write(tmp_path, sources["llama_3"], "llama_3", vision=vision, connector=connector, aspect=aspect)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "LlavaProcessor"
    got = processor(text="<image> and <image>", images=[Image.open(p) for p in pictures[3:5]])["input_ids"][0]
    assert got.count(image_id) == 2 * count
    # Servers ask for the number without an image at hand.
    assert processor._get_num_multimodal_tokens([(40, 40)])["num_image_tokens"] == [count]


@pytest.mark.parametrize(("name", "version"), [("legacy", "v1"), ("llama_3", "llama_3"), ("chatml", "mpt")])
def test_a_batch_is_padded_on_the_left_and_masked(exported, pictures, name, version):
    processor, image_id, tokenizer = exported(name, version)
    questions = [("Where?", 1), ("What is in the picture, at the bottom of it?", 0)]
    texts = [processor.apply_chat_template(ask(*q), add_generation_prompt=True) for q in questions]
    batch = processor(text=texts, images=[Image.open(pictures[0])], padding=True, return_tensors="pt")
    for row, (question, images) in enumerate(questions):
        expected = training_ids(tokenizer, version, question, images, 4, image_id)
        keep = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][keep].tolist() == expected
        assert keep.tolist() == sorted(keep.tolist()), "padding comes first"
    assert not batch["attention_mask"].all()
    assert (batch["input_ids"][~batch["attention_mask"].bool()] == processor.tokenizer.pad_token_id).all()
    assert processor.tokenizer.pad_token_id < ROWS


def test_a_padding_token_without_a_row_is_not_used(tmp_path):
    """As Llama 3 folders have it whose pad token was added and whose embedding was not resized."""
    source = llama_3_tokenizer(tmp_path / "in", reserved=1)
    rows = len(load_tokenizer(source).hugging_face.get_vocab())
    with open(os.path.join(source, "tokenizer_config.json"), encoding="utf-8") as file:
        config = json.load(file)
    with open(os.path.join(source, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump({**config, "pad_token": "[PAD]"}, file)
    place = image_token(source, rows)
    assert place.rows == rows
    folder, _ = write(tmp_path / "out", source, "llama_3", image_token_id=place.token_id, vocab_rows=rows)
    assert AutoProcessor.from_pretrained(folder).tokenizer.pad_token == "<|eot_id|>"
    folder, _ = write(tmp_path / "larger", source, "llama_3", image_token_id=place.token_id, vocab_rows=rows + 1)
    assert AutoProcessor.from_pretrained(folder).tokenizer.pad_token == "[PAD]"


@pytest.mark.parametrize(("name", "version"), PAIRS)
def test_answers_are_decoded_as_in_training(exported, name, version):
    processor, _, tokenizer = exported(name, version)
    for text in ["A red circle.", " at the top,  2 of é☃", "a\nb"]:
        ids = tokenizer.encode(text)[0]
        assert processor.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


@pytest.mark.parametrize(("name", "version"), [("legacy", "v1"), ("modern", "v1"), ("chatml", "mpt")])
def test_the_tokenizer_written_can_be_trained_with_again(sources, tmp_path, name, version):
    folder, _ = write(tmp_path, sources[name], version)
    before, after = load_tokenizer(sources[name], version), load_tokenizer(folder, version)
    assert before.adds_bos == after.adds_bos
    for question in ["What?", "  two\n "]:
        assert encode_prompt(before, version, question, []) == encode_prompt(after, version, question, [])


def test_a_reserved_token_a_spare_row_or_a_new_row_is_taken(sources, tmp_path):
    vocabulary = load_tokenizer(sources["llama_3"]).hugging_face.get_vocab()
    reserved = vocabulary["<|reserved_special_token_2|>"]
    assert image_token(sources["llama_3"], ROWS).token_id == reserved
    assert image_token(sources["llama_3"], ROWS).rows == ROWS
    # A byte-level tokenizer with fewer tokens than the embedding has rows.
    spare = image_token(sources["chatml"], ROWS)
    assert spare.token_id == max(load_tokenizer(sources["chatml"]).hugging_face.get_vocab().values()) + 1 < ROWS
    assert spare.rows == ROWS
    assert image_token(sources["legacy"], ROWS).token_id == ROWS
    assert image_token(sources["legacy"], ROWS).rows == ROWS + 1
    # Once written, it is found again.
    folder, number = write(tmp_path, sources["llama_3"], "llama_3")
    assert number == reserved == image_token(folder, ROWS).token_id
    tokens = AutoTokenizer.from_pretrained(folder).get_vocab()
    assert tokens["<image>"] == reserved
    assert "<|reserved_special_token_2|>" not in tokens
    assert len(tokens) == len(vocabulary)


@pytest.mark.parametrize(
    ("name", "number", "rows", "message"),
    [
        ("legacy", 480, 480, "the embedding has 480 rows"),
        ("legacy", 100, 480, "use a reserved token's id"),
        ("legacy", 490, 500, "tokens of .* end at 479"),
        ("llama_3", 0, 480, "begin_of_text"),
    ],
)
def test_an_id_that_cannot_be_had_is_refused(sources, tmp_path, name, number, rows, message):
    version = SPEAKS[name][0]
    with pytest.raises(UserError, match=message):
        write(tmp_path, sources[name], version, image_token_id=number, vocab_rows=rows)


def test_an_image_token_that_is_there_keeps_its_id(tmp_path):
    source = byte_level_tokenizer(tmp_path / "in", bos="<s>", eos="<|im_end|>", special=["<|im_start|>", "<image>"])
    assert image_token(source, ROWS).token_id == 3
    write(tmp_path / "out", source, "mpt")
    with pytest.raises(UserError, match="has <image> at 3"):
        write(tmp_path / "other", source, "mpt", image_token_id=470)


def test_an_aspect_ratio_that_no_processor_has_is_refused(sources, tmp_path):
    with pytest.raises(UserError, match="--image_aspect_ratio crop: unknown"):
        write(tmp_path / "out", sources["legacy"], "v1", aspect="crop")


def test_a_tokenizer_that_stock_files_cannot_say_is_refused(tmp_path):
    """A sentencepiece model that rewrites characters: training obeyed it, tokenizer.json as written does not."""
    import sentencepiece

    source = sentencepiece_tokenizer(tmp_path / "in")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox\n" * 50, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=os.path.join(source, "tokenizer"),
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    os.remove(os.path.join(source, "tokenizer.vocab"))
    with pytest.raises(UserError, match="would give other ids than in training"):
        write(tmp_path / "out", source, "v1")


@pytest.mark.parametrize(("name", "version"), PAIRS)
def test_generation_stops_where_ours_does_and_never_says_an_image(sources, tmp_path, name, version):
    folder, number = write(tmp_path, sources[name], version)
    with open(os.path.join(folder, "generation_config.json"), encoding="utf-8") as file:
        config = json.load(file)
    tokenizer = load_tokenizer(sources[name], version)
    assert config["eos_token_id"] == stop_ids(tokenizer, version)
    assert tokenizer.eos_id in config["eos_token_id"]
    assert config["suppress_tokens"] == [number]
    assert config["pad_token_id"] == AutoTokenizer.from_pretrained(folder).pad_token_id


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_any_resolution_gives_a_llava_next_processor_whose_counts_the_model_takes(sources, pictures, tmp_path, family):
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    vision = vision_config(family, 28)
    grid = [(28, 56), (56, 28), (56, 56)]
    folder, image_id = write(tmp_path, sources["legacy"], "v1", vision=vision, next=grid)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    assert type(processor).__name__ == "LlavaNextProcessor"
    pinpoints = [(width, height) for height, width in grid]
    tiling = image_tiling(vision, ConnectorConfig("dci"), pinpoints, "spatial_unpad")
    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 481}
    tower = {"model_type": f"{family}_vision_model", "hidden_size": 16, "intermediate_size": 16, "image_size": 28}
    tower |= {"num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=tower,
            text_config=text,
            image_token_index=image_id,
            image_grid_pinpoints=[list(pair) for pair in grid],
            vision_feature_select_strategy="default" if family == "clip" else "full",
            vision_feature_layer=-1,
        )
    )
    for path in pictures:
        opened = Image.open(path)
        inputs = processor(text="<image>\nWhat?", images=opened, return_tensors="pt")
        shape = tiling.of(*opened.size)
        assert (inputs["input_ids"] == image_id).sum() == shape.tokens
        expected = tiles_of(opened, vision, tiling, range(shape.tiles))
        assert (inputs["pixel_values"][0].numpy() == expected).all()
        with torch.no_grad():
            assert torch.isfinite(model(**inputs).logits).all()
    with pytest.raises(UserError, match="sti cannot be exported with AnyRes"):
        write(tmp_path / "sti", sources["legacy"], "v1", vision=vision_config(family, 56), connector="sti", next=grid)
