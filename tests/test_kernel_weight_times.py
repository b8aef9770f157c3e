"""W A^T of 4-bit weights without the weight: on a CPU the twin, in the kernel's place."""

from __future__ import annotations

import pytest
import torch
from test_adapter_contract import IN, make_adapter, make_base, trained_away_from_start
from test_thin_first import weight

from decompft.adapters.frozen.base import weight_times
from decompft.adapters.kernels import weight_times as kernel

RANK = 16


@pytest.mark.parametrize("base_name", ["nf4", "nf4-dq", "fp4"])
def test_the_twin_is_the_product_with_the_unpacked_weight(base_name: str) -> None:
    base, A = make_base(base_name, weight()), torch.randn(RANK, IN)
    found = kernel.plain(*base.storage(), A, base.code, base.block_size, double_quant=base.double_quant)
    torch.testing.assert_close(found, weight_times(base.dense(torch.float32), A), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["dora", "map-dora"])
def test_layers_have_the_slopes_that_they_have_by_the_weight(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.Size] = []

    def twin(codes, scales, A, *rest, **named):
        asked.append(A.shape)
        return kernel.plain(codes, scales, A, *rest, **named)

    def found() -> list[torch.Tensor]:
        made = trained_away_from_start(make_adapter(variant, make_base("nf4-dq", weight())))
        x = torch.linspace(-1, 1, 3 * IN).view(3, IN).requires_grad_()
        y = made(x)
        y.sin().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in made.trained())]

    plain = found()
    monkeypatch.setattr(kernel, "fits", lambda codes, block_size, A: True)
    monkeypatch.setattr(kernel, "weight_times", twin)
    for one, other in zip(found(), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert len(asked) == 1


def test_A_is_rounded_as_the_weight_is(monkeypatch: pytest.MonkeyPatch) -> None:
    base, A = make_base("nf4-dq", weight()), torch.randn(RANK, IN)
    plain = base.times(base.storage(), A, torch.bfloat16)
    given: list[torch.Tensor] = []

    def twin(codes, scales, A, *rest, **named):
        given.append(A)
        return kernel.plain(codes, scales, A, *rest, **named)

    monkeypatch.setattr(kernel, "fits", lambda codes, block_size, A: True)
    monkeypatch.setattr(kernel, "weight_times", twin)
    found = base.times(base.storage(), A, torch.bfloat16)
    assert given[0].dtype == torch.bfloat16 and found.dtype == torch.float32
    # the plain product on a CPU is rounded to bfloat16 at its end
    torch.testing.assert_close(found, plain, rtol=2**-8, atol=1e-3)


def test_a_cpu_takes_the_plain_way() -> None:
    base = make_base("nf4", weight())
    assert not kernel.fits(base.codes, base.block_size, torch.randn(RANK, IN).bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "size"), [(1, (1, 1)), (16, (4096, 64)), (33, (70, 9)), (64, (11008, 64))])
@pytest.mark.parametrize(("code", "double_quant"), [("nf4", True), ("fp4", False)])
def test_kernels_on_a_gpu(code, double_quant, rank, size, dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert kernel.PROVED.runs(device, dtype), kernel.PROVED.reason(device, dtype)
    kernel.example(device, dtype, code, rank, size, double_quant=double_quant)
