"""Writes what plain transformers needs beside the weights of a stock Llava: tokenizer, processor, chat template.

``AutoProcessor.from_pretrained`` of the folder gives a LlavaProcessor (LlavaNextProcessor for AnyRes) without code of
ours. Its results are those of training:

- Ids. tokenizer.json holds the whole rule: legacy Llama tokenisation as the normaliser that puts a prefix in front of
  every stretch (transformers 5 rebuilds a LlamaTokenizer with another rule, so the class written is the generic
  PreTrainedTokenizerFast), ``<image>`` as a special token, BOS where training had one. What was written is loaded and
  asked before it is handed over; a difference is an error.
- Pixels. Bit-equal to image_reference.py on the PIL backend: the slow processors of transformers 4, and transformers 5
  without torchvision. Where torchvision is installed transformers 5 takes it instead, and its bicubic resizing rounds
  differently: by up to two steps of a byte, seen with torchvision 0.26. ``AutoProcessor.from_pretrained(folder,
  backend="pil")`` asks for PIL; no file can ask for it.
- BOS is left to the tokenizer for templates that do not spell it (all but Llama 3's). Servers that tokenise a rendered
  chat without special tokens (vLLM's chat endpoint) must be told to add them: ``"add_special_tokens": true``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from dc_megatron.config import VisionConfig, one_of
from dc_megatron.data.chat_templates import chat_template
from dc_megatron.data.conversation import IMAGE_MARK, render, stop_text, template
from dc_megatron.data.picture import Picture
from dc_megatron.data.tokenization import IMAGE_ID, TextTokenizer, encode_prompt, load_tokenizer, tokenise
from dc_megatron.errors import UserError

# Tokens that vocabularies keep for later: <|reserved_special_token_0|>, <|unused12|>, <reserved_106>, [unused3].
_SPARE = re.compile(r"^[<\[|]+(reserved|unused|dummy|placeholder|spare)[a-z_\- ]*\d*[>\]|]+$", re.IGNORECASE)

# Questions whose ids are compared between training's tokenisation and the files written: marks (none, in front,
# between words), spaces and new lines at their edges, digits, accents, other scripts, compatibility characters.
_PROBES = (
    ("What is in the picture?", 0),
    ("What is in the picture?", 1),
    ("  Where, then?\tHere:  two  spaces ", 0),
    ("\n1234 + 5 = ?\n\nx_y(z) <b>", 1),
    ("Compare.", 2),
    (f"{IMAGE_MARK}\nand\n {IMAGE_MARK} and{IMAGE_MARK}", 3),
    (f"{IMAGE_MARK}  {IMAGE_MARK}", 2),
    (IMAGE_MARK, 1),
    ("\u00e9\u2603 \u4f60\u597d \ufb01 \u2460 \uff21 \u2581word \u200b\U0001f642", 1),
    (" ", 0),
)


@dataclass(frozen=True)
class ImageToken:
    """Where ``<image>`` goes: its id, and the rows that the embedding must have for it."""

    token_id: int
    rows: int


def image_token(tokenizer_folder: str, vocab_rows: int) -> ImageToken:
    """The id for ``<image>`` with a tokenizer and an embedding of ``vocab_rows`` rows.

    The token's own id where the tokenizer has it; else a reserved token's; else the id behind the last token, which may
    be a row that the embedding has to spare, or a new one.
    """
    tokens = TextTokenizer(tokenizer_folder).hugging_face.get_vocab()
    if IMAGE_MARK in tokens:
        chosen = tokens[IMAGE_MARK]
    else:
        spare = [number for token, number in tokens.items() if _SPARE.match(token) and number < vocab_rows]
        # The last one: models that use reserved tokens begin with the first.
        chosen = max(spare) if spare else max(tokens.values()) + 1
    return ImageToken(chosen, max(vocab_rows, chosen + 1))


def write_processor(
    folder: str,
    *,
    tokenizer_folder: str,
    vision: VisionConfig,
    tokens_per_image: int,
    version: str,
    image_aspect_ratio: str,
    image_token_id: int,
    vocab_rows: int,
    model_max_length: int,
    next: Sequence[Sequence[int]] | None = None,
) -> list[str]:
    """Write the files into ``folder`` (made if absent) and return their names.

    tokenizer_folder: the tokenizer of training. tokens_per_image: positions of one picture (of one tile for AnyRes).
    version: the template of training. image_token_id: the row of ``<image>`` (see ``image_token``). vocab_rows: rows of
    the exported embedding. next: AnyRes grid as (height, width) pairs; image_aspect_ratio then does not count.
    Raises UserError where the files cannot say what training did.
    """
    source = load_tokenizer(tokenizer_folder, version)
    os.makedirs(folder, exist_ok=True)
    _write_tokenizer(folder, source, version, image_token_id, vocab_rows, model_max_length)
    _write_json(folder, "preprocessor_config.json", _image_processor(vision, image_aspect_ratio, next))
    _write_json(folder, "processor_config.json", _processor(vision, tokens_per_image, next))
    _write_json(folder, "generation_config.json", _generation(source, folder, version, image_token_id))
    names = ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"]
    names += ["generation_config.json", "chat_template.jinja"]
    model_file = os.path.join(tokenizer_folder, "tokenizer.model")
    if os.path.isfile(model_file):
        shutil.copyfile(model_file, os.path.join(folder, "tokenizer.model"))
        names.append("tokenizer.model")
    _write_chat_template(folder, source, version, image_token_id)
    return names


def stop_ids(tokenizer: TextTokenizer, version: str) -> list[int]:
    """Ids that end an answer: the template's end, and the tokenizer's EOS."""
    end = stop_text(version)
    special = tokenizer.special_id(end)
    ids = [special if special is not None else tokenizer.encode("a" + end)[0][-1]]
    return ids + [tokenizer.eos_id] * (tokenizer.eos_id is not None and tokenizer.eos_id not in ids)


def _write_tokenizer(
    folder: str, source: TextTokenizer, version: str, image_token_id: int, vocab_rows: int, model_max_length: int
) -> None:
    from tokenizers import Tokenizer, processors

    content = json.loads(source.hugging_face.backend_tokenizer.to_str())
    _insert_image_token(content, image_token_id, vocab_rows, source.folder)
    if source.is_legacy:
        _say_legacy_rule(content, _has_prefix(source))
    backend = Tokenizer.from_str(json.dumps(content))
    backend.no_padding()
    backend.no_truncation()
    bos = source.hugging_face.bos_token
    adds_bos = _adds_bos(source, version)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0" if adds_bos else "$A:0",
        pair=f"{bos}:0 $A:0 $B:1" if adds_bos else "$A:0 $B:1",
        special_tokens=[(bos, source.bos_id)] if adds_bos else [],
    )
    if backend.token_to_id(IMAGE_MARK) != image_token_id:
        raise UserError(
            f"image token id {image_token_id}: the tokenizer in {source.folder} would give {IMAGE_MARK} the id"
            f" {backend.token_to_id(IMAGE_MARK)}; use that"
        )
    backend.save(os.path.join(folder, "tokenizer.json"))
    _write_json(folder, "tokenizer_config.json", _tokenizer_config(source, adds_bos, vocab_rows, model_max_length))


def _insert_image_token(content: dict, image_token_id: int, vocab_rows: int, folder: str) -> None:
    """Put ``<image>`` at ``image_token_id`` of a parsed tokenizer.json, or say why it cannot stand there."""
    what = f"image token id {image_token_id}"
    if not 0 <= image_token_id < vocab_rows:
        raise UserError(f"{what}: the embedding has {vocab_rows} rows; give {IMAGE_MARK} a row")
    vocabulary, added = content["model"]["vocab"], content["added_tokens"]
    if not isinstance(vocabulary, dict):
        raise UserError(f"{what}: the tokenizer in {folder} is no BPE; other kinds are not available")
    ids = {**vocabulary, **{token["content"]: token["id"] for token in added}}
    if ids.get(IMAGE_MARK, image_token_id) != image_token_id:
        raise UserError(f"{what}: the tokenizer in {folder} has {IMAGE_MARK} at {ids[IMAGE_MARK]}; use that id")
    holder = next((token for token, number in ids.items() if number == image_token_id), None)
    if holder is None and image_token_id != max(ids.values()) + 1:
        raise UserError(
            f"{what}: the tokens of {folder} end at {max(ids.values())}; use the id behind that, or a reserved token's"
        )
    if holder not in (None, IMAGE_MARK) and not _SPARE.match(holder):
        raise UserError(
            f"{what}: that is {holder!r} in the tokenizer of {folder}; use a reserved token's id, or a new one"
        )
    if holder in vocabulary:
        vocabulary[IMAGE_MARK] = vocabulary.pop(holder)
    added[:] = [token for token in added if token["id"] != image_token_id]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added.append({"id": image_token_id, "content": IMAGE_MARK, **flags})
    added.sort(key=lambda token: token["id"])


def _say_legacy_rule(content: dict, prefix: bool) -> None:
    """Legacy Llama: every stretch between added tokens is encoded by itself, with a prefix where the model has one.

    That is how transformers 4 wrote it; ``Prepend`` also does so where a stretch begins with a space.
    """
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    content["normalizer"] = {"type": "Sequence", "normalizers": [*prepend, replace]}
    content["pre_tokenizer"] = None
    for token in content["added_tokens"]:
        token |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def _has_prefix(source: TextTokenizer) -> bool:
    first = source.encode("0")[0][0]
    return source.hugging_face.convert_ids_to_tokens(first).startswith("▁")


def _adds_bos(source: TextTokenizer, version: str) -> bool:
    """Whether BOS is the tokenizer's to add: training had one, and the template does not spell it."""
    return source.adds_bos and source.encode(template(version).system)[0][:1] != [source.bos_id]


