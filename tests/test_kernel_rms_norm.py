"""RMSNorm with a frozen weight: the kernels, and the nodes of autograd that they stand in, by themselves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from decompft.adapters.frozen.rms_norm import rms_norm, rms_norm_and_residual
from decompft.adapters.kernels import rms_norm as kernel
from decompft.launcher.worker.norms import use_norms

EPS = 1e-5
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# rows of heads, odd ones, 7B's, the widest, and a step's
SHAPES = ((5000, 128), (7, 100), (3, 4096), (2, 5000), (2, kernel.MAX_COLUMNS), (8192, 4096))


class Twins:
    """In the kernels' place, on a CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards = 0
        self.sums: list[bool] = []  # of each backward: did it add
        monkeypatch.setattr(kernel, "fits", lambda x, weight: x.dtype == weight.dtype and x.is_contiguous())
        monkeypatch.setattr(kernel, "forward", self.forward)
        monkeypatch.setattr(kernel, "backward", self.backward)

    def forward(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        assert x_TH.dim() == 2
        self.forwards += 1
        return kernel.plain_forward(x_TH, weight_H, eps)

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, other: Tensor | None) -> Tensor:
        self.sums.append(other is not None)
        assert all(t.is_contiguous() and t.shape == x.shape for t in (dy, x, other) if t is not None)
        return kernel.plain_backward(dy, x, weight, rstd, other)


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> Twins:
    return Twins(monkeypatch)


def drawn(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=draw).to(dtype) for size in sizes]


def llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    """transformers' own."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(len(weight), EPS)
    norm.weight = nn.Parameter(weight, requires_grad=False)
    return norm(x)


def in_float64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Transformers' lines, but for its casts to float32."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


# --- the twins ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_twin_rounds_as_transformers_does(dtype: torch.dtype) -> None:
    x, weight = drawn((7, 100), (100,), dtype=dtype)
    assert torch.equal(kernel.plain_forward(x, weight, EPS)[0], llama_norm(x, weight))


def test_the_twins_slope_is_autograds() -> None:
    x, weight, dy, other = drawn((7, 100), (100,), (7, 100), (7, 100))
    x.requires_grad_(True)
    y = in_float64(x, weight, EPS)
    (expected,) = torch.autograd.grad(y, x, dy)
    found, rstd = kernel.plain_forward(x.detach(), weight, EPS)
    torch.testing.assert_close(found, y.detach())
    torch.testing.assert_close(kernel.plain_backward(dy, x.detach(), weight, rstd, None), expected)
    torch.testing.assert_close(kernel.plain_backward(dy, x.detach(), weight, rstd, other), expected + other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_twins_sum_is_that_of_a_separate_addition(dtype: torch.dtype) -> None:
    x, weight, dy, other = drawn((7, 100), (100,), (7, 100), (7, 100), dtype=dtype)
    _, rstd = kernel.plain_forward(x, weight, EPS)
    dx = kernel.plain_backward(dy, x, weight, rstd, None)
    assert dx.dtype == dtype
    assert torch.equal(kernel.plain_backward(dy, x, weight, rstd, other), dx + other)


def test_programs_have_a_row_or_several_short_ones() -> None:
    assert [kernel.tile_of(n) for n in (100, 128, 1024, 4096, 5000, 16384)] == [
        (16, 128, 4), (16, 128, 4), (2, 1024, 4), (1, 4096, 8), (1, 8192, 16), (1, 16384, 32),
    ]  # fmt: skip


def test_a_cpu_takes_the_plain_way() -> None:
    assert not kernel.fits(torch.randn(7, 40), torch.randn(40))


# --- the nodes ---


def slopes(norm, x: Tensor, weight: Tensor, *, uses: str = "both") -> list[Tensor]:
    """y, and the slope of what x is made of; `uses`: of y and of x behind the norm."""
    leaf = x.clone().requires_grad_(True)
    stream = 1.5 * leaf
    y = norm(stream, weight, EPS)
    g, h = drawn(x.shape, x.shape, dtype=x.dtype)
    ends = {"both": (y * g).sum() + (stream * h).sum(), "y": (y * g).sum(), "x": (stream * h).sum()}
    return [y.detach(), *torch.autograd.grad(ends[uses], leaf)]


@pytest.mark.parametrize("norm", [rms_norm, rms_norm_and_residual])
@pytest.mark.parametrize("uses", ["both", "y", "x"])
def test_nodes_have_autograds_slopes(twins: Twins, norm, uses: str) -> None:
    x, weight = drawn((2, 7, 40), (40,))
    expected = slopes(in_float64, x, weight, uses=uses)
    torch.testing.assert_close(slopes(norm, x, weight, uses=uses), expected)
    sums = norm is rms_norm_and_residual and uses == "both"
    assert twins.sums == ([] if uses == "x" else [sums])


def test_x_stays_the_same_tensor_and_goes_on_from_the_node(twins: Twins) -> None:
    x, weight = drawn((2, 7, 40), (40,))
    stream = 1.5 * x.requires_grad_(True)
    before, held = stream.detach().clone(), stream
    y = rms_norm_and_residual(stream, weight, EPS)
    assert held is stream and torch.equal(stream, before)
    assert stream.grad_fn is y.grad_fn and type(y.grad_fn).__name__ == "_NormAndResidualBackward"


def test_hooks_on_x_from_before_see_the_whole_slope(twins: Twins) -> None:
    """An engine hangs hooks on a block's output, which is the next one's x."""
    x, weight = drawn((2, 7, 40), (40,))
    stream = 1.5 * x.requires_grad_(True)
    seen: list[Tensor] = []
    stream.register_hook(lambda slope: seen.append(slope))
    y = rms_norm_and_residual(stream, weight, EPS)
    (y.sum() + stream.sum()).backward()
    torch.testing.assert_close(1.5 * seen[0], x.grad)
    assert len(seen) == 1


def test_a_leaf_and_a_view_are_left_as_they_are(twins: Twins) -> None:
    x, weight = drawn((7, 40), (40,))
    leaf = x.clone().requires_grad_(True)
    view = (1.5 * leaf).view(7, 40)
    for given in (leaf, view):
        node, version = given.grad_fn, given._version
        y = rms_norm_and_residual(given, weight, EPS)
        assert given.grad_fn is node and given._version == version
        assert type(y.grad_fn).__name__ == "_NormBackward"


def test_without_gradients_nothing_is_saved(twins: Twins) -> None:
    x, weight = drawn((7, 40), (40,))
    with torch.no_grad():
        stream = 1.5 * x.clone().requires_grad_(True)
        assert rms_norm_and_residual(stream, weight, EPS).grad_fn is None
    assert rms_norm_and_residual(x, weight, EPS).grad_fn is None, "a frozen embedding's output"
    assert twins.forwards == 2


@pytest.mark.parametrize("norm", [rms_norm, rms_norm_and_residual])
def test_x_and_rstd_are_all_that_is_saved(twins: Twins, norm) -> None:
    x, weight = drawn((2, 7, 40), (40,), dtype=torch.float32)
    stream = 1.5 * x.requires_grad_(True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = norm(stream, weight, EPS)
    assert [t.data_ptr() for t in saved[:2]] == [stream.data_ptr(), weight.data_ptr()]
    assert [(t.shape, t.dtype) for t in saved[2:]] == [((14,), torch.float32)]
    # else the node, which hooks hold, would hold itself
    assert norm is rms_norm or all(t.grad_fn is None for t in saved)
    y.sum().backward()


def test_a_graph_may_be_walked_twice(twins: Twins) -> None:
    x, weight = drawn((7, 40), (40,))
    x.requires_grad_(True)
    stream = 1.5 * x
    end = rms_norm_and_residual(stream, weight, EPS).sum() + stream.sum()
    end.backward(retain_graph=True)
    once = x.grad.clone()
    end.backward()
    torch.testing.assert_close(x.grad, 2 * once)


def test_who_saved_x_before_is_told(twins: Twins) -> None:
    """Why a checkpointed block's first norm takes the plain way: the checkpoint saved its input."""
    x, weight = drawn((7, 40), (40,))

    def block(stream: Tensor) -> Tensor:
        return rms_norm_and_residual(stream, weight, EPS) + stream

    end = checkpoint(block, 1.5 * x.requires_grad_(True), use_reentrant=False).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        end.backward()


