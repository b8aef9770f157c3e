"""Losses, and slopes over the logits, in one launch: the twin, the chunked loss through it, the kernel on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from decompft.adapters.kernels import cross_entropy
from decompft.launcher.worker import loss as loss_module
from decompft.launcher.worker.data.batches import IGNORE
from decompft.launcher.worker.loss import TrainedRows, token_loss_sum

TOKENS, HIDDEN, VOCAB = 21, 24, 50
SIZES = ((1024, 32000), (1000, 50257))


class Twin:
    """In the kernel's place, on a CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slopes: list[bool] = []
        monkeypatch.setattr(cross_entropy, "fits", lambda like, targets_T: True)
        monkeypatch.setattr(cross_entropy, "losses_", self.losses_)

    def losses_(self, logits_TV: Tensor, targets_T: Tensor, ignore: int, *, slopes: bool) -> Tensor:
        self.slopes.append(slopes)
        return cross_entropy.plain_(logits_TV, targets_T, ignore, slopes=slopes)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three, the last one short."""
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 8)


def logits_and_targets(num_rows: int, num_columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Columns of a wider array; every fifth target is ignored, and one is the last column."""
    draw = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(num_rows, num_columns + 3, generator=draw)).to(dtype)[:, 1 : 1 + num_columns]
    targets = torch.randint(num_columns, (num_rows,), generator=draw)
    targets[::5], targets[1] = IGNORE, num_columns - 1
    return logits, targets


def inputs(dtype: torch.dtype, *, ignored: bool, trains: bool) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, HIDDEN, generator=draw).to(dtype) for n in (TOKENS, VOCAB))
    targets = torch.randint(VOCAB, (TOKENS,), generator=draw)
    if ignored:
        targets[[0, *range(8, 16), 20]] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(trains), targets


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_twin_is_cross_entropy(dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(11, 131, dtype)
    exact = logits.double().clone().requires_grad_()
    expected = F.cross_entropy(exact, targets, ignore_index=IGNORE, reduction="none")
    (slopes,) = torch.autograd.grad(expected.sum(), exact)
    kept = logits.clone()
    near = 1e-12 if dtype == torch.float64 else 1e-5  # float32 sums of 131 terms
    for found in (False, True):
        losses = cross_entropy.plain_(logits, targets, IGNORE, slopes=found)
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=near, atol=near)
        assert torch.equal(logits, kept) is not found
    # and rounded once
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), slopes, rtol=max(rounding, near), atol=near)
    assert not logits[::5].any()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_takes_the_kernels_way_to_the_same_numbers(
    dtype: torch.dtype, ignored: bool, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin computes what the chunked loss does, in its order: the same bits."""
    hidden, weight, targets = inputs(dtype, ignored=ignored, trains=trains)
    wanted = (hidden, weight) if trains else (hidden,)

    def results() -> tuple[Tensor, ...]:
        loss = token_loss_sum(hidden, weight, None, targets, None, has_ignored=ignored)
        return loss, *torch.autograd.grad(loss / 7, wanted)

    plain = results()
    twin = Twin(monkeypatch)
    found = results()
    assert twin.slopes == [True] * 3
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert found[1].any()


@pytest.mark.usefixtures("small_chunks")
def test_evaluation_makes_losses_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs(torch.bfloat16, ignored=True, trains=False)
    expected = token_loss_sum(hidden, weight, None, targets, None, has_ignored=True).detach()
    twin = Twin(monkeypatch)
    with torch.no_grad():
        found = token_loss_sum(hidden, weight, None, targets, None, has_ignored=True)
    assert twin.slopes == [False] * 3 and torch.equal(found, expected)


@pytest.mark.parametrize("what", ["bias", "softcap", "trained"])
def test_a_head_that_is_not_plain_keeps_torchs_way(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs(torch.float32, ignored=False, trains=False)
    rows = TrainedRows(rows=torch.ones(1, HIDDEN), ids=torch.tensor([3]), num_new=0)
    twin = Twin(monkeypatch)
    token_loss_sum(
        hidden,
        weight,
        torch.ones(VOCAB) if what == "bias" else None,
        targets,
        3.0 if what == "softcap" else None,
        rows if what == "trained" else None,
    ).backward()
    assert twin.slopes == []


def test_a_cpu_takes_the_plain_way() -> None:
    assert not cross_entropy.fits(torch.ones(2, 3), torch.ones(2, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("slopes", [True, False])
@pytest.mark.parametrize("size", [*SIZES, (7, 262147), (5, 1)])
def test_the_kernel_on_a_gpu(size: tuple[int, int], slopes: bool, dtype: torch.dtype) -> None:
    cross_entropy.example(torch.device("cuda", 0), dtype, size=size, slopes=slopes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_the_loss_on_a_gpu_is_that_of_torchs_operators(
    size: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    (num_tokens, vocab), width = size, 64
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=draw).cuda().to(dtype) for n in (num_tokens, vocab))
    targets = torch.randint(vocab, (num_tokens,), generator=draw).cuda()
    targets[::7] = IGNORE
    hidden.requires_grad_()
    assert cross_entropy.fits(hidden, targets), cross_entropy.PROVED.reason(hidden.device, dtype)

    def results() -> tuple[Tensor, Tensor]:
        loss = token_loss_sum(hidden, weight, None, targets, None, has_ignored=True)
        return loss, *torch.autograd.grad(loss, hidden)

    loss, d_hidden = results()
    again = results()
    assert torch.equal(loss, again[0]) and torch.equal(d_hidden, again[1])
    monkeypatch.setattr(cross_entropy, "fits", lambda like, targets_T: False)
    expected, d_expected = results()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)  # 1000 float32 losses
    # a slope may be rounded to the other neighbour, and those of a row sum to 2 at most; then d_hidden is rounded
    spacing = max(torch.finfo(dtype).eps, 2**-16)
    torch.testing.assert_close(
        d_hidden, d_expected, rtol=spacing, atol=spacing * 2 * float(weight.abs().max())
    )


@pytest.mark.gpu
def test_rows_beyond_32_bits_on_a_gpu() -> None:
    wide = torch.empty(2**31 + 1000, dtype=torch.bfloat16, device="cuda").as_strided((3, 1000), (2**30, 1))
    logits, targets = (t.cuda() for t in logits_and_targets(3, 1000, torch.bfloat16))
    wide.copy_(logits)
    found = [cross_entropy.losses_(t, targets, IGNORE, slopes=True) for t in (wide, logits)]
    assert torch.equal(*found) and torch.equal(wide, logits)


@pytest.mark.gpu
def test_it_is_recorded_in_a_graph() -> None:
    logits, targets = (t.cuda() for t in logits_and_targets(64, 5000, torch.bfloat16))
    given = logits.contiguous()
    expected = given.clone()
    losses = cross_entropy.losses_(expected, targets, IGNORE, slopes=True)
    graph, kept = torch.cuda.CUDAGraph(), given.clone()
    with torch.cuda.graph(graph):
        found = cross_entropy.losses_(given, targets, IGNORE, slopes=True)
    given.copy_(kept)
    graph.replay()
    assert torch.equal(found, losses) and torch.equal(given, expected)