def _tokenizer_config(source: TextTokenizer, adds_bos: bool, vocab_rows: int, model_max_length: int) -> dict:
    original = source.hugging_face
    tokens = {"bos_token": original.bos_token, "eos_token": original.eos_token, "unk_token": original.unk_token}
    # Batches need padding, which no position attends to: an existing token will do, a new one would need a row.
    padding = [t for t in (original.pad_token, original.unk_token, original.eos_token) if t is not None]
    tokens["pad_token"] = next((t for t in padding if original.convert_tokens_to_ids(t) < vocab_rows), None)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: str(token) for name, token in tokens.items() if token is not None},
        "add_bos_token": adds_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": bool(getattr(original, "clean_up_tokenization_spaces", False)),
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": model_max_length,
        "padding_side": "left",
    }


def _image_processor(vision: VisionConfig, image_aspect_ratio: str, pinpoints) -> dict:
    """preprocessor_config.json. CLIPImageProcessor pads nothing and crops, so ``pad`` needs LlavaImageProcessor."""
    if pinpoints is None:
        one_of(image_aspect_ratio, ("square", "pad"), "--image_aspect_ratio")
    side = vision.image_size
    square = {"height": side, "width": side}
    resizes_both_edges = not vision.about.crops and image_aspect_ratio == "square" and pinpoints is None
    config = {
        "image_processor_type": "SiglipImageProcessor" if resizes_both_edges else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if resizes_both_edges else {"shortest_edge": side},
        "resample": 3,
        # Also where nothing is cropped: processors read the size of the result from crop_size.
        "do_center_crop": not resizes_both_edges,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }
    if pinpoints is not None:
        grid = [list(pair) for pair in pinpoints]
        names = {"image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor"}
        config |= {**names, "do_pad": True, "image_grid_pinpoints": grid}
    elif image_aspect_ratio == "pad":
        config |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return config


