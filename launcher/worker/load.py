"""Stream the base into a model that stands empty: read this rank's rows, quantize, place, drop.

The unit is a chunk of rows of one tensor, some MiB: threads read chunks ahead, the caller's thread
quantizes and places them in order. In host memory are at most two of the largest tensor's slices.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.inject import adapters
from decompft.launcher.errors import ModelError
from decompft.launcher.worker.engines.base import Engine, full_shape
from decompft.launcher.worker.facts import Measures, Values, factors_of_weights
from decompft.launcher.worker.loaded import Loaded
from decompft.launcher.worker.matching import Want, match_tensors
from decompft.launcher.worker.packed_cache import PackedCache
from decompft.launcher.worker.reading import AnonymousPeak, num_readers, read_ahead, row_chunks
from decompft.launcher.worker.spectrum_cache import SpectrumCache
from decompft.launcher.worker.tensors import SafetensorsSource, TensorSource
from decompft.launcher.worker.token_rows import place_rows

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chunk:
    """Rows of one tensor on their way into the model."""

    want: Want
    first: int
    last: int
    values: tuple[Tensor, ...] = ()  # storage tensors if `is_packed`, else the dense rows
    is_packed: bool = False
    is_new: bool = False  # for the cache


def load_base(
    model: nn.Module,
    source: TensorSource,
    engine: Engine,
    *,
    prefix: str,
    new: set[str],
    seed: int,
    progress: Progress,
    cache_dir: Path | None = None,
    spectra_dir: Path | None = None,
    known: Callable[[str], Tensor] | None = None,
    factor_progress: Progress = lambda done, total: None,
) -> Loaded:
    """Fill every parameter of the base, and start the adapters from what they need of it.

    Args:
        prefix: transformers' `base_model_prefix`; a checkpoint may leave it out or add it.
        new: names of tensors that a checkpoint need not have (a classification head).
        seed: of adapters and new tensors; with the tensor's name it fixes the values.
        cache_dir: where packed rows are kept; None keeps none.
        spectra_dir: where factors of weights are kept; None keeps none.
        known: an adapter tensor by its name, where the adapters have been started before: no factor is made again.
        factor_progress: takes matrices whose factors were made, and how many there are.

    Raises:
        ModelError: as `match_tensors`, or tied tensors differ.
    """
    began = time.perf_counter()
    wants, missing = match_tensors(model, source, prefix=prefix, new=new)
    cache = None
    if cache_dir is not None and isinstance(source, SafetensorsSource):
        is_cut = any(engine.rows(*w.parameters) != (0, full_shape(w.parameters[0])[0]) for w in wants)
        # whole on every rank: one a node is enough
        cache = PackedCache(cache_dir, source, writes=is_cut or engine.local_rank == 0)
    try:
        with AnonymousPeak() as memory, torch.no_grad():
            starts = _Starts(model, wants, source, engine, seed, known, spectra_dir, factor_progress)
            facts = _stream(model, wants, source, cache, engine, starts, progress)
            for name, parameter in missing.items():
                values = torch.empty(full_shape(parameter)).normal_(
                    0.0, 0.02, generator=generator_for(seed, name)
                )
                engine.place(parameter, torch.zeros_like(values) if values.dim() == 1 else values)
            starts.finish(facts)
            place_rows(model, wants, source, engine, known)
            if cache is not None:
                cache.finish()
    except BaseException:
        if cache is not None:
            cache.abandon()
        raise
    seconds = time.perf_counter() - began
    return _loaded(model, wants, source, cache, engine, seconds, memory.peak_bytes)


def restream(
    wants: list[Want],
    source: TensorSource,
    engine: Engine,
    base_rows: Callable[[FrozenLinear, Tensor, int], Tensor],
) -> None:
    """Read these weights again, in the same chunks, and store what `base_rows` makes of their rows."""
    with torch.no_grad():
        for chunk in _read(wants, source, None, engine, lambda layer: True):
            layer = chunk.want.layer
            assert layer is not None and not chunk.is_packed
            rows = layer.pack(base_rows(layer, chunk.values[0].to(engine.device), chunk.first))
            for parameter, packed in zip(chunk.want.parameters, rows, strict=True):
                engine.place(parameter, packed, chunk.first)


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one tensor: independent of world size and of the order of layers."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _stream(
    model: nn.Module,
    wants: list[Want],
    source: TensorSource,
    cache: PackedCache | None,
    engine: Engine,
    starts: _Starts,
    progress: Progress,
) -> dict[str, Values]:
    """Read, pack and place everything; returns what adapters need to know of it, by their names."""
    measures = Measures(model, engine)
    # progress counts the base as it will be stored
    total = sum(_row_bytes(want) * (last - first) for want, first, last in _ranges(wants, engine))
    done = 0
    for chunk in _read(wants, source, cache, engine, starts.rewrites):
        want = chunk.want
        values = tuple(v.to(engine.device) for v in chunk.values)
        if want.layer is not None and not chunk.is_packed:
            values = want.layer.pack(starts.base_rows(want.layer, values[0], chunk.first))
        for parameter, rows in zip(want.parameters, values, strict=True):
            engine.place(parameter, rows, chunk.first)
        if cache is not None and chunk.is_new:
            cache.add(want.key, want.parameters, chunk.first, values)
        if want.layer is not None:
            measures.add(want.layer, want.parameters[0], chunk.first, values)
        done += _row_bytes(want) * (chunk.last - chunk.first)
        progress(done, total)
    return measures.finish()


def _read(
    wants: list[Want],
    source: TensorSource,
    cache: PackedCache | None,
    engine: Engine,
    rewrites: Callable[[FrozenLinear], bool],
) -> Iterator[_Chunk]:
    def read(chunk: _Chunk, buffer: Tensor | None) -> _Chunk:
        want, first, last = chunk.want, chunk.first, chunk.last
        if want.layer is not None and source.is_packed(want.key):
            return _filled(
                chunk, source.packed(want.key, want.layer, first, last, buffer=buffer), is_packed=True
            )
        may_cache = want.layer is not None and not rewrites(want.layer)
        if cache is not None and may_cache:
            found = cache.find(want.key, want.parameters, first, last, buffer=buffer)
            if found is not None:
                return _filled(chunk, found, is_packed=True)
        rows = source.rows(want.key, first, last, transposed=want.transposed, buffer=buffer)
        if want.twin is not None and not torch.equal(rows, source.rows(want.twin, first, last)):
            raise ModelError(
                f"the model's config ties {want.key} and {want.twin}, but the checkpoint has other values for each",
                "set tie_word_embeddings: false in the model's config.json",
            )
        return _filled(chunk, (rows,), is_new=may_cache)

    chunks = [
        _Chunk(want=want, first=a, last=b)
        for want, first, last in _ranges(wants, engine)
        for a, b in row_chunks(first, last, _source_row_bytes(want, source), is_file=source.is_file)
    ]
    largest = max(
        (_source_row_bytes(w, source) * (last - first) for w, first, last in _ranges(wants, engine)),
        default=0,
    )
    return read_ahead(
        chunks,
        read,
        budget_bytes=2 * largest,
        num_readers=num_readers() if source.is_file else 0,
        pin=engine.device.type == "cuda",
    )


def _filled(
    chunk: _Chunk, values: tuple[Tensor, ...], *, is_packed: bool = False, is_new: bool = False
) -> _Chunk:
    return replace(chunk, values=values, is_packed=is_packed, is_new=is_new)


def _ranges(wants: list[Want], engine: Engine) -> Iterator[tuple[Want, int, int]]:
    """The rows of each tensor that cover what lives here."""
    return ((want, *engine.rows(*want.parameters)) for want in wants)


def _row_bytes(want: Want) -> int:
    """Of one row as it is stored in the model."""
    return sum(math.prod(full_shape(p)[1:]) * p.element_size() for p in want.parameters)


def _source_row_bytes(want: Want, source: TensorSource) -> int:
    """Of one row as plain floats in the checkpoint."""
    shape = source.shape(want.key)
    width = shape[0] if want.transposed else math.prod(shape[1:])
    return width * source.dtype(want.key).itemsize


def _loaded(
    model: nn.Module,
    wants: list[Want],
    source: TensorSource,
    cache: PackedCache | None,
    engine: Engine,
    seconds: float,
    peak_bytes: int,
) -> Loaded:
    read = source.bytes_read.total() if isinstance(source, SafetensorsSource) else 0
    whole = read
    if cache is not None:
        whole = sum(
            _source_row_bytes(want, source) * (last - first) * (1 if want.twin is None else 2)
            for want, first, last in _ranges(wants, engine)
        )
    counts = (0, 0, 0) if cache is None else (cache.bytes_read, cache.bytes_written, cache.num_damaged)
    from_cache, written, damaged = counts
    sums = [int(n) for n in engine.sum_ranks([read, from_cache, whole, written, damaged])]
    sizes = [(p.element_size(), engine.span(p), math.prod(full_shape(p))) for p in model.parameters()]
    # nothing was allocated before the model
    is_cuda = engine.device.type == "cuda"
    peak = engine.max_rank(torch.cuda.max_memory_allocated(engine.device)) if is_cuda else None
    return Loaded(
        bytes_read=sums[0],
        cache_bytes_read=sums[1],
        checkpoint_bytes=sums[2],
        cache_bytes_written=sums[3],
        cache_damaged=sums[4],
        cache_dir=None if cache is None else cache.folder,
        seconds=engine.max_rank(seconds),
        peak_anonymous_bytes=int(engine.max_rank(peak_bytes)),
        held_bytes=int(engine.max_rank(sum(e * (stop - start) for e, (start, stop), _ in sizes))),
        whole_bytes=sum(e * numel for e, _, numel in sizes),
        peak_device_bytes=None if peak is None else int(peak),
        warning="" if cache is None else cache.warning,
    )


class _Starts:
    """The adapters' first values: before the stream of those that rewrite the base, after it of the others."""

    def __init__(
        self,
        model: nn.Module,
        wants: list[Want],
        source: TensorSource,
        engine: Engine,
        seed: int,
        known: Callable[[str], Tensor] | None,
        spectra_dir: Path | None,
        progress: Progress,
    ) -> None:
        self._engine, self._seed, self._known = engine, seed, known
        self._layers = dict(adapters(model))
        self._values: dict[str, dict[str, Tensor]] = {}
        self._factors: dict[str, Values] = {}
        if known is None:
            self._factors = factors_of_weights(
                model, wants, source, engine, SpectrumCache(spectra_dir),
                lambda name: generator_for(seed, name), progress,
            )  # fmt: skip
        self._rewriting = {id(a.base): n for n, a in self._layers.items() if a.rewrites_base}
        for name in self._rewriting.values():
            self._values[name] = self._start(name, {})

    def rewrites(self, layer: FrozenLinear) -> bool:
        """Whether a base is no one else's, so that its rows are not to be cached."""
        return id(layer) in self._rewriting

    def base_rows(self, layer: FrozenLinear, rows: Tensor, first: int) -> Tensor:
        """Rows of the checkpoint's weight from `first` on -> those that are stored."""
        name = self._rewriting.get(id(layer))
        if name is None:
            return rows
        return self._layers[name].base_rows(rows, first, self._values[name])

    def finish(self, facts: dict[str, Values]) -> None:
        """Place every adapter's tensors.

        Args:
            facts: measured while the base streamed by.
        """
        shared: set[int] = set()
        for name, adapter in self._layers.items():
            values = self._values.pop(name, None) or self._start(name, facts.get(name, {}))
            for own, value in values.items():
                self._engine.place(getattr(adapter, own), value)
            derived = {own: adapter.get_buffer(own) for own in adapter.derived_shapes}
            if not shared.issuperset(map(id, derived.values())):
                shared.update(map(id, derived.values()))
                for own, value in adapter.derived().items():
                    self._engine.place(derived[own], value)

    def _start(self, name: str, facts: Values) -> dict[str, Tensor]:
        adapter = self._layers[name]
        if self._known is not None:
            return {t: self._known(f"{name}.{t}") for t in (*adapter.shapes, *adapter.fixed_shapes)}
        return adapter.initial_values(generator_for(self._seed, name), self._factors.get(name, {}) | facts)
