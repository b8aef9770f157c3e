"""Models whose activation adds the branches of gate and up: the numbers of those that write them."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_frozen_norms import assert_close, numbers_on_gpu
from test_kernel_swiglu import Twins
from test_recompute import BF16, LORA, METHODS, assert_equal, batch, gradients
from tiny_models import FAMILIES, PLAIN, built, saved, section
from torch import Tensor

from decompft.adapters.kernels import swiglu as kernel
from decompft.launcher.recipe import AdapterSection, QuantizationSection
from decompft.launcher.recompute import MODES, Recompute
from decompft.launcher.worker import chosen_kernels
from decompft.launcher.worker.gated import use_gated

OURS = [name for name, fields in FAMILIES.items() if fields["model_type"] in kernel.FAMILIES]


class Ours(Twins):
    """Twins in the kernels' place, and MLPs put in place as on a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.mlps = 0
        monkeypatch.setattr(chosen_kernels, "_prove_kernels", self._put)

    def _put(self, hf: Any, engine: Any, format: str, dtype: torch.dtype, recompute: Recompute) -> str:
        self.mlps = use_gated(hf)
        return ""


def close(plain: Any, ours: Any, rtol: float) -> None:
    """As of norms, but for losses, which differ by rounding: branches are not rounded here."""
    assert ours[0] == pytest.approx(plain[0], rel=rtol)
    assert_close((plain[0], plain[1]), (plain[0], ours[1]), rtol)


@pytest.mark.parametrize("family", OURS)
def test_every_family_has_the_losses_and_slopes_of_its_own_mlp(tmp_path, family, monkeypatch) -> None:
    """Of two micro batches, in every mode."""
    model = section(saved(tmp_path, FAMILIES[family])[0])
    plain = gradients(model, PLAIN, LORA, "none")
    ours = Ours(monkeypatch)
    layers = FAMILIES[family]["num_hidden_layers"]
    found = {}
    for mode in MODES:
        ours.branches.clear()
        found[mode] = gradients(model, PLAIN, LORA, mode)
        close(plain, found[mode], 1e-5)
        assert_equal(found["none"], found[mode])
        assert ours.mlps == layers
        again = mode in ("selective", "full", "offloaded")
        assert ours.branches == [(True, True)] * (2 * layers * (1 + again)), mode
    ours.branches.clear()
    assert_equal(found["none"], gradients(model, PLAIN, LORA, "selective", count=0))
    assert ours.branches == [(True, True)] * (4 * layers), "activations alone are made again"


@pytest.mark.parametrize("method", METHODS)
def test_methods_have_the_slopes_of_the_mlps_that_were_there(tiny_llama, method, monkeypatch) -> None:
    plain = gradients(tiny_llama, PLAIN, METHODS[method], "none")
    ours = Ours(monkeypatch)
    close(plain, gradients(tiny_llama, PLAIN, METHODS[method], "none"), 1e-5)
    alone = method in ("liera", "lora-dropout")
    assert bool(ours.branches) == (not alone), "they compute linear by linear"


@pytest.mark.parametrize("method", ["lora", "map", "dora"])
def test_modes_have_equal_numbers_in_bfloat16(tiny_llama, method, monkeypatch) -> None:
    Ours(monkeypatch)
    plain = gradients(tiny_llama, BF16, METHODS[method], "none")
    for mode in MODES[1:]:
        assert_equal(plain, gradients(tiny_llama, BF16, METHODS[method], mode))
    assert_equal(plain, gradients(tiny_llama, BF16, METHODS[method], "selective", count=0))


@pytest.mark.parametrize("method", ["lora", "map"])
def test_float8_products_have_their_branches(tiny_llama, method, monkeypatch) -> None:
    """Rounded to bfloat16 once less, by which codes of float8 turn: nearer to it than it is to bfloat16."""
    fp8 = QuantizationSection(format="nf4", compute="fp8")

    def found(quantization: QuantizationSection) -> Tensor:
        _, slopes = gradients(tiny_llama, quantization, METHODS[method], "none")
        return torch.cat([slope.flatten() for slope in slopes.values()])

    plain, bfloat16 = found(fp8), found(BF16)
    ours = Ours(monkeypatch)
    one = found(fp8)
    assert ours.branches
    assert (one - plain).norm() <= 0.75 * (plain - bfloat16).norm()


def test_targets_may_leave_one_out(tiny_llama, monkeypatch) -> None:
    adapter = AdapterSection(method="lora", rank=4, alpha=8.0, targets=["up_proj", "down_proj"])
    plain = gradients(tiny_llama, PLAIN, adapter, "none")
    ours = Ours(monkeypatch)
    close(plain, gradients(tiny_llama, PLAIN, adapter, "none"), 1e-5)
    assert set(ours.branches) == {(False, True)}


