"""Several adapters over one base into one: which coefficients, and what becomes of each tensor?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from decompft.adapters.combine import (
    Thin,
    Truncated,
    concatenate,
    drop,
    nan_coefficients,
    padded,
    recompress,
    scaled_norm,
    thin_norm,
    ties,
    truncate,
    weighted_sum,
)
from decompft.launcher.worker.combining_parts import Base, Part
from decompft.launcher.worker.combining_rule import LINEAR, Rule
from decompft.launcher.worker.load import Progress, generator_for


class Combination:
    """A rule applied to parts, tensor by tensor: dense matrices of one layer exist at a time.

    Attributes:
        weights: names of the weights that some part's layers change, in the model's order.
        others: names of parameters that were trained whole, and of biases.
        is_thin: the change of every weight has factors, found without a dense matrix or the base.
        coefficients: tensor name -> one number a part, `rule.scale` included.
    """

    def __init__(self, parts: Sequence[Part], rule: Rule, base: Base, progress: Progress) -> None:
        """Computes the coefficients; NAN's take a pass over the parts, and over the base where norms need it."""
        self.parts, self.rule, self._base = parts, rule, base
        changed = {name for part in parts for name in part.layers}
        self.weights = [name for name in parts[0].outline.shapes if name in changed]
        self.others = sorted({name for part in parts for name in (*part.whole, *part.biases)})
        self.is_thin = rule.method in LINEAR and all(part.is_thin for part in parts)
        self.coefficients = self._coefficients(progress)

    @property
    def rank(self) -> int:
        """The largest rank of a layer's concatenated factors."""
        return max(sum(down.shape[0] for _, down in self._factors(name)[0]) for name in self.weights)

    def thin(self, name: str, rank: int) -> Truncated:
        """The change of a weight as factors of rank `rank`: all of it where that is enough, else the nearest."""
        if not self.is_thin:
            return truncate(self.change(name), rank, generator_for(self.rule.seed, f"svd:{name}"))
        found = concatenate(*self._factors(name))
        if found[1].shape[0] > rank:
            return recompress(found, rank)
        up, down = padded(found, rank)
        return Truncated(up=up, down=down, lost=0.0, norm=thin_norm(found))

    def change(self, name: str) -> Tensor:
        """The combined task vector of a weight, dense (out, in)."""
        weight = self._base.weight(name)
        return self._combined(name, [self._base.change(part, name, weight) for part in self.parts])

    def other(self, name: str) -> Tensor:
        """What a parameter that was trained whole, or a bias, becomes.

        A new head has no base that its change could be taken from: it is the weighted mean of the parts'.
        """
        base = self._base.tensor(name)
        if base is not None:
            taus = [part.other_change(name, base) for part in self.parts]
            return base + self._combined(name, taus)
        weights = self.coefficients[name]
        return weighted_sum([part.whole[name] for part in self.parts], [w / sum(weights) for w in weights])

    def _combined(self, name: str, taus: list[Tensor]) -> Tensor:
        rule, coefficients = self.rule, self.coefficients[name]
        if rule.method == "ties":  # a mean: the coefficients' own size falls out
            return rule.scale * ties(taus, coefficients, rule.density)
        if rule.method == "dare":
            taus = [
                drop(tau, rule.density, generator_for(rule.seed, f"{number}:{name}"))
                for number, tau in enumerate(taus)
            ]
        return weighted_sum(taus, coefficients)

    def _factors(self, name: str) -> tuple[list[Thin], list[float]]:
        """Factors and coefficients of the parts that change a weight."""
        found = [(part.layers[name].delta(), c) for part, c in self._weighted(name) if name in part.layers]
        return [thin for thin, _ in found if thin is not None], [c for _, c in found]

    def _weighted(self, name: str) -> list[tuple[Part, float]]:
        return list(zip(self.parts, self.coefficients[name], strict=True))

    def _coefficients(self, progress: Progress) -> dict[str, list[float]]:
        names = [*self.weights, *self.others]
        if self.rule.weights != "nan":
            fixed = [self.rule.scale * weight for weight in self.rule.weights]
            return dict.fromkeys(names, fixed)
        norms: dict[str, list[float]] = {}
        for done, name in enumerate(names, start=1):
            norms[name] = self._weight_norms(name) if name in self.weights else self._other_norms(name)
            progress(done, len(names))
        if self.rule.granularity == "model":
            rows = zip(*norms.values(), strict=True)
            norms = dict.fromkeys(names, [sum(norm**2 for norm in row) ** 0.5 for row in rows])
        return {n: [self.rule.scale * c for c in nan_coefficients(row)] for n, row in norms.items()}

    def _weight_norms(self, name: str) -> list[float]:
        layers = [part.layers.get(name) for part in self.parts]
        is_full = self.rule.norm_of == "full"
        deltas = [None if layer is None else layer.delta() for layer in layers]
        if not is_full and all(part.is_thin for part in self.parts):
            return [0.0 if delta is None else thin_norm(delta) for delta in deltas]
        weight = self._base.weight(name)
        norms = []
        for part, delta in zip(self.parts, deltas, strict=True):
            if is_full:
                norms.append(float(torch.linalg.norm(weight + self._base.change(part, name, weight))))
            elif delta is not None:
                norms.append(thin_norm(delta))
            elif (scaled := part.scaled(name, weight)) is not None:
                norms.append(scaled_norm(weight, *scaled))
            else:
                norms.append(float(torch.linalg.norm(self._base.change(part, name, weight))))
        return norms

    def _other_norms(self, name: str) -> list[float]:
        """Of a new head, the norm of the whole tensor: all of it was trained."""
        base = self._base.tensor(name)
        if base is None:
            return [float(torch.linalg.norm(part.whole[name])) for part in self.parts]
        taus = [part.other_change(name, base) for part in self.parts]
        kept = base if self.rule.norm_of == "full" else torch.zeros_like(base)
        return [float(torch.linalg.norm(kept + tau)) for tau in taus]
