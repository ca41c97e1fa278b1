"""Which linears get an adapter: all of a language model but its head, whatever the family."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from dc_megatron.config import LanguageConfig, LoraConfig
from dc_megatron.errors import UserError
from dc_megatron.weights.frozen_base import hash_base, refuse_another_base
from dc_megatron.weights.lora_merge import MergedAdapters
from dc_megatron.weights.lora_table import adapted_linears, adapter_shapes
from dc_megatron.weights.tensor_reader import InMemory
from tests.helpers.tiny_models import tiny_llama, tiny_mistral, tiny_qwen2


@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral, tiny_qwen2])
def test_every_linear_but_the_head_has_its_factors(make, tmp_path):
    folder = make(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    shapes = {
        f"{name}.lora_{factor}.weight": (3, linear.in_features) if factor == "A" else (linear.out_features, 3)
        for name, linear in model.named_modules()
        if isinstance(linear, torch.nn.Linear) and name != "lm_head"
        for factor in "AB"
    }
    assert adapter_shapes(LanguageConfig.from_folder(folder), 3) == shapes


def test_fused_linears_have_one_adapter_for_each_of_their_parts(tmp_path):
    language = LanguageConfig.from_folder(tiny_llama(tmp_path / "llama"))
    linears = {linear.module: linear for linear in adapted_linears(language)}
    fused = linears["self_attention.linear_qkv"]
    assert [part.name.split(".")[-1] for part in fused.parts] == ["q_proj", "k_proj", "v_proj"]
    assert fused.blocks == language.num_key_value_heads
    assert [linear.row_parallel for linear in linears.values()] == [False, True, False, True]


def test_merged_rows_do_not_depend_on_how_they_are_read():
    """W + alpha / r B A in fp64, rounded once; blocks of any height give the same bits."""
    generator = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randn(*shape, generator=generator) for shape in ((700, 40), (3, 40), (700, 3)))
    base = InMemory({"a.q.weight": weight, "a.norm.weight": torch.ones(40)})
    factors = InMemory({"a.q.lora_A.weight": down, "a.q.lora_B.weight": up})
    merged = MergedAdapters(base, factors, LoraConfig(r=3, alpha=6))
    expected = (weight.double() + 2 * (up.double() @ down.double())).float()
    first = None
    for height in (700, 256, 101, 1):
        rows = torch.empty(700, 40)
        for start in range(0, 700, height):
            merged.read_rows("a.q.weight", start, min(700, start + height), rows[start : start + height])
        assert (rows - expected).abs().max() <= 1e-6
        first = rows if first is None else first
        assert torch.equal(rows, first), height
    norm = torch.empty(40)
    merged.read_rows("a.norm.weight", 0, 40, norm)
    assert torch.equal(norm, torch.ones(40))


def test_the_processes_of_a_node_share_out_the_files_of_the_base(tmp_path, monkeypatch):
    for number, name in enumerate("abc"):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(10 * number))
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "c.safetensors"}}'
    )
    whole = hash_base(str(tmp_path))
    assert set(whole) == {"a.safetensors", "b.safetensors", "c.safetensors"}
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "2")
    shares = []
    for rank in "01":
        monkeypatch.setitem(os.environ, "LOCAL_RANK", rank)
        shares.append(hash_base(str(tmp_path)))
        refuse_another_base(str(tmp_path), whole, "run")
    assert shares[0] | shares[1] == whole
    assert not shares[0].keys() & shares[1].keys()
    rank = next(rank for rank in "01" if "a.safetensors" in shares[int(rank)])
    monkeypatch.setitem(os.environ, "LOCAL_RANK", rank)
    with pytest.raises(UserError, match=r"not the same: a\.safetensors"):
        refuse_another_base(str(tmp_path), {**whole, "a.safetensors": "0"}, "run")
    with pytest.raises(UserError, match="not those that the adapters in run"):
        refuse_another_base(str(tmp_path), {**whole, "d.safetensors": "0"}, "run")
