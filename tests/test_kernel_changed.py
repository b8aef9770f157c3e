"""LieRA's weight in one pass: the layer that uses it beside the layer of tiles; on a CPU by the kernel's twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decompft.adapters.frozen.fourbit import FourBitLinear, Nf4Linear
from decompft.adapters.inject import make_adapter
from decompft.adapters.kernels import changed
from decompft.adapters.kernels.changed import Change
from decompft.adapters.spec import ADAPTER_SPECS, AdapterConfig

IN, OUT, RANK = 256, 150, 8


def by_the_twin(
    base: FourBitLinear,
    storage: tuple[Tensor, ...],
    dtype: torch.dtype,
    change: Change,
    slope: Tensor | None = None,
) -> Tensor:
    found = changed.plain(base.unpack(storage, torch.promote_types(dtype, torch.float32)), change, slope).to(
        dtype
    )
    return found if slope is None else slope.copy_(found)


def layer(order: str, device: str, *, out: int = OUT, in_: int = IN, rank: int = RANK):
    draw = torch.Generator().manual_seed(0)
    base = Nf4Linear(in_, out, block_size=64, double_quant=True, bias_dtype=torch.float32)
    rows = 0.05 * torch.randn(out, in_, generator=draw)
    for parameter, packed in zip(base.storage(), base.pack(rows), strict=True):
        parameter.data.copy_(packed)
    base.bias.data.fill_(0.1)
    options = ADAPTER_SPECS["liera"].options(order=order, **({"clamp": 0.4} if order == "exact" else {}))
    made = make_adapter(
        base, AdapterConfig(method="liera", rank=rank, alpha=2.0 * rank, dropout=0.0, options=options)
    )
    with torch.no_grad():
        for tensor in made.parameters(recurse=False):
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=draw))
    return made.to(device)


def passes(made, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    made.zero_grad()
    given = x.clone().requires_grad_(True)
    y = made(given)
    y.backward(g)
    return {"y": y.detach(), "x": given.grad, "A": made.A.grad, "B": made.B.grad}


@pytest.mark.parametrize("order", ["first", "exact"])
def test_the_whole_weight_gives_what_tiles_give(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(order, "cpu")
    x, g = torch.randn(3, 5, IN), torch.randn(3, 5, OUT)
    by_tiles = passes(made, x, g)
    monkeypatch.setattr(Nf4Linear, "unpack_changed", by_the_twin)
    whole = passes(made, x, g)
    for name, tensor in by_tiles.items():
        torch.testing.assert_close(
            whole[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    made.A.requires_grad_(False)
    y = made(x)  # an input without a slope: the first layer's
    y.backward(g)
    torch.testing.assert_close(made.B.grad, 2 * by_tiles["B"], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["first", "exact"])
@pytest.mark.parametrize(("out", "in_", "rank"), [(150, 256, 8), (1024, 1408, 16), (320, 4096, 40)])
def test_the_kernel_gives_what_tiles_give(
    order: str, out: int, in_: int, rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layer(order, "cuda", out=out, in_=in_, rank=rank)
    x, g = torch.randn(77, in_, device="cuda", dtype=dtype), torch.randn(77, out, device="cuda", dtype=dtype)
    base = made.base
    assert base.unpack_changed(base.storage(), dtype, made.as_change(made.A, made.B)) is not None
    whole = passes(made, x, g)
    monkeypatch.setattr(changed, "fits", lambda *_: False)
    for name, tensor in passes(made, x, g).items():
        error = (whole[name].float() - tensor.float()).norm() / tensor.float().norm()
        # each rounds W*, y and the slope of D to `dtype` once
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-4), f"{name}: {error}"


@pytest.mark.gpu
def test_one_tensor_of_the_weights_size_lives_at_a_time() -> None:
    made = layer("first", "cuda", out=4096, in_=4096, rank=16)
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    made(x).sum().backward()  # cuBLAS takes its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    made(x).sum().backward()
    peak = torch.cuda.max_memory_allocated() - start
    assert peak < 1.3 * 4096 * 4096 * 2, peak
