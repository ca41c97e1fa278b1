"""Cross entropy in chunks against PyTorch's on all logits: values, both gradients, and what never lies in memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dc_megatron.model import loss_head
from dc_megatron.model.chunked_loss import chunked_loss

ROWS, WIDTH, VOCABULARY, PADDED = 13, 16, 101, 128
# Of the head's two rows of 30 positions.
SUPERVISED = 40
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
# fp32 sums of some hundred terms in another order: one part in 10^7 each, with an order of room.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def make(rows: int = ROWS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """rows, weight (both to have gradients), targets with the first and last id among them, upstream gradients."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=generator)
    weight = torch.randn(PADDED, WIDTH, generator=generator) * 0.3
    targets = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    targets[:2] = torch.tensor([0, VOCABULARY - 1])[:rows]
    # No two alike, one zero, one negative: nothing may be taken for a mean.
    upstream = torch.randn(rows, generator=generator)
    upstream[:1] = 0.0
    return hidden.requires_grad_(), weight.requires_grad_(), targets, upstream


def expected(hidden, weight, targets, upstream) -> tuple[torch.Tensor, ...]:
    """By torch, without the padding's columns."""
    logits = torch.nn.functional.linear(hidden, weight[:VOCABULARY])
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return losses.detach(), *torch.autograd.grad(losses, (hidden, weight), upstream)


