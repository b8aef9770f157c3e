"""MAP over methods other than LoRA: D is the change that the inner method makes of the weight.

Additive, low-rank ones:  D = q up down,  N(D)^2 = q^2 tr((up^T up)(down down^T))   (METHODS 1.3, identity 1)
DoRA:  D = diag(rho - 1) W + rho s B A with rho = m / n, which is DoRA's merged weight minus W:

    W* = diag(a / N(W) + (b / N(D)) (rho - 1)) W + (b / N(D)) rho s B A
    N(D)^2 = sum_j (rho_j - 1)^2 |W_j|^2 + 2 (rho_j - 1) rho_j s <P_j, B_j> + rho_j^2 |s B_j A|^2,  P = W A^T

(eps beside both norms, as in decompft.adapters.map). N(D) is not detached; DoRA's n is. All of the inner
method's tensors train under their own names, with its start, its learning rates and its regulariser; what it
does between steps (AdaLoRA's allocation of ranks) it does not do here.
"""

from __future__ import annotations

from dataclasses import fields
from typing import cast

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, Facts, Settling
from decompft.adapters.dora import DoraLinear, norms_squared, row_norms
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.factors import Factors, WeightTimes
from decompft.adapters.inject import make_adapter
from decompft.adapters.map import Map
from decompft.adapters.spec import AdapterConfig, spec_of
from decompft.adapters.specs.base import inner_config

_TINY = 1e-37  # under the root: at D = 0 the norm is nearly 0 and has no slope, instead of an infinite one


def make_map_over(base: FrozenLinear, config: AdapterConfig) -> Map:
    """MAP over the method that the options name, any but LoRA."""
    return (MapOverDora if config.options.over == "dora" else MapOver)(base, config)


class MapOver(Map):
    """y = (a / (N(W) + eps)) W x + (b q / (N(D) + eps)) up down x + bias, of the inner method's factors."""

    inner: Adapter

    def __init__(self, base: FrozenLinear, config: AdapterConfig) -> None:
        super().__init__(base, config)
        with torch.device("meta"):
            inner = make_adapter(base, inner_config(config))
        self.num_inner = len(inner.shapes), len(inner.fixed_shapes)
        # its formula is wanted, not its tensors, which are parameters and buffers of this module
        inner._parameters.clear()
        inner._buffers.clear()
        object.__setattr__(self, "inner", inner)  # no submodule: there is one adapter here

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        found = self.inner.factors(trained[: self.num_inner[0]], fixed[: self.num_inner[1]])
        up, down = cast(Tensor, found.up), cast(Tensor, found.down)
        square = torch.dot((up.T @ up).view(-1), (down @ down.T).view(-1)).reshape(1)
        norm = (found.q * square.clamp_min(_TINY).sqrt()).abs()
        per_a, per_b = self.per_norm(trained, fixed, norm)
        return Factors(up=up, down=down, q=found.q * per_b, row=per_a)

    def per_norm(
        self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...], norm: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(a / (N(W) + eps), w b / (N(D) + eps)), both (1,), w the warm-up of b; notes N(D) for `settling`."""
        a, b = trained[self.num_inner[0] :]
        eps = self.config.options.eps
        self._update_norm = norm.detach()
        return a / (fixed[self.num_inner[1]] + eps), self._warmup * b / (norm + eps)

    def penalty(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Tensor | None:
        self.inner.num_siblings = self.num_siblings
        return self.inner.penalty(trained[: self.num_inner[0]], fixed[: self.num_inner[1]])

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        return self.inner.initial_values(generator, facts) | self.magnitudes(facts)

    def lr_scales(self) -> dict[str, float]:
        options, inner = self.config.options, self.inner.lr_scales()
        ratio = options.magnitude_lr_ratio
        return {**inner, "B": options.lr_ratio * inner.get("B", 1.0), "a": ratio, "b": ratio}

    def no_decay(self) -> tuple[str, ...]:
        return self.inner.no_decay()

    def settling(self) -> dict[str, Settling]:
        """As in MapLinear, of the tensors that alone have a slope at D = 0: those that keep D there."""
        options, inner = self.config.options, self.inner.config
        if not options.settle_norm or self._update_norm is None:
            return {}
        wait = Settling(size=self._update_norm, offset=options.eps, limit=options.settle_norm)
        without = spec_of(inner).zero_grad_at_start(inner)
        return {name: wait for name in self.inner.shapes if name not in without}


class MapOverDora(MapOver):
    """Trains A, B, m, a, b. At the start rho is exactly 1 and B is 0: D is 0."""

    reads_weight = True
    pulls_through_weight = True
    note_has_slope = True

    def note(
        self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...], times: WeightTimes
    ) -> tuple[Tensor, ...]:
        """DoRA's n (out,), a constant, and P (out, rank), which depends on A."""
        A, B, *_ = trained
        P = times(A)
        with torch.no_grad():
            n = row_norms(A, B, fixed[0], P, self.scaling)
        return n, P

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        A, B, m, _, _ = trained
        rn2, _, n, P = fixed
        s, rho = self.scaling, m / n
        change = rho - 1
        cross = s * torch.linalg.vecdot(P, B)
        thin = (s * s) * torch.linalg.vecdot(B @ (A @ A.T), B)
        squares = change.square() * rn2 + 2 * change * rho * cross + rho.square() * thin
        norm = squares.sum().clamp_min(_TINY).sqrt().reshape(1)
        per_a, per_b = self.per_norm(trained, fixed, norm)
        return Factors(up=B * (rho * s).view(-1, 1), down=A, q=per_b, row=per_a + per_b * change)

    def fixed_over(self, dense: Tensor) -> tuple[Tensor, ...]:
        """DoRA's n is of the weight that is merged into; N(W) stays the one that a was trained with."""
        return (norms_squared(dense), *self.fixed()[1:])

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """The default's, and dA += dP^T W for the slope that A has through P."""
        assert weight is not None
        *constants, P = fixed
        with torch.enable_grad():
            leaves = tuple(t.detach().requires_grad_(True) for t in (*trained, P))
            again = self.factors(leaves[:-1], (*constants, leaves[-1]))
            names = [f.name for f in fields(Factors) if isinstance(getattr(grads, f.name), Tensor)]
            outputs = [getattr(again, name) for name in names]
        slopes = [getattr(grads, name) for name in names]
        dA, *others, dP = torch.autograd.grad(outputs, leaves, slopes)
        return (dA + (dP.to(weight.dtype).T @ weight).to(dA.dtype), *others)

    @property
    def scaling(self) -> float:
        return cast(DoraLinear, self.inner).scaling
