"""What do adapters need to know of the base: norms of the weight that is used, factors of the full-precision one?

Norms are summed while the base streams by, each rank over the numbers that live with it. Factors (SVD,
QR) are made before that, one matrix at a time: one rank reads the whole weight, makes them or finds them
on disk, and gives them to the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from decompft.adapters.base import Adapter
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.inject import adapters
from decompft.adapters.spec import spec_of
from decompft.launcher.errors import AdapterError
from decompft.launcher.refusals import over_codes
from decompft.launcher.worker.engines.base import Engine, full_shape
from decompft.launcher.worker.matching import Want
from decompft.launcher.worker.spectrum_cache import SpectrumCache
from decompft.launcher.worker.tensors import TensorSource

Values = dict[str, float | Tensor]


def needs(adapter: Adapter) -> tuple[str, ...]:
    """The facts that an adapter's spec asks for."""
    return spec_of(adapter.config).needs(adapter.config)


class Measures:
    """Norms of the weights that are used, summed chunk by chunk and then over ranks."""

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        self._engine = engine
        self._sums: dict[int, dict[str, Tensor]] = {}
        self._names: dict[int, str] = {}
        self._numel: dict[int, int] = {}
        for name, adapter in adapters(model):
            base, wanted = adapter.base, needs(adapter)
            sizes = {
                "frobenius_norm": 1,
                "row_norms": base.out_features,
                "column_norms": base.in_features,
                "zero_fraction": 1,
            }
            wanted = tuple(w for w in wanted if w in sizes)
            if wanted:
                self._names[id(base)] = name
                self._numel[id(base)] = base.out_features * base.in_features
                self._sums[id(base)] = {
                    w: torch.zeros(sizes[w], dtype=torch.float64, device=engine.device) for w in wanted
                }

    def add(self, layer: FrozenLinear, codes: Tensor, first: int, packed: tuple[Tensor, ...]) -> None:
        """Count the numbers of these rows that live here, as they will be used.

        Args:
            codes: the parameter whose span says what lives here.
            first: the first of the rows.
        """
        sums = self._sums.get(id(layer))
        if sums is None:
            return
        used = layer.unpack(packed, torch.float32)
        # of a row that two ranks share, each counts its own part, cut where the codes are cut
        width = layer.in_features
        start, stop = (s * width // full_shape(codes)[1] - first * width for s in self._engine.span(codes))
        flat = used.view(-1)
        start, stop = max(0, start), max(0, stop)
        if "zero_fraction" in sums:
            sums["zero_fraction"] += (flat[start:stop] == 0).sum(dtype=torch.float64)
        flat[:start] = 0
        flat[stop:] = 0
        rows = torch.linalg.vecdot(used, used).double()
        if "frobenius_norm" in sums:
            sums["frobenius_norm"] += rows.sum()
        if "row_norms" in sums:
            sums["row_norms"][first : first + rows.shape[0]] += rows
        if "column_norms" in sums:
            sums["column_norms"] += torch.sum(used * used, 0, dtype=torch.float64)

    def finish(self) -> dict[str, Values]:
        """The facts of each adapter by its name: numbers as floats, norms of rows and columns as float32 on the CPU."""
        parts = [(i, w, s) for i, sums in self._sums.items() for w, s in sums.items()]
        if not parts:
            return {}
        whole = self._engine.sum_base(torch.cat([s for _, _, s in parts])).cpu()
        found: dict[str, Values] = {}
        sizes = [s.numel() for _, _, s in parts]
        for (i, wanted, _), total in zip(parts, whole.split(sizes), strict=True):
            facts = found.setdefault(self._names[i], {})
            if wanted == "zero_fraction":
                facts[wanted] = float(total) / self._numel[i]
            else:
                root = total.sqrt()
                facts[wanted] = float(root) if wanted == "frobenius_norm" else root.float()
        return found


def factors_of_weights(
    model: nn.Module,
    wants: list[Want],
    source: TensorSource,
    engine: Engine,
    cache: SpectrumCache,
    generator_for: Callable[[str], torch.Generator],
    progress: Callable[[int, int], None],
) -> dict[str, Values]:
    """`Adapter.facts_of` of every adapter that needs the full-precision weight, on every rank.

    Args:
        progress: takes matrices done, and matrices in all.

    Raises:
        AdapterError: an adapter would rewrite a base that is quantized already, or cannot start from this weight.
    """
    keys = {id(want.layer): want for want in wants if want.layer is not None}
    layers = [(n, a) for n, a in adapters(model) if "full_weight" in needs(a)]
    found: dict[str, Values] = {}
    for number, (name, adapter) in enumerate(layers):
        want, config = keys[id(adapter.base)], adapter.config
        sizes = (adapter.base.out_features, adapter.base.in_features)
        what, _, instead = (
            spec_of(config).refusal(*sizes, config, not source.is_packed(want.key)).partition("; ")
        )
        if what:
            raise AdapterError(f"{name}: {what}", instead)
        if adapter.rewrites_base and source.is_packed(want.key):
            what, _, instead = over_codes(adapter.config.method).partition("; ")
            raise AdapterError(f"{name}: {what}", instead)
        made = None
        owner = number % engine.world_size
        if engine.rank == owner:
            rows = (0, adapter.base.out_features)
            weight = source.rows(want.key, *rows, transposed=want.transposed).to(engine.device).float()

            def cached(
                kind: str, k: int, make: Callable[[], dict[str, Tensor]], weight: Tensor = weight
            ) -> dict[str, Tensor]:
                return cache.get(weight, kind=kind, k=k, make=lambda _: make())

            with torch.no_grad():
                try:
                    made = adapter.facts_of(weight, cached, generator_for(f"{name}:factors"))
                except ValueError as error:  # of a weight that has no factors
                    raise AdapterError(f"{name}: {error}", "check the checkpoint") from error
        found[name] = dict(engine.broadcast(made, owner))
        progress(number + 1, len(layers))
    return found
