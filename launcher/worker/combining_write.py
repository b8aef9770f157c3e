"""Where a combination goes: the folder of a LoRA adapter, or of a plain model that transformers loads."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from decompft.launcher.errors import AdapterError, RunFailed, UserError
from decompft.launcher.recipe import AdapterSection
from decompft.launcher.worker.checkpoint import save_adapter
from decompft.launcher.worker.combining import Combination
from decompft.launcher.worker.combining_parts import Base, Part
from decompft.launcher.worker.combining_rule import LINEAR
from decompft.launcher.worker.description import describe_adapter
from decompft.launcher.worker.load import Progress
from decompft.launcher.worker.model_folder import write_config, write_shards
from decompft.launcher.worker.tensorfile import Entry, fsync_folder
from decompft.launcher.worker.tokenizers import save_tokenizer

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What became of the changes' size when they were written with few factors."""

    rank: int
    lost: dict[str, float]  # weight -> norm of what was left out over the norm of its change
    lost_overall: float  # the same of all weights together


def write_adapter(combination: Combination, out: Path, *, rank: int | None, progress: Progress) -> Compressed:
    """A folder that `eval`, `generate` and `merge` load: method lora, s = 1, over the parts' own base.

    Args:
        rank: None: the sum of the parts', which loses nothing.

    Raises:
        UserError: `rank` is needed, or changes nothing; `out` exists.
        AdapterError: biases were trained, which a lora has no place for.
        RunFailed: the disk is full, or refuses.
    """
    refuse_existing(out)
    parts = combination.parts
    for part in parts:
        if part.biases:
            raise AdapterError(
                f"{part.name}: trained biases, which a lora adapter has no place for", "use --into dense"
            )
    rank = _rank(combination, rank)
    tensors: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    lost_square = square = 0.0
    for done, name in enumerate(combination.weights, start=1):
        found = combination.thin(name, rank)
        path = name.removesuffix(".weight")
        tensors |= {f"{path}.A": found.down.cpu().contiguous(), f"{path}.B": found.up.cpu().contiguous()}
        lost[name] = found.lost / found.norm if found.norm else 0.0
        lost_square, square = lost_square + found.lost**2, square + found.norm**2
        progress(done, len(combination.weights))
    for name in combination.others:
        tensors[name] = combination.other(name).cpu().contiguous()
    compressed = Compressed(
        rank=rank, lost=lost, lost_overall=(lost_square / square) ** 0.5 if square else 0.0
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer"
        save_tokenizer(parts[0].adapter.tokenizer(), tokenizer)
        save_adapter(out, tensors, _description(combination, compressed, out.name), tokenizer=tokenizer)
    return compressed


def write_model(
    combination: Combination, base: Base, out: Path, *, shard_bytes: int = SHARD_BYTES, progress: Progress
) -> None:
    """The base's own weights plus the combined change, as a plain model.

    Raises:
        UserError: `out` exists.
        AdapterError: a part trained biases that the base does not have.
        RunFailed: the disk is full, or refuses; `out` does not exist then.
    """
    refuse_existing(out)
    first = combination.parts[0]
    for part in combination.parts:
        if odd := [name for name in part.biases if name not in base.names]:
            raise AdapterError(
                f"{part.name}: trained {odd[0]}, and the base has no such bias",
                "a model with more tensors than its config says cannot be written",
            )
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        temporary.chmod(0o755)
        write_shards(temporary, [[e] for e in _entries(combination, base)], shard_bytes, progress)
        write_config(temporary, first.adapter, type(first.outline.hf).__name__, None)
        first.adapter.tokenizer().save_pretrained(temporary)
        fsync_folder(temporary)
        os.rename(temporary, out)
    except OSError as error:
        raise RunFailed(
            f"{out}: not written: {error.strerror or error}", "free some space, or name another disk"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """Raises UserError if there is something already."""
    if out.exists():
        raise UserError(f"{out}: exists already", "name a new folder with --out")


def _rank(combination: Combination, rank: int | None) -> int:
    if combination.is_thin:
        whole = combination.rank
        if rank is not None and rank >= whole:
            raise UserError(
                f"--rank {rank}: the factors of all parts together have rank {whole} already",
                "leave --rank out to keep all of it, or name a smaller one",
            )
        return whole if rank is None else rank
    if rank is not None:
        return rank
    method = combination.rule.method
    if method not in LINEAR:
        why = f"{method} works on single elements, so the combined change has full rank"
    else:
        part = next(part for part in combination.parts if not part.is_thin)
        why = f"{part.name}: scales or rewrites the base, so its change of a weight has full rank"
    raise UserError(why, "give --rank R for the nearest change of that rank, or --into dense for all of it")


def _entries(combination: Combination, base: Base) -> Iterator[Entry]:
    weights, others = set(combination.weights), set(combination.others)
    shapes = combination.parts[0].outline.shapes
    for name in (*base.names, *base.missing):
        if name in weights:
            read = partial(_changed, combination, base, name)
        elif name in others:
            read = partial(_in_dtype, combination, base, name)
        else:
            read = partial(base.stored, name)
        yield Entry(key=name, shape=shapes[name], dtype=base.dtype(name), read=read)


def _changed(combination: Combination, base: Base, name: str) -> Tensor:
    return base.as_stored(name, base.weight(name) + combination.change(name))


def _in_dtype(combination: Combination, base: Base, name: str) -> Tensor:
    return combination.other(name).to(base.dtype(name))


def _description(combination: Combination, compressed: Compressed, name: str) -> dict[str, Any]:
    """adapter.json: the first part's, as a lora, and how it came to be."""
    first, rule = combination.parts[0], combination.rule
    section = AdapterSection(
        method="lora",
        rank=compressed.rank,
        alpha=float(compressed.rank),  # s = 1: the factors carry everything
        targets=_targets(combination),
        train_modules=first.adapter.adapter.train_modules,
    )
    kept = {
        n: v for n, v in first.description.items() if n not in ("sha256", "size", "format_version", "step")
    }
    return {
        **kept,
        "name": name,
        **describe_adapter(section),
        "data_formats": sorted({name for part in combination.parts for name in part.adapter.formats}),
        "combined": {
            **asdict(rule),
            "is_reading": rule.weights == "nan",
            "parts": [_part(part) for part in combination.parts],
            "coefficients": combination.coefficients,
            "lost_overall": compressed.lost_overall,
        },
    }


def _part(part: Part) -> dict[str, Any]:
    description = part.description
    return {
        "name": description["name"],
        "folder": str(part.adapter.folder.resolve()),
        "method": description["adapter"]["method"],
        "sha256": description.get("sha256"),
    }


def _targets(combination: Combination) -> str | list[str]:
    """As the first part says it, if that means the very layers that are changed; else by name."""
    first = combination.parts[0]
    section = first.adapter.adapter
    if set(first.layers) == set(combination.weights) and not section.overrides:
        return section.targets
    return [name.removesuffix(".weight") for name in combination.weights]
