"""The chunked loss is the cross entropy of all logits, in value, gradients and range, without all logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from decompft.launcher.worker import loss as loss_module
from decompft.launcher.worker.loss import CHUNK_TOKENS, TrainedRows, token_loss_sum

TOKENS, HIDDEN, VOCAB = 37, 24, 50


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Five chunks, the last one short."""
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 8)


def inputs(
    *, bias: bool = False, dtype: torch.dtype = torch.float64, trains: bool = True, scale: float = 1.0
):
    made = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(TOKENS, HIDDEN, generator=made, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=made, dtype=torch.float64)
    extra = torch.randn(VOCAB, generator=made, dtype=torch.float64) if bias else None
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=made)
    weight, extra = (None if t is None else t.to(dtype).requires_grad_(trains) for t in (weight, extra))
    return hidden.to(dtype).requires_grad_(), weight, extra, targets


def reference(hidden, weight, bias, targets, softcap):
    logits = F.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_are_those_of_cross_entropy(bias, softcap):
    hidden, weight, extra, targets = inputs(bias=bias, dtype=torch.float32)
    wanted = [t for t in (hidden, weight, extra) if t is not None]
    ours = token_loss_sum(hidden, weight, extra, targets, softcap)
    theirs = reference(*(t if t is None else t.double() for t in (hidden, weight, extra)), targets, softcap)
    # 37 float32 logarithms of sums of 50 terms
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-6, atol=1e-4)
    # divided as the loop does; the gradient was made before it was known by what
    found = torch.autograd.grad(ours / 7, wanted)
    expected = torch.autograd.grad(theirs / 7, wanted)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_gradient_is_not_rescaled_by_the_rounding_of_its_divisor():
    """1/865 in bfloat16 is 0.3 % too large, on every number alike, where rounding each of them averages out."""
    hidden, weight, _, targets = inputs(dtype=torch.bfloat16, trains=False)
    (found,) = torch.autograd.grad(token_loss_sum(hidden, weight, None, targets, None) / 865, hidden)
    (whole,) = torch.autograd.grad(token_loss_sum(hidden, weight, None, targets, None), hidden)
    ratio = torch.sum(found.double() * whole.double()) / torch.sum(whole.double().square())
    # 888 numbers, each rounded by 2**-9 / sqrt(3) on average
    assert ratio.item() * 865 == pytest.approx(1, abs=2e-4)


def test_bfloat16_logits_lose_no_more_than_their_inputs_did():
    hidden, weight, _, targets = inputs(dtype=torch.bfloat16, trains=False)
    exact = reference(hidden.double(), weight.double(), None, targets, None)
    # each logit is rounded once, 2**-9 of up to 15, and 37 such errors add up at random
    assert token_loss_sum(hidden, weight, None, targets, None).item() == pytest.approx(exact.item(), abs=0.5)


def test_far_apart_logits_overflow_nothing():
    hidden, weight, _, targets = inputs(dtype=torch.float32, scale=1e4)
    loss = token_loss_sum(hidden, weight, None, targets, None)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)
    torch.testing.assert_close(loss, reference(hidden, weight, None, targets, None), rtol=1e-5, atol=0)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("columns", [False, True])
def test_ignored_targets_add_nothing_wherever_they_stand(columns, softcap):
    """A chunk of them alone, parts of chunks, and id 0 among the trained rows: -100 is not taken for it."""
    hidden, weight, extra, targets = inputs(bias=True)
    targets[[0, 3, *range(8, 16), 36]] = -100
    kept = targets != -100
    rows = torch.randn(
        3, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    trained = TrainedRows(rows=rows, ids=torch.tensor([0, 7, VOCAB]), num_new=1) if columns else None
    targets[5] = 0
    wanted = (hidden, weight, extra, *([rows] if columns else []))
    found = token_loss_sum(hidden, weight, extra, targets, softcap, trained, has_ignored=True)
    expected = token_loss_sum(hidden[kept], weight, extra, targets[kept], softcap, trained)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # a float32 sum of 26 terms
    grads = torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted)
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not grads[0][0][~kept].any()


def test_no_token_is_no_loss_and_a_gradient_of_zero():
    """A dummy micro batch: its rank still takes part in the backward pass."""
    hidden, weight, extra, targets = inputs(bias=True, dtype=torch.float32)
    full = hidden * 1
    loss = token_loss_sum(full[:0], weight, extra, targets[:0], None)
    assert loss.item() == 0
    grads = torch.autograd.grad(loss, (hidden, weight, extra))
    assert all(
        g.shape == t.shape and not g.any() for g, t in zip(grads, (hidden, weight, extra), strict=True)
    )


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t)]
        self.numel = max([self.numel, *(t.numel() for t in made)])
        return out


def test_one_chunk_of_logits_is_the_most_that_lives():
    hidden, weight, _, targets = inputs(dtype=torch.float32, trains=False)
    with Largest() as largest:
        token_loss_sum(hidden, weight, None, targets, None).backward()
    assert largest.numel <= max(8 * VOCAB, VOCAB * HIDDEN) < TOKENS * VOCAB


def test_a_frozen_head_gets_no_gradient_and_evaluation_makes_none():
    hidden, weight, _, targets = inputs(dtype=torch.float32, trains=False)
    token_loss_sum(hidden, weight, None, targets, None).backward()
    assert weight.grad is None and hidden.grad is not None
    calls: list[str] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Products():
        token_loss_sum(hidden, weight, None, targets, None)
    assert sum(name.startswith("mm") for name in calls) == -(-TOKENS // 8)  # the logits alone


def test_the_chunk_is_large_enough_to_fill_a_gpu():
    assert CHUNK_TOKENS >= 512
