"""Makers of tiny tokenizers, LLaVA data files and images; each takes the path to write and returns it as a string."""

from __future__ import annotations

import json
import os

import numpy as np
from PIL import Image
from torch import Tensor

from dc_megatron.config import DataConfig, DataSource, ImageTiling, VisionConfig
from dc_megatron.data.image_loading import image_loader, tile_requests
from dc_megatron.data.image_store import FolderStore
from dc_megatron.data.picture import Picture, make_picture

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is in the picture? ASSISTANT: A red circle in the top left corner.",
    "USER: Where is the blue square? ASSISTANT: It is at the bottom, next to 2 green triangles.",
    "You are a helpful language and vision assistant. system user assistant Answer the questions.",
    "the quick brown fox jumps over the lazy dog",
    "  two spaces, then\na new line",
]


def sentencepiece_tokenizer(
    folder,
    *,
    legacy: bool | None = None,
    add_bos: bool | None = True,
    model_file: bool = True,
    dummy_prefix: bool = True,
) -> str:
    """A Llama-style tokenizer folder as Vicuna has it: BPE with byte fallback, <unk> <s> </s> = 0 1 2.

    legacy, add_bos: the flags in tokenizer_config.json (None: absent). model_file=False: tokenizer.json instead of the
    sentencepiece model, as transformers 5 saves it.
    """
    import sentencepiece

    folder = _made(folder)
    corpus = os.path.join(folder, "corpus.txt")
    with open(corpus, "w", encoding="utf-8") as file:
        file.write("\n".join(CORPUS * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=corpus,
        model_prefix=os.path.join(folder, "tokenizer"),
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        add_dummy_prefix=dummy_prefix,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    os.remove(corpus)
    os.remove(os.path.join(folder, "tokenizer.vocab"))
    flags = {"unk_token": "<unk>", "add_eos_token": False, "legacy": legacy, "add_bos_token": add_bos}
    _write_tokenizer_config(folder, "LlamaTokenizer", "<s>", "</s>", flags)
    if not model_file:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(folder)
        os.remove(os.path.join(folder, "tokenizer.model"))
        _write_tokenizer_config(folder, "LlamaTokenizer", "<s>", "</s>", flags)
    return folder


def byte_level_tokenizer(
    folder, *, bos: str, eos: str, special: list[str], add_bos: bool = True, kind: str = "PreTrainedTokenizerFast"
) -> str:
    """A byte-level BPE tokenizer folder as Llama 3 has it; ``special`` are further special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    folder = _made(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(dict.fromkeys([bos, eos, *special])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    _write_tokenizer_config(folder, kind, bos, eos, {})
    return folder


def llama_3_tokenizer(folder, reserved: int = 0) -> str:
    """Byte-level, with the special tokens of Llama 3's chat format; adds its own <|begin_of_text|>.

    reserved: how many tokens <|reserved_special_token_N|> it keeps for later.
    """
    special = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special += [f"<|reserved_special_token_{number}|>" for number in range(reserved)]
    return byte_level_tokenizer(folder, bos="<|begin_of_text|>", eos="<|eot_id|>", special=special)


def chatml_tokenizer(folder) -> str:
    """Byte-level, with ChatML's special tokens and no BOS of its own."""
    return byte_level_tokenizer(
        folder, bos="<|startoftext|>", eos="<|im_end|>", special=["<|im_start|>"], add_bos=False
    )


def phi_tokenizer(folder) -> str:
    """Byte-level, one special token that begins and ends texts, and none of them put in front by itself."""
    end = "<|endoftext|>"
    return byte_level_tokenizer(folder, bos=end, eos=end, special=[], add_bos=False, kind="CodeGenTokenizer")


def _write_tokenizer_config(folder: str, kind: str, bos: str, eos: str, flags: dict) -> None:
    config = {"tokenizer_class": kind, "bos_token": bos, "eos_token": eos, "model_max_length": 2048}
    config |= {name: value for name, value in flags.items() if value is not None}
    _write(os.path.join(folder, "tokenizer_config.json"), config)


def photo(path, width: int = 80, height: int = 64, *, seed: int = 0, mode: str = "RGB", **save_options) -> str:
    """A smooth random picture, as photographs are; the file's ending says its format."""
    path = str(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    coarse = np.random.RandomState(seed).randint(0, 256, (max(height // 8, 1), max(width // 8, 1), 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image.convert(mode).save(path, **save_options)
    return path


def conversation(question: str, answer: str, *more: str) -> list[dict]:
    """LLaVA messages, human and gpt in turn."""
    turns = [question, answer, *more]
    return [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(turns)]


def caption_records(image_folder, count: int, *, size: tuple[int, int] = (40, 32)) -> list[dict]:
    """``count`` records with one JPEG each, written to ``image_folder``."""
    records = []
    for number in range(count):
        name = f"{number:04}.jpg"
        photo(os.path.join(image_folder, name), *size, seed=number)
        messages = conversation("<image>\nWhat is in the picture?", f"A red circle and {number} green triangles.")
        records.append({"id": f"caption-{number}", "image": name, "conversations": messages})
    return records


def write_records(path, records: list) -> str:
    """A JSON list, or JSON Lines where the name ends in .jsonl."""
    path = str(path)
    _made(os.path.dirname(path))
    if path.endswith(".jsonl"):
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    else:
        _write(path, records)
    return path


def tiling(tile_tokens: int = 4, **overrides) -> ImageTiling:
    """One tile of 28 pixels and ``tile_tokens`` positions a picture."""
    return ImageTiling(**{"tile_size": 28, "tile_tokens": tile_tokens, "side": 2, **overrides})


def picture(name: str = "a.jpg", tokens: int = 4, **overrides) -> Picture:
    """A picture of one tile."""
    return Picture(name, **{"width": 40, "height": 32, "tokens": tokens, **overrides})


def pixels_of_files(vision: VisionConfig, tiling: ImageTiling, files, aspect_ratio: str = "pad") -> Tensor:
    """float32 [tiles, 3, H, W] of whole files, by PIL."""
    store = FolderStore("")
    pictures = [make_picture(tiling, str(file), *Image.open(file).size) for file in files]
    tiles = range(sum(picture.tiles for picture in pictures))
    loader = image_loader("pil", vision, aspect_ratio, tiling)
    return loader.load(tile_requests(pictures, [store], tiles))[0]


def data_config(folder, data_path, tokenizer_path, **overrides) -> DataConfig:
    """A small DataConfig whose images lie in ``folder``; data_path may be a list of files."""
    files = data_path if isinstance(data_path, list | tuple) else [data_path]
    values = {
        "sources": tuple(DataSource(str(file), str(folder)) for file in files),
        "tokenizer_path": str(tokenizer_path),
        "version": "v1",
        "image_aspect_ratio": "pad",
        "model_max_length": 192,
        "seq_length": 192,
        "tiling": tiling(),
        "image_backend": "pil",
    }
    return DataConfig(**{**values, **overrides})


def vision_config(family: str = "clip", image_size: int = 28) -> VisionConfig:
    """A vision shape with the family's real mean and deviation; only what pixels need."""
    mean, deviation = {
        "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    }[family]
    return VisionConfig(family, 32, 64, 6, 4, image_size, 14, "gelu", 1e-5, mean, deviation)


def _made(folder) -> str:
    os.makedirs(folder, exist_ok=True)
    return str(folder)


def _write(path: str, content) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)
