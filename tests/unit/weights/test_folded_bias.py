"""A head's bias inside the final norm and the head: the same logits, in any dtype, however the numbers lie."""

import pytest
import torch

from dc_megatron.errors import UserError
from dc_megatron.weights import folded_bias
from dc_megatron.weights.folded_bias import FoldedHead
from dc_megatron.weights.tensor_reader import InMemory, read_tensor

HIDDEN, WORDS = 48, 70


def parts(bias_of_norm: float, gain: float, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {
        "head": torch.randn(WORDS, HIDDEN, generator=generator) / HIDDEN**0.5,
        "head bias": torch.randn(WORDS, generator=generator),
        "gain": gain * (1 + 0.3 * torch.randn(HIDDEN, generator=generator)),
        "bias": bias_of_norm * torch.randn(HIDDEN, generator=generator),
    }
    return {name: value.to(dtype) for name, value in made.items()}


def folded(given: dict, dtype=None) -> tuple[torch.Tensor, torch.Tensor]:
    reader = FoldedHead(InMemory(given), ["head", "head bias", "gain", "bias"], dtype, "here")
    assert set(reader.names()) == {"head", "bias"}
    return read_tensor(reader, "head"), read_tensor(reader, "bias")


def logits(gain, bias, head, head_bias=None) -> torch.Tensor:
    hidden = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    normed = torch.nn.functional.layer_norm(hidden, (HIDDEN,), gain.double(), bias.double())
    return torch.nn.functional.linear(normed, head.double(), None if head_bias is None else head_bias.double())


@pytest.mark.parametrize("rows", [256, 7])
@pytest.mark.parametrize(("bias_of_norm", "gain"), [(0.1, 1.0), (0.0, 1.0), (20.0, 8.0), (0.5, 0.01), (0.5, -2.0)])
def test_logits_are_the_same(monkeypatch, bias_of_norm, gain, rows):
    """fp32 sums of numbers of size 10; blocks of 7 rows leave a remainder."""
    monkeypatch.setattr(folded_bias, "_ROWS", rows)
    given = parts(bias_of_norm, gain)
    head, bias = folded(given)
    expected = logits(given["gain"], given["bias"], given["head"], given["head bias"])
    scale = max(1.0, float(expected.abs().max()))
    assert (logits(given["gain"], bias, head) - expected).abs().max() <= 1e-6 * scale
    unfolded = logits(given["gain"], given["bias"], given["head"])
    assert (unfolded - expected).abs().max() > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_lose_no_more_than_the_head_itself(dtype):
    """Rounded for the target: the error is that of rounding a head of this size, whose values carry 8 or 11 bits."""
    given = parts(0.5, 1.0)
    head, bias = folded(given, dtype)
    assert head.dtype == bias.dtype == dtype
    gain = given["gain"].to(dtype)
    expected = logits(gain, given["bias"], given["head"], given["head bias"])
    rounded = logits(gain, given["bias"], given["head"].to(dtype), given["head bias"])
    error = (logits(gain, bias, head) - expected).norm()
    assert error <= 3 * (rounded - expected).norm()


def test_any_rows_alone():
    given = parts(0.3, 1.0)
    reader = FoldedHead(InMemory(given), ["head", "head bias", "gain", "bias"], None, "here")
    out = torch.empty(5, HIDDEN)
    reader.read_rows("head", 11, 16, out)
    assert torch.equal(out, read_tensor(reader, "head")[11:16])


def test_a_gain_of_zero_is_refused():
    given = parts(0.3, 1.0)
    given["gain"][4] = 0
    with pytest.raises(UserError, match=r"here: 1 values of gain are zero.*--format llava"):
        folded(given)