def _processor(vision: VisionConfig, tokens_per_image: int, pinpoints) -> dict:
    """processor_config.json. Positions of a picture = patches + additional, less one for the strategy ``default``."""
    additional = tokens_per_image - vision.num_patches
    if pinpoints is not None and additional:
        raise UserError(
            f"{tokens_per_image} positions for the {vision.num_patches} patches of a tile: the AnyRes processor of"
            " transformers counts one position a patch; sti cannot be exported with AnyRes, sci, dci and none can"
        )
    strategy = "default" if vision.num_prefix_tokens else "full"
    return {
        "processor_class": "LlavaProcessor" if pinpoints is None else "LlavaNextProcessor",
        "image_token": IMAGE_MARK,
        "num_additional_image_tokens": additional + (strategy == "default"),
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": strategy,
    }


def _generation(source: TextTokenizer, folder: str, version: str, image_token_id: int) -> dict:
    """generation_config.json: what ends an answer, and that ``<image>`` is never said: its row may be a new one."""
    with open(os.path.join(folder, "tokenizer_config.json"), encoding="utf-8") as file:
        pad = json.load(file).get("pad_token")
    ids = {"bos_token_id": source.bos_id, "pad_token_id": pad and source.hugging_face.convert_tokens_to_ids(pad)}
    return {
        **{name: number for name, number in ids.items() if number is not None},
        "eos_token_id": stop_ids(source, version),
        "suppress_tokens": [image_token_id],
    }


