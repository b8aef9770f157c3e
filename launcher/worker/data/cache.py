"""Where tokenized sets are kept, under what key, and how a damaged or half-written one is told."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decompft.launcher.errors import DataError
from decompft.launcher.places import cache_dir
from decompft.launcher.recipe import Recipe, Source
from decompft.launcher.worker.data.hub import hub_fingerprint
from decompft.launcher.worker.data.records import source_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE_VERSION = 1  # raise when the same records would give other rows
_MANIFEST = "manifest.json"


def data_cache_root(recipe: Recipe) -> Path:
    """The folder of tokenized sets: `data.cache_dir`, else the user's cache."""
    if recipe.data.cache_dir is not None:
        return Path(recipe.data.cache_dir).expanduser()
    return cache_dir() / "data"


def content_key(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that the rows depend on: data bytes, tokenizer, keys of the recipe, this code."""
    data = recipe.data
    train = [] if data.streaming else data.train
    facts = {
        "code": CODE_VERSION,
        "tokenizer": _tokenizer_identity(tokenizer),
        "task": [recipe.model.task, recipe.model.num_labels],
        "train": [_source_identity(source) for source in train],
        "eval": [_source_identity(source) for source in data.eval],
        "held_out": [data.eval_fraction, recipe.train.seed] if data.eval_fraction else None,
        "rows": [data.sequence_length, data.packing, data.too_long],
    }
    return hashlib.sha256(_canonical(facts)).hexdigest()


def cached(root: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any], str]:
    """(folder, facts, state) of an entry, built when it is missing or damaged.

    The entry is built beside its place and renamed into it, so that a crash leaves none and two processes
    that build at once leave one.

    Args:
        build: fills a folder, returns facts that JSON can hold.

    Returns:
        state is "hit", "built" or "rebuilt" (what was there was damaged).

    Raises:
        DataError: nothing can be written there.
    """
    place = root / key[:32]
    facts = _read_valid(place)
    if facts is not None:
        return place, facts, "hit"
    with _refusal_in_words(root):
        root.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{key[:8]}-", dir=root))
        building.chmod(0o755)  # mkdtemp's 0700 would hide a shared cache from the others
    try:
        facts = build(building)
        _write_manifest(building, facts)
        damaged = place.exists()
        if damaged:
            with _refusal_in_words(root):
                aside = Path(tempfile.mkdtemp(prefix=".damaged-", dir=root))
                with suppress(FileNotFoundError):  # another process was faster
                    os.rename(place, aside / "entry")
                shutil.rmtree(aside)
        try:
            os.rename(building, place)
        except OSError:
            other = _read_valid(place)  # another process was faster
            if other is None:
                raise
            return place, other, "hit"
        return place, facts, "rebuilt" if damaged else "built"
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _refusal_in_words(root: Path) -> Iterator[None]:
    """Say which folder cannot be written; a full disk has words of its own (tools/main.py)."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{root}: tokenized data cannot be kept there: {error.strerror or error}",
            "set DECOMPFT_CACHE or data.cache_dir to a folder that can be written",
        ) from error


def _read_valid(place: Path) -> dict[str, Any] | None:
    """The facts of an entry whose every file has the size and hash it was written with, else None."""
    try:
        manifest = json.loads((place / _MANIFEST).read_text())
        content = manifest["content"]
        if hashlib.sha256(_canonical(content)).hexdigest() != manifest["sha256"]:
            return None
        for name, file in content["files"].items():
            path = place / name
            if path.stat().st_size != file["bytes"] or _sha256(path) != file["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    facts: dict[str, Any] = content["facts"]
    return facts


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {"facts": facts, "files": files}
    manifest = {"content": content, "sha256": hashlib.sha256(_canonical(content)).hexdigest()}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def _source_identity(source: Source) -> dict[str, Any]:
    if source.path is not None:
        # the name's ending decides how bytes are read; the rest of the path does not matter
        content: Any = [[path.suffixes[-2:], _sha256(path)] for path in source_files(source)]
    else:
        content = hub_fingerprint(source)
    read = source.model_dump(include={"format", "fields", "train_on", "max_records"})
    return {"content": content, **read}


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    facts = [type(tokenizer).__name__, backend, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(_canonical(facts)).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
