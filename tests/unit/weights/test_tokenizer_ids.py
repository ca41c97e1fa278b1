"""Which ids the files of a tokenizer use, and which one is left for a picture."""

from __future__ import annotations

import json

import pytest

from dc_megatron.errors import UserError
from dc_megatron.weights.tokenizer_ids import image_token_id, tokenizer_ids


def test_tokenizer_json_and_what_was_added(tmp_path):
    content = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "<s>", "id": 2}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": 5}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"4": {"content": "<pad>"}}}))
    ids = tokenizer_ids(str(tmp_path))
    assert ids == {"a": 0, "b": 1, "<s>": 2, "<pad>": 4, "<image>": 5}
    assert image_token_id(ids, 3) == 5


def test_a_unigram_tokenizer_and_a_vocabulary_file(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"x": 0, "y": 1}))
    assert tokenizer_ids(str(tmp_path)) == {"x": 0, "y": 1}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["u", -1.0], ["v", -2.0], ["w", -3]]}}))
    assert tokenizer_ids(str(tmp_path)) == {"u": 0, "v": 1, "w": 2}


def test_sentencepiece(tmp_path):
    """A model made by the library itself: its size, and whatever lies behind the pieces."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the {number} words of a small text" for number in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=60, model_type="bpe", minloglevel=2
    )
    (tmp_path / "tokenizer.vocab").unlink()
    ids = tokenizer_ids(str(tmp_path))
    assert len(ids) == 60
    assert image_token_id(ids, 60) == 60
    whole = (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole[: len(whole) - 3])
    with pytest.raises(UserError, match="no sentencepiece model"):
        tokenizer_ids(str(tmp_path))


def test_no_tokenizer(tmp_path):
    assert tokenizer_ids(str(tmp_path)) is None
    assert image_token_id({}, 256) == 256


def test_a_reserved_token_before_a_new_row():
    """As Llama 3's vocabulary, in which every row has a token; the last one, since models start with the first."""
    ids = {f"w{number}": number for number in range(10)}
    reserved = {f"<|reserved_special_token_{number}|>": 10 + number for number in range(4)}
    assert image_token_id(ids, 10) == 10
    assert image_token_id(ids, 16) == 10
    assert image_token_id(ids | reserved, 14) == 13
    assert image_token_id(ids | reserved, 12) == 11
