"""Column scales and their gradients: Triton beside plain torch, and the row scales of a whole linear on a GPU."""

from __future__ import annotations

import pytest
import torch

from decompft.adapters.frozen.fourbit import Nf4Linear
from decompft.adapters.inject import make_adapter
from decompft.adapters.kernels.columns import dot, dot_columns, dot_columns_and_scale_, times_columns
from decompft.adapters.spec import ADAPTER_SPECS, AdapterConfig

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
SHAPES = ((1, 1), (3, 129), (257, 128), (1000, 300))


def arrays(shape: tuple[int, int], device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(sum(shape))
    a, b = (torch.randn(shape, generator=draw).to(device, dtype) for _ in range(2))
    return a, b, torch.randn(shape[1], generator=draw).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    a, b, scale = arrays(shape, device, dtype)
    exact = a.double() * b.double()
    scaled = (b.float() * scale).to(dtype)
    near = {
        "rtol": 1e-2 if dtype == torch.bfloat16 and device == "cpu" else 1e-4,
        "atol": 1e-2 * shape[0] ** 0.5,
    }
    torch.testing.assert_close(times_columns(b, scale), scaled, rtol=0, atol=0)
    torch.testing.assert_close(dot_columns(a, b).double(), exact.sum(0), **near)
    near["atol"] *= shape[1] ** 0.5
    torch.testing.assert_close(dot(a, b).double(), exact.sum(), **near)
    found = dot_columns_and_scale_(a, b, scale)
    torch.testing.assert_close(b, scaled, rtol=0, atol=0)
    torch.testing.assert_close(found.double(), exact.sum(0), rtol=near["rtol"], atol=1e-2 * shape[0] ** 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [300, 304])
def test_rows_of_a_wider_array(stride: int) -> None:
    a, b, scale = (t[..., :300] for t in arrays((77, stride), "cuda", torch.bfloat16))
    torch.testing.assert_close(dot_columns(a, b), (a.float() * b.float()).sum(0), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(times_columns(a, scale), (a.float() * scale).bfloat16(), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["dora", "ssb", "ssl", "ia3", "map", "liera", "lora"])
def test_bfloat16_on_a_gpu_is_near_float32(method: str) -> None:
    torch.manual_seed(0)
    base = Nf4Linear(1408, 1024, block_size=64, double_quant=True, bias_dtype=None).cuda()
    for parameter, rows in zip(
        base.storage(), base.pack(torch.randn(1024, 1408, device="cuda") * 0.02), strict=True
    ):
        parameter.data.copy_(rows)
    options = ADAPTER_SPECS[method].options()
    config = AdapterConfig(method=method, rank=8, alpha=16.0, dropout=0.0, options=options)
    with torch.device("cuda"):
        layer = make_adapter(base, config)
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            size = tuple(tensor.shape)
            at_norm = base.dense(torch.float32).square().sum(1).sqrt()
            if name == "rn2":
                tensor.copy_(at_norm.square())
            elif name == "m":
                tensor.copy_(at_norm * (1 + 0.1 * torch.randn(size, device="cuda")))
            elif len(size) < 2:
                tensor.copy_(1 + 0.1 * torch.randn(size, device="cuda"))
            else:
                tensor.copy_(0.05 * torch.randn(size, device="cuda"))
    x = torch.randn(300, 1408, device="cuda")
    g = torch.randn(300, 1024, device="cuda")
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for parameter in layer.parameters():
            parameter.grad = None
        given = x.to(dtype, copy=True).requires_grad_(True)
        y = layer(given)
        y.backward(g.to(dtype))
        grads = {n: p.grad for n, p in layer.named_parameters(recurse=False) if p.grad is not None}
        found[dtype] = {"y": y.detach(), "x": given.grad, **grads}
    assert set(found[torch.float32]) == set(found[torch.bfloat16])
    for name, exact in found[torch.float32].items():
        near = found[torch.bfloat16][name].float()
        error = (near - exact).norm() / exact.norm()
        assert error < 2e-2, f"{method} {name}: {error:.4f}"
