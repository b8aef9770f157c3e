"""MAP's scales of all layers once a step: on a CPU by the kernels' twins, in their place."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from test_kernel_norm import pull_by_the_twin, scales_by_the_twin
from test_recompute import BF16, METHODS, batch
from tiny_models import FAMILIES, built
from torch import Tensor

from decompft.adapters.copies import round_factors
from decompft.adapters.inject import adapters
from decompft.adapters.kernels import norm, norm_many
from decompft.adapters.map import MapLinear
from decompft.launcher.recipe import AdapterSection, ModelSection
from decompft.launcher.worker.module_state import ModuleState

LLAMA = ModelSection(config=FAMILIES["llama"], weights="random")
# in one model: other scalings, eps and ranks
MIXED = AdapterSection(
    method="map", rank=4, alpha=8.0,
    overrides=[
        {"targets": ["q_proj"], "alpha": 2.0},
        {"targets": ["gate_proj"], "options": {"eps": 1e-2}},
        {"targets": ["o_proj"], "rank": 2},
    ],
)  # fmt: skip
WARM = AdapterSection(method="map", rank=4, alpha=8.0, options={"b_warmup_steps": 3})


class ManyTwin:
    """Layer by layer."""

    made = 0

    def __init__(
        self, layers: Sequence[norm_many.Layer], dtype: torch.dtype, *, eps: float, s: float
    ) -> None:
        self._given, self._dtype, self._options = layers, dtype, {"eps": eps, "s": s}
        self.layers = [self._one(layer) for layer in layers]

    def _one(self, layer: norm_many.Layer) -> norm_many.Made:
        grams, found = norm.scales(*layer, **self._options)
        return norm_many.Made(grams, found, (layer[1] * norm.views(grams, found).q).to(self._dtype))

    @torch.no_grad()
    def refresh(self) -> None:
        ManyTwin.made += 1
        for place, layer in zip(self.layers, self._given, strict=True):
            for tensor, value in zip(place, self._one(layer), strict=True):
                tensor.copy_(value)


@pytest.fixture(autouse=True)
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    ManyTwin.made = 0
    monkeypatch.setattr(norm, "fits", lambda A, B: not torch.is_grad_enabled())
    # five scalars in a row each, as the kernel has them
    monkeypatch.setattr(
        norm, "scales",
        lambda *given, **options: (lambda g, f: (g, f.view(5, 1)))(*scales_by_the_twin(*given, **options)),
    )  # fmt: skip
    monkeypatch.setattr(norm, "pull_", pull_by_the_twin)
    monkeypatch.setattr(norm_many, "runs", lambda device, dtype: True)
    monkeypatch.setattr(norm_many, "Many", ManyTwin)


def model(adapter: AdapterSection = METHODS["map"]):
    found = built(LLAMA, BF16, adapter)
    moved = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.trained.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=moved)
    return found


def gradients(found, *, ahead: bool) -> list[Tensor]:
    rounded = round_factors(found.model.model, torch.bfloat16)
    if ahead:
        rounded.refresh()
    loss = found.model.train()(batch())
    loss.backward()
    rounded.drop()
    grads = [p.grad.clone() for p in found.trained.values()]
    found.model.zero_grad()
    return [loss.detach(), *grads]


@pytest.mark.parametrize(("adapter", "groups"), [(METHODS["map"], 1), (MIXED, 4)], ids=["alike", "mixed"])
def test_a_step_has_the_numbers_of_scales_that_each_pass_makes(adapter, groups) -> None:
    found = model(adapter)
    plain, ahead = gradients(found, ahead=False), gradients(found, ahead=True)
    assert ManyTwin.made == groups
    # A is rounded to bfloat16 once instead of in each pass: to the same
    assert all(torch.equal(a, b) for a, b in zip(plain, ahead, strict=True))


def test_scales_follow_their_tensors_from_step_to_step() -> None:
    found = model()
    rounded = round_factors(found.model.model, torch.bfloat16)
    norms = []
    for _ in range(2):
        rounded.refresh()
        found.model.train()(batch()).backward()
        rounded.drop()
        norms.append([float(layer._update_norm) for _, layer in adapters(found.model.model)])
        with torch.no_grad():
            for parameter in found.trained.values():
                parameter *= 1.5
        assert all(layer.made_ahead is None for _, layer in adapters(found.model.model))
    for one, two in zip(*norms, strict=True):
        assert two == pytest.approx(2.25 * one, rel=1e-5)


def test_what_was_written_to_meanwhile_is_computed_anew() -> None:
    found = model()
    rounded = round_factors(found.model.model, torch.bfloat16)
    rounded.refresh()
    layer = next(layer for _, layer in adapters(found.model.model))
    with torch.no_grad():
        before = layer.factors(layer.trained(), layer.fixed())
        layer.B *= 2
        after = layer.factors(layer.trained(), layer.fixed())
    assert before.up is layer.made_ahead.up and before.up.dtype == torch.bfloat16
    assert after.up is not before.up and after.up.dtype == torch.float32


def test_scales_are_of_no_other_tensors() -> None:
    """Nor of a tensor with other data, of a parameter in its place, or of what somebody differentiates."""
    found = model()
    rounded = round_factors(found.model.model, torch.bfloat16)
    rounded.refresh()
    layer = next(layer for _, layer in adapters(found.model.model))

    def is_ahead(trained: tuple[Tensor, ...]) -> bool:
        return layer.factors(trained, layer.fixed()).up is layer.made_ahead.up

    assert not is_ahead(layer.trained())
    with torch.no_grad():
        assert is_ahead(layer.trained())
        assert not is_ahead(tuple(t.clone() for t in layer.trained()))
        twin = deepcopy(layer)
        assert twin.factors(twin.trained(), twin.fixed()).up is not twin.made_ahead.up
        before = layer.B.data
        layer.B.data = before.clone()
        assert not is_ahead(layer.trained())
        layer.B.data = before
        layer.B = torch.nn.Parameter(2 * before)
        rounded.refresh()
        assert not is_ahead(layer.trained())


def test_while_b_warms_up_each_pass_makes_its_own() -> None:
    found = model(WARM)
    rounded = round_factors(found.model.model, torch.bfloat16)
    rounded.refresh()
    layer = next(layer for _, layer in adapters(found.model.model))
    for step, is_ahead in ((0, False), (1, False), (2, True)):
        layer.on_step(step)
        with torch.no_grad():
            assert (layer.factors(layer.trained(), layer.fixed()).up is layer.made_ahead.up) == is_ahead


def test_a_recording_of_one_step_does_for_the_next() -> None:
    """A refresh changes values and versions, and nothing that a recorded pass is looked at for."""
    found = model()
    rounded = round_factors(found.model.model, torch.bfloat16)
    rounded.refresh()
    found.model.train()(batch()).backward()
    state = ModuleState(
        found.model, but={(m, "_update_norm") for m in found.model.modules() if isinstance(m, MapLinear)}
    )
    rounded.drop()
    with torch.no_grad():
        for parameter in found.trained.values():
            parameter *= 1.5
    rounded.refresh()
    assert not state.has_changed()


@pytest.mark.gpu
def test_layers_together_on_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for dtype in (torch.bfloat16, torch.float16):
        assert norm_many.PROVED.runs(device, dtype), norm_many.PROVED.reason(device, dtype)
