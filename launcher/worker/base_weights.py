"""The checkpoint's full-precision weights once more, for adapters that need them while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from decompft.adapters.base import Cached
from decompft.adapters.frozen.base import FrozenLinear
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.load import restream
from decompft.launcher.worker.matching import match_tensors
from decompft.launcher.worker.spectrum_cache import SpectrumCache
from decompft.launcher.worker.tensors import TensorSource


class BaseWeights:
    """Where the weight of each frozen layer lies.

    Args:
        prefix: as for `load_base`, as is `new`.
        spectra_dir: where decompositions are kept; None keeps none.
    """

    def __init__(
        self, model: nn.Module, source: TensorSource, *, prefix: str, new: set[str], spectra_dir: Path | None
    ) -> None:
        self._source = source
        wants, _ = match_tensors(model, source, prefix=prefix, new=new)
        self._wants = {id(want.layer): want for want in wants if want.layer is not None}
        self.spectra = SpectrumCache(spectra_dir)

    def is_packed(self, layer: FrozenLinear) -> bool:
        """Whether the checkpoint itself is quantized there: `whole` is then the dequantized weight."""
        return self._source.is_packed(self._wants[id(layer)].key)

    def whole(self, layer: FrozenLinear, device: torch.device) -> Tensor:
        """The weight (out, in) in float32."""
        want = self._wants[id(layer)]
        rows = self._source.rows(want.key, 0, layer.out_features, transposed=want.transposed)
        return rows.to(device).float()

    def cached(self, weight: Tensor) -> Cached:
        """Through which decompositions of `weight` are made, or read where an earlier run made them."""
        return lambda kind, k, make: self.spectra.get(weight, kind=kind, k=k, make=lambda _: make())

    def rewrite(
        self,
        layers: Iterable[FrozenLinear],
        engine: Engine,
        base_rows: Callable[[FrozenLinear, Tensor, int], Tensor],
    ) -> None:
        """Store other rows in these layers, as loading does: each rank reads and packs what lives with it.

        Args:
            base_rows: takes a layer, rows of its full-precision weight, and the first row's number.
        """
        restream([self._wants[id(layer)] for layer in layers], self._source, engine, base_rows)
