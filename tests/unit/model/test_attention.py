"""Attention of packed rows: which kernel is taken where, and the one of every machine against the formula."""

from __future__ import annotations

import inspect
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

from dc_megatron.model import attention
from dc_megatron.model.attention import KERNELS, packed_kernel
from dc_megatron.model.row_pieces import Bounds
from dc_megatron.runtime import installed

HEADS, SIZE = 8, 16
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose GPU has this capability, with flash-attn and torch's copy of it or without."""

    def pretend(capability: tuple[int, int] = (9, 0), flash: bool = False, varlen: bool = True) -> None:
        packed_kernel.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(installed, "usable_flash_attention", lambda: flash)
        monkeypatch.setattr(attention, "_has_torch_varlen", lambda: varlen)

    packed_kernel.cache_clear()
    yield pretend
    packed_kernel.cache_clear()


@pytest.mark.parametrize("dtype", HALF)
def test_flash_attention_comes_first(gpu, dtype):
    gpu(flash=True)
    assert packed_kernel("cuda", dtype, 128) == "flash_attn"
    gpu(flash=False)
    assert packed_kernel("cuda", dtype, 128) == "torch_varlen"
    gpu(flash=False, varlen=False)
    assert packed_kernel("cuda", dtype, 128) == "sdpa"


@pytest.mark.parametrize(
    ("capability", "device", "dtype", "size"),
    [
        ((7, 5), "cuda", torch.bfloat16, 128),
        ((9, 0), "cuda", torch.float32, 128),
        ((9, 0), "cuda", torch.bfloat16, 257),
        ((9, 0), "cpu", torch.bfloat16, 128),
    ],
    ids=["an older GPU", "fp32", "large heads", "a CPU"],
)
def test_what_the_fast_kernels_do_not_take(gpu, capability, device, dtype, size):
    gpu(capability, flash=True)
    assert packed_kernel(device, dtype, size) == "sdpa"


def test_the_limits_themselves_are_taken(gpu):
    gpu((8, 0), flash=True)
    assert packed_kernel("cuda", torch.float16, 256) == "flash_attn"


def test_a_cpu_is_not_asked_for_its_gpu(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: pytest.fail("there may be no driver"))
    assert packed_kernel("cpu", torch.float32, 16) == "sdpa"


def test_a_torch_without_varlen_attention(monkeypatch):
    assert attention._has_torch_varlen(), "the pinned torch has it"
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert not attention._has_torch_varlen()


def test_torchs_varlen_attention_gets_what_it_takes(monkeypatch):
    """Only a GPU can run it: its parameters, and a head of keys and values for each of the queries'."""
    from torch.nn.attention import varlen

    names = list(inspect.signature(varlen.varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= set(names)
    given = {}

    def take(*arguments, **keywords):
        given.update(zip(names, arguments, strict=False), **keywords)
        return arguments[0]

    monkeypatch.setattr(varlen, "varlen_attn", take)
    query, key, value = make([5, 3], groups=2)
    bounds = Bounds(*(torch.tensor(edges, dtype=torch.int32) for edges in ([0, 2, 5], [0, 5, 8])), 512, 1024)
    assert KERNELS["torch_varlen"](query, key, value, bounds, 0.25, 0.0) is query
    assert given["key"].shape == given["value"].shape == query.shape
    assert torch.equal(given["key"][:, 4], key[:, 1])
    assert given["cu_seq_q"] is bounds.queries
    assert given["cu_seq_k"] is bounds.keys
    assert (given["max_q"], given["max_k"], given["scale"]) == (512, 1024, 0.25)
    assert given["window_size"] == (-1, 0), "all of the past and nothing of what comes"
    with pytest.raises(AssertionError, match="no dropout"):
        KERNELS["torch_varlen"](query, key, value, bounds, 0.25, 0.1)


def make(lengths: list[int], groups: int = HEADS) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(sum(lengths), heads, SIZE) for heads in (HEADS, groups, groups)]
    return tuple(torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)


def formula(query, key, value, scale: float) -> torch.Tensor:
    """softmax(q k^T scale) v of one sample with a causal mask, head by head: [s, heads, d]."""
    length, heads, groups = query.shape[0], query.shape[1], key.shape[1]
    future = torch.ones(length, length).triu(1).bool()
    outputs = []
    for head in range(heads):
        group = head * groups // heads
        scores = (query[:, head] @ key[:, group].T * scale).masked_fill(future, float("-inf"))
        outputs.append(torch.softmax(scores, dim=-1) @ value[:, group])
    return torch.stack(outputs, dim=1)


def bounds_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def samples(lengths: list[int]) -> Bounds:
    return Bounds.of_samples(bounds_of(lengths), max(lengths))


@pytest.mark.parametrize("groups", [8, 2, 1])
@pytest.mark.parametrize(
    "lengths", [[5, 1, 7, 3], [0, 4, 0, 0, 6, 0], [9]], ids=["four samples", "empty ones among them", "one"]
)
def test_the_kernel_of_every_machine_is_the_formula_for_each_sample(groups, lengths):
    """Values and gradients. fp32 sums of a few terms in another order: 1e-6 has an order of room."""
    inputs = make(lengths, groups)
    # A scale of its own: it must arrive.
    ours = KERNELS["sdpa"](*inputs, samples(lengths), 0.3, 0.0)
    edges = itertools.pairwise(bounds_of(lengths).tolist())
    theirs = torch.cat([formula(*(x[a:b] for x in inputs), 0.3) for a, b in edges])
    assert ours.shape == inputs[0].shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for mine, right in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-5)
    if len(lengths) > 1:
        assert (formula(*inputs, 0.3) - theirs).abs().max() > 0.1, "the samples would agree with any packing"