# --- the modules ---


class Tiny(nn.Module):
    def __init__(self, family: str = "llama") -> None:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        super().__init__()
        self.config = SimpleNamespace(model_type=family)
        self.norm = LlamaRMSNorm(40, EPS).requires_grad_(False)


def test_what_does_not_fit_goes_where_it_went(twins: Twins) -> None:
    model = Tiny()
    assert use_norms(model, "none") == 1
    (x,) = drawn((7, 40), dtype=torch.float32)
    model.norm(x)
    assert twins.forwards == 1
    for other in (x.double(), x.T.contiguous().T):
        assert torch.equal(model.norm(other), Tiny().norm(other))
    assert twins.forwards == 1


def test_norms_that_train_and_other_families_are_left_alone() -> None:
    trains = Tiny()
    trains.norm.requires_grad_(True)
    for model in (trains, Tiny("gemma")):
        assert use_norms(model, "none") == 0 and "forward" not in vars(model.norm)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SHAPES)
def test_kernels_on_a_gpu(size: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, dy, other = (t.cuda() for t in drawn(size, size[1:], size, size, dtype=dtype))
    assert kernel.fits(x, weight), kernel.PROVED.reason(x.device, dtype)
    kernel.example(x.device, dtype, size)
    y, rstd = kernel.forward(x, weight, EPS)
    twin_y, twin_rstd = kernel.plain_forward(x, weight, EPS)
    # rounded twice, and float32 sums in another order
    spacing = torch.finfo(dtype).eps
    torch.testing.assert_close(rstd, twin_rstd, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(y, twin_y, rtol=2 * spacing + 1e-5, atol=spacing**2)
    dx = kernel.backward(dy, x, weight, rstd, None)
    twin_dx = kernel.plain_backward(dy, x, weight, rstd, None)
    torch.testing.assert_close(dx, twin_dx, rtol=spacing, atol=1e-5 * float(twin_dx.abs().max()))
    total = kernel.backward(dy, x, weight, rstd, other)
    assert torch.equal(total, dx + other), "a block that is run again adds them by itself"
    assert torch.equal(total, kernel.backward(dy, x, weight, rstd, other))
    assert torch.equal(y, kernel.forward(x, weight, EPS)[0])


@pytest.mark.gpu
def test_what_does_not_fit_on_a_gpu() -> None:
    x, weight = (t.cuda() for t in drawn((64, 40), (40,), dtype=torch.bfloat16))
    assert kernel.fits(x, weight)
    assert not kernel.fits(x.double(), weight.double())
    assert not kernel.fits(x, weight.float()), "y would be float32"
    assert not kernel.fits(x[:, ::2], weight[:20].clone()), "no two numbers beside each other"
    assert not kernel.fits(x[:0], weight)
    wide = x.new_zeros(2, kernel.MAX_COLUMNS + 1)
    assert not kernel.fits(wide, wide[0])
