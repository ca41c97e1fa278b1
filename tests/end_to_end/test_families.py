"""Every family of language models through the engine: trained at TP 2, resumed at PP 2, exported, asked."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import pytest
import torch

from dc_megatron.weights.verify import verify
from tests.end_to_end.launch import ROOT, TRAIN, metrics, run, torchrun, train_forked
from tests.helpers.data_files import chatml_tokenizer, llama_3_tokenizer, phi_tokenizer, sentencepiece_tokenizer
from tests.helpers.tiny_models import tiny_llama, tiny_mistral, tiny_phi, tiny_qwen2, tiny_qwen3
from tests.helpers.workspace import training_flags

pytestmark = pytest.mark.long
VOCABULARY = 1003


@dataclass(frozen=True)
class Family:
    """How a tiny model of it is made and asked."""

    make: object
    tokenizer: object
    version: str


FAMILIES = {
    "phi-2": Family(lambda f: tiny_phi(f, resid_pdrop=0.1), phi_tokenizer, "phi"),
    # As Yi-34B: groups of seven query heads, ChatML over sentencepiece's successor.
    "hermes-2-yi": Family(
        lambda f: tiny_llama(f, hidden=112, heads=14, kv_heads=2, vocab=VOCABULARY), chatml_tokenizer, "mpt"
    ),
    "llama-3": Family(lambda f: tiny_llama(f, vocab=VOCABULARY, rms_norm_eps=1e-5), llama_3_tokenizer, "llama_3"),
    "llama-3.2": Family(
        lambda f: tiny_llama(f, vocab=VOCABULARY, tied=True, rope_factor=32.0), llama_3_tokenizer, "llama_3_chat"
    ),
    "mistral": Family(
        lambda f: tiny_mistral(f, vocab_size=VOCABULARY, num_hidden_layers=4), sentencepiece_tokenizer, "v1"
    ),
    "qwen2.5": Family(
        lambda f: tiny_qwen2(f, vocab_size=VOCABULARY, tie_word_embeddings=True), chatml_tokenizer, "chatml_direct"
    ),
    "qwen3": Family(lambda f: tiny_qwen3(f, vocab_size=VOCABULARY), chatml_tokenizer, "chatml_direct"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_resumes_and_leaves(workspace, tmp_path, name):
    family = FAMILIES[name]
    model = family.make(tmp_path / "model")
    family.tokenizer(model)
    output = tmp_path / "run"

    def train(steps: int, **layout) -> None:
        words = training_flags(
            {**workspace, "llama": model}, output, version=family.version,
            model_max_length=192, packing="best-fit", seq_length=256,
            micro_batch_size=None, global_batch_size=2, max_steps=steps, log_images=0, save_steps=4,
            learning_rate=3e-3, lr_scheduler_type="constant", **layout,
        )  # fmt: skip
        done = train_forked([*torchrun(2), *TRAIN, *words], output / f"logs{steps}")
        assert ("--hidden-dropout 0.1 drops there" in done.output) == (name == "phi-2")

    train(4, **{"tensor-model-parallel-size": 2, "sequence-parallel": True, "recompute": "selective"})
    train(8, **{"pipeline-model-parallel-size": 2, "recompute": "full"})
    lines = metrics(output)
    assert [line["iteration"] for line in lines] == list(range(1, 9))
    losses = [line["loss"] for line in lines]
    # The second run goes on where the first stood: no step back to the start.
    assert losses[4] < losses[0] - 0.1, losses
    assert losses[-1] < losses[3], losses
    stock = str(tmp_path / "stock")
    convert = [sys.executable, str(ROOT / "tools" / "convert.py"), "export", "--load", str(output)]
    run([*convert, "--format", "hf-llava", "--save", stock], tmp_path / "export").assert_succeeded()
    assert verify(stock, str(output)).equal
    assert_same_answer(workspace, tmp_path, output, stock)


def assert_same_answer(workspace, tmp_path, output, stock: str) -> None:
    """Plain transformers says what tools/generate.py says."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    picture, question = os.path.join(workspace["images"], "1.jpg"), "What is in the picture?"
    words = ["--load", str(output), "--image", picture, "--prompt", question, "--max_new_tokens", "8"]
    asked = run([sys.executable, str(ROOT / "tools" / "generate.py"), *words], tmp_path / "asked").assert_succeeded()
    processor = AutoProcessor.from_pretrained(stock, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(stock, dtype=torch.float32).eval()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    given = processor(text=text, images=[Image.open(picture)], return_tensors="pt")
    said = model.generate(**given, max_new_tokens=8, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(said, skip_special_tokens=True).strip() == asked.output.strip()
