"""How many bytes a tensor-parallel rank reads for its shards: every byte once, and of column shards whole rows."""

import os
from collections import Counter

import pytest
import torch

from dc_megatron.config import LanguageConfig
from dc_megatron.weights.language_loading import LanguageWeights
from dc_megatron.weights.safetensors_files import open_checkpoint
from tests.helpers.tiny_models import as_old_bin, tiny_llama

# Rows that a 7B Llama keeps whole, where the shards are halves: 1 + 30 percent of the weights.
MOST = 1.4


@pytest.fixture(scope="module")
def proportioned(tmp_path_factory):
    """A Llama of 7B's proportions: inner size 2.69 times the width, 4 percent of the weights are embedding and head."""
    folder = tmp_path_factory.mktemp("llama")
    shape = {"hidden": 256, "intermediate": 688, "heads": 32, "kv_heads": 32, "vocab": 256}
    return tiny_llama(folder, layers=4, **shape)


@pytest.fixture
def reads(monkeypatch):
    """(file, first byte, end) of every pread from here on."""
    done = []
    original = os.preadv

    def recording(descriptor, buffers, offset):
        count = original(descriptor, buffers, offset)
        done.append((os.readlink(f"/proc/self/fd/{descriptor}"), offset, offset + count))
        return count

    monkeypatch.setattr(os, "preadv", recording)
    return done


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("rank", [0, 1])
def test_half_a_llama(form, rank, proportioned, reads, tmp_path):
    folder = proportioned if form == "safetensors" else as_old_bin(proportioned, tmp_path / "bin")
    language = LanguageConfig.from_folder(folder)
    weights = LanguageWeights(folder, language, rank, 2, language.vocab_size)
    shards = 0
    for rule in weights.table:
        for layer in range(language.num_hidden_layers) if rule.layered else (None,):
            shard = weights.shard(rule.key.format(layer=layer))
            shards += shard.numel() * shard.itemsize
    total = sum(end - start for _, start, end in reads)
    assert 1.2 < total / shards <= MOST
    starts = Counter((file, start) for file, start, _ in reads)
    assert max(starts.values()) == 1


def test_the_kernel_does_not_read_ahead_for_a_rank(proportioned, monkeypatch):
    """What lies behind a rank's rows is the next rank's. Whole tensors, as conversions read them, are read ahead."""
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: advised.append(arguments[1:]))
    checkpoint = open_checkpoint(proportioned)
    name = "model.layers.0.mlp.up_proj.weight"
    checkpoint.read(name)
    checkpoint.read_rows(name, 0, 8, torch.empty(8, 256, dtype=checkpoint.dtype(name)))
    assert advised == []
    checkpoint.read(name, (0, 8))
    checkpoint.read(name, (8, 16))
    assert advised == [(0, 0, os.POSIX_FADV_RANDOM)]


def test_memory_does_not_grow_with_the_file(proportioned, reads):
    """Reading in parts maps nothing: what is resident is what was asked for."""
    language = LanguageConfig.from_folder(proportioned)
    LanguageWeights(proportioned, language, 0, 2, language.vocab_size).shard("output_layer.weight")
    with open("/proc/self/maps", encoding="utf-8") as file:
        assert "model.safetensors" not in file.read()
    assert reads