def test_empty_samples_start_no_kernel(monkeypatch):
    """cu_seqlens of a fixed length may end in them."""
    attend, lengths = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, *others, **settings: lengths.append(query.shape[2]) or attend(query, *others, **settings),
    )
    KERNELS["sdpa"](*make([4, 6]), samples([0, 4, 0, 0, 6, 0]), 0.3, 0.0)
    assert lengths == [4, 6]


def test_bounds_must_cover_the_row():
    with pytest.raises(AssertionError, match="ends at 7, the row has 8"):
        KERNELS["sdpa"](*make([5, 3]), Bounds.of_samples(torch.tensor([0, 5, 7]), 5), 0.3, 0.0)


def test_a_row_in_sixteen_bits_is_the_row_in_thirty_two():
    """bf16 keeps 8 bits of mantissa; a weighted mean of values near 1 is off by a few 2^-8."""
    inputs, bounds = make([5, 3]), samples([5, 3])
    whole = KERNELS["sdpa"](*inputs, bounds, 0.25, 0.0)
    half = KERNELS["sdpa"](*(x.bfloat16() for x in inputs), bounds, 0.25, 0.0)
    assert half.dtype == torch.bfloat16
    assert (half.float() - whole).abs().max() <= 2**-5


def test_transformer_engines_layers_get_our_attention_where_rows_are_divided(monkeypatch):
    """Its parts cannot be made without it; megatron-core's own stand in for them."""
    from dc_megatron.model import language_model

    monkeypatch.setattr(
        language_model,
        "get_gpt_layer_with_transformer_engine_submodules",
        lambda qk_layernorm: language_model.get_gpt_layer_local_submodules(qk_layernorm=qk_layernorm),
    )
    language = SimpleNamespace(qk_norm=False, parallel_layers=False)
    theirs, ours = (
        language_model._transformer_engine_parts(language, SimpleNamespace(context_parallel_size=size))
        for size in (1, 2)
    )
    assert theirs.self_attention.submodules.core_attention is not attention.TorchCoreAttention
    assert ours.self_attention.submodules.core_attention is attention.TorchCoreAttention
    assert ours.self_attention.submodules.linear_qkv is theirs.self_attention.submodules.linear_qkv


def test_one_position_attends_to_all_that_is_kept():
    """What a cache asks for: the newest query against the keys up to it is the last row of all of them."""
    torch.manual_seed(0)
    core = attention.TorchCoreAttention.__new__(attention.TorchCoreAttention)
    torch.nn.Module.__init__(core)
    core.dropout, core.softmax_scale, core.context_group = 0.0, SIZE**-0.5, None
    core.eval()
    query, key, value = (torch.randn(7, 2, heads, SIZE) for heads in (HEADS, 2, 2))
    whole = core(query, key, value, None)
    assert torch.allclose(core(query[-1:], key, value, None), whole[-1:], atol=1e-6)
    with pytest.raises(AssertionError, match="3 positions of 7"):
        core(query[:3], key, value, None)