def _write_chat_template(folder: str, source: TextTokenizer, version: str, image_token_id: int) -> None:
    """Write the form of the template with which the written tokenizer gives training's ids."""
    from transformers import PreTrainedTokenizerFast

    # The length only silences a warning about probes longer than the model takes.
    written = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, model_max_length=1 << 30)
    failed = ""
    for space in (False, True):
        jinja = chat_template(version, space_after_image=space)
        failed = _first_difference(written, jinja, source, version, image_token_id)
        if failed is None:
            with open(os.path.join(folder, "chat_template.jinja"), "w", encoding="utf-8") as file:
                file.write(jinja)
            return
    raise UserError(
        f"{source.folder}: as a stock tokenizer with an {IMAGE_MARK} token it would give other ids than in training for"
        f" {failed!r}; export to llava instead, which keeps the tokenizer as it is"
    )


def _first_difference(written, jinja: str, source: TextTokenizer, version: str, image_token_id: int) -> str | None:
    """The first probe whose ids differ between the written tokenizer and training, or None."""
    for question, images in _PROBES:
        ids, mask = encode_prompt(source, version, question, [1] * images)
        expected = [image_token_id if is_image else token for token, is_image in zip(ids, mask, strict=True)]
        content = question
        if IMAGE_MARK not in question:
            content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        text = written.apply_chat_template(chat, chat_template=jinja, tokenize=False, add_generation_prompt=True)
        if written(text)["input_ids"] != expected:
            return question
        answer = f" {question.replace(IMAGE_MARK, '')[:9]}\nand so on"
        answered = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if version != "plain":
            answered, chat = answered * 2, chat * 2
        text = written.apply_chat_template(chat, chat_template=jinja, tokenize=False)
        if written(text)["input_ids"] != _ids_of_training(source, version, answered, image_token_id):
            return question
    return None


def _ids_of_training(source: TextTokenizer, version: str, messages: list[dict], image_token_id: int) -> list[int]:
    rendered = render(version, messages)
    pictures = [Picture("", 1, 1, tokens=1)] * rendered.image_count
    sample = tokenise(source, rendered, pictures, model_max_length=1 << 30)
    return [image_token_id if token == IMAGE_ID else token for token in sample.input_ids.tolist()]


def _write_json(folder: str, name: str, content: dict) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