def test_evaluation_and_generation_are_the_same(tiny_llama, monkeypatch) -> None:
    prompt = torch.arange(3, 9).view(1, 6)

    def found() -> tuple[Tensor, Tensor]:
        made = built(tiny_llama, PLAIN, LORA).model.eval()
        with torch.no_grad():
            said = made.model.generate(prompt, max_new_tokens=8, do_sample=False)
            return made(batch()), said

    plain = found()
    ours = Ours(monkeypatch)
    for one, other in zip(found(), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0.0)
    assert len(ours.branches) >= 8 * ours.mlps and not ours.dots


@pytest.mark.parametrize("method", ["lora", "map", "dora"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_saved_is_let_go_of(tiny_llama, method, mode, monkeypatch) -> None:
    """Of a branch nothing outlives a forward pass that is run again, and nothing at all a backward pass."""
    ours = Ours(monkeypatch)
    seen: list[weakref.ref[Tensor]] = []

    def forward(gate: Tensor, up: Tensor, *branches: kernel.Branch | None) -> Tensor:
        seen.extend(weakref.ref(t) for branch in branches for t in branch or ())
        return ours.forward(gate, up, *branches)

    def backward(*args: Any) -> Any:
        dots = ours.backward(*args)
        seen.extend(weakref.ref(t) for t in dots if t is not None)
        return dots

    monkeypatch.setattr(kernel, "forward", forward)
    monkeypatch.setattr(kernel, "backward", backward)
    model = built(tiny_llama, BF16, METHODS[method], recompute=mode).model.train()
    loss = model(batch())
    count = 4 * ours.mlps
    assert len(seen) == count
    if mode in ("selective", "full", "offloaded"):
        assert not any(ref() is not None for ref in seen)
    loss.backward()
    assert len(seen) > count or mode in ("none", "norms")
    assert not any(ref() is not None for ref in seen), "while the loss is there"


def test_a_graph_that_was_written_over_is_not_walked_again(tiny_llama, monkeypatch) -> None:
    ours = Ours(monkeypatch)

    def unseen(dy: Tensor, gate: Tensor, up: Tensor, *rest: Any) -> Any:
        """As a kernel writes."""
        arrays = gate.clone(), up.clone()
        found = ours.backward(dy, *arrays, *rest)
        gate.data.copy_(arrays[0])
        up.data.copy_(arrays[1])
        return found

    monkeypatch.setattr(kernel, "backward", unseen)
    loss = built(tiny_llama, PLAIN, LORA).model.train()(batch())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


def test_what_does_not_fit_goes_where_it_went(tiny_llama, monkeypatch) -> None:
    ours = Ours(monkeypatch)
    made = built(tiny_llama, PLAIN, LORA).model.train()
    made(batch())
    count = len(ours.branches)
    monkeypatch.setattr(kernel, "fits", lambda x: False)
    made(batch())
    assert len(ours.branches) == count > 0


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_who_watches_a_linear_sees_its_calls(tiny_llama, kind, monkeypatch) -> None:
    ours = Ours(monkeypatch)
    made = built(tiny_llama, PLAIN, LORA).model.train()
    seen: list[Any] = []
    layer = made.model.model.layers[0].mlp.gate_proj
    handle = getattr(layer, f"register_{kind}_hook")(lambda *given: seen.append(given[0]))
    made(batch()).backward()
    assert len(seen) == 1 and len(ours.branches) == ours.mlps - 1
    handle.remove()
    made(batch()).backward()
    assert len(seen) == 1 and len(ours.branches) == 2 * ours.mlps - 1


@pytest.mark.parametrize(("family", "act"), [("gemma", "silu"), ("llama", "gelu")])
def test_other_families_and_activations_are_left_alone(family: str, act: str) -> None:
    hf = SimpleNamespace(config=SimpleNamespace(model_type=family, hidden_act=act))
    assert use_gated(hf) == 0


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["lora", "map", "dora"])
def test_a_llama_on_a_gpu_is_close_to_itself_without(method: str, mode: Recompute, monkeypatch) -> None:
    loss, slopes, kernels = numbers_on_gpu(BF16, METHODS[method], mode)
    assert "swiglu" in kernels.partition(" (proved")[0]
    monkeypatch.setattr(kernel, "fits", lambda x: False)  # as where DECOMPFT_TRITON is 0
    plain_loss, plain_slopes, _ = numbers_on_gpu(BF16, METHODS[method], mode)
    # a rounding less an array, over four blocks
    assert loss == pytest.approx(plain_loss, rel=2**-8)
    for name, expected in plain_slopes.items():
        if expected.numel() > 1:  # slopes of MAP's scalars are sums that cancel
            assert (slopes[name] - expected).norm() <= 0.05 * expected.norm(), name