@pytest.mark.parametrize("chunk", [1, 3, 5, ROWS - 1, ROWS, 100])
def test_losses_and_gradients_are_those_of_all_logits(chunk):
    hidden, weight, targets, upstream = make()
    losses = chunked_loss(hidden, weight, targets, 0, VOCABULARY, ALONE, chunk)
    found = (losses.detach(), *torch.autograd.grad(losses, (hidden, weight), upstream))
    assert losses.dtype == torch.float32
    for ours, theirs in zip(found, expected(hidden, weight, targets, upstream), strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    # Padding has probability 0: no gradient, and its numbers do not matter.
    assert not found[2][VOCABULARY:].any()
    assert found[2][:VOCABULARY].any(dim=1).all()


def test_what_the_padding_holds_does_not_matter():
    hidden, weight, targets, _ = make()
    before = chunked_loss(hidden, weight, targets, 0, VOCABULARY, ALONE, 4)
    with torch.no_grad():
        weight[VOCABULARY:] = 1e3
    assert torch.equal(chunked_loss(hidden, weight, targets, 0, VOCABULARY, ALONE, 4), before)


def test_large_logits_do_not_overflow():
    hidden, weight, targets, upstream = make()
    with torch.no_grad():
        hidden.mul_(1e3)
    losses = chunked_loss(hidden, weight, targets, 0, VOCABULARY, ALONE, 4)
    gradients = torch.autograd.grad(losses, (hidden, weight), upstream)
    assert all(value.isfinite().all() for value in (losses, *gradients))
    # Losses of thousands, of which fp32 keeps seven digits.
    torch.testing.assert_close(losses.detach(), expected(hidden, weight, targets, upstream)[0], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("trained", ["rows", "weight", "neither"])
def test_no_gradient_for_what_needs_none(trained):
    """A frozen head has no gradient of its weight: none may be computed, for it is as large as the vocabulary."""
    hidden, weight, targets, upstream = make()
    hidden.requires_grad_(trained == "rows")
    weight.requires_grad_(trained == "weight")
    losses = chunked_loss(hidden, weight, targets, 0, VOCABULARY, ALONE, 4)
    assert losses.requires_grad is (trained != "neither")
    if losses.requires_grad:
        losses.backward(upstream)
    assert (hidden.grad is not None, weight.grad is not None) == (trained == "rows", trained == "weight")


def test_no_rows():
    hidden, weight, targets, upstream = make(rows=0)
    losses = chunked_loss(hidden, weight, targets, 0, VOCABULARY, ALONE, 4)
    assert losses.shape == (0,)
    losses.backward(upstream)
    assert hidden.grad.shape == (0, WIDTH)
    assert not weight.grad.any()


def test_sums_over_sixteen_bits_are_taken_in_fp32():
    """bf16 keeps 8 bits: a logit is off by 2^-9 of its size, and no more may be lost on the way to the loss."""
    hidden, weight, targets, upstream = (x.detach() for x in make())
    halves = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    losses = chunked_loss(*halves, targets, 0, VOCABULARY, ALONE, 4)
    wholes = [x.detach().float().requires_grad_() for x in halves]
    right = expected(*wholes, targets, upstream)
    assert losses.dtype == torch.float32
    largest = torch.nn.functional.linear(*wholes).detach().abs().max()
    assert (losses.detach() - right[0]).abs().max() <= 2 * largest * 2**-9
    for ours, theirs in zip(torch.autograd.grad(losses, halves, upstream), right[1:], strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).norm() <= 2**-6 * theirs.norm()


@pytest.fixture
def world():
    """A group of this process alone, for Megatron's functions."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def through_the_head(
    group, monkeypatch, chunk_bytes: int, frozen: bool = False, biased: bool = False
) -> tuple[list[torch.Tensor], dict]:
    """([losses, gradients of the hidden states, of the weight, of the bias where there is one], what was seen).

    Labels leave out every third position of two rows.
    """
    monkeypatch.setattr(loss_head, "CHUNK_BYTES", chunk_bytes)
    seen = {"sizes": [], "chunks": []}
    linear, chunked = torch.nn.functional.linear, chunked_loss

    def watched_linear(*arguments):
        result = linear(*arguments)
        seen["sizes"].append(result.numel())
        return result

    def watched_loss(*arguments):
        seen["chunks"].append(arguments[-2])
        return chunked(*arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", watched_linear)
    monkeypatch.setattr(loss_head, "chunked_loss", watched_loss)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(30, 2, WIDTH, generator=generator, requires_grad=True)
    layer = torch.nn.Linear(WIDTH, PADDED, bias=biased)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer.requires_grad_(not frozen)
    labels = torch.randint(0, VOCABULARY, (2, 30), generator=generator)
    labels[:, ::3] = loss_head.IGNORED
    losses = loss_head.head(
        hidden_states=hidden,
        output_layer=layer,
        output_weight=None,
        context=loss_head.HeadRequest(vocab_size=VOCABULARY, group=group, labels=labels),
        config=SimpleNamespace(sequence_parallel=False),
    )
    losses.backward(torch.randn(losses.shape, generator=generator))
    monkeypatch.undo()
    return [losses.detach(), hidden.grad, *(parameter.grad for parameter in layer.parameters())], seen


@pytest.mark.parametrize("biased", [False, True])
def test_the_head_goes_in_chunks_where_its_logits_are_many(world, monkeypatch, biased):
    whole, seen_whole = through_the_head(world, monkeypatch, chunk_bytes=256 << 20, biased=biased)
    parts, seen = through_the_head(world, monkeypatch, chunk_bytes=4 * PADDED * 7, biased=biased)
    assert len(parts) == 3 + biased
    assert (seen_whole["chunks"], seen["chunks"]) == ([], [7])
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    # All at once, or never more than seven of them, forward and again backward.
    assert seen_whole["sizes"] == [SUPERVISED * PADDED]
    assert seen["sizes"] == [7 * PADDED, 7 * PADDED, 7 * PADDED, 7 * PADDED, 7 * PADDED, 5 * PADDED] * 2


def test_no_tensor_of_all_logits_is_kept_for_the_backward_pass(world, monkeypatch):
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x)
    with hooks:
        through_the_head(world, monkeypatch, chunk_bytes=256 << 20)
    assert max(kept) == SUPERVISED * PADDED
    kept.clear()
    with hooks:
        through_the_head(world, monkeypatch, chunk_bytes=4 * PADDED * 7)
    # The largest is the weight itself; more than its size would be logits.
    assert max(kept) == PADDED * WIDTH


def test_a_chunk_is_one_row_at_least(world, monkeypatch):
    whole, _ = through_the_head(world, monkeypatch, chunk_bytes=256 << 20)
    parts, seen = through_the_head(world, monkeypatch, chunk_bytes=1)
    assert seen["chunks"] == [1]
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_rows_that_just_fit_are_not_split(world, monkeypatch):
    _, seen = through_the_head(world, monkeypatch, chunk_bytes=4 * PADDED * SUPERVISED)
    assert seen["chunks"] == []


def test_a_frozen_head_has_no_gradient_of_its_weight(world, monkeypatch):
    whole, _ = through_the_head(world, monkeypatch, chunk_bytes=256 << 20)
    parts, _ = through_the_head(world, monkeypatch, chunk_bytes=4 * PADDED * 7, frozen=True)
    assert parts[2] is None
    torch.testing.assert_close(parts[1], whole[1], **TOLERANCE)
