"""Which commits and files was this run given before it began? fetched.json of a run directory.

`decompft fetch` writes it where there is a network. From then on the run means these commits, whatever their branches
become; `prepare` reads the files back and refuses others. Without torch and without a network.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from decompft.launcher.errors import UserError
from decompft.launcher.outcome import write_atomic
from decompft.launcher.packaged import is_packaged, packaged_file
from decompft.launcher.recipe import DataSection, Recipe, Source

FILE = "fetched.json"
# for every process of a job whose files are pinned
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

_MODEL_SUFFIXES = (
    ".safetensors",
    ".json",
    ".txt",
    ".model",
    ".jinja",
    ".py",
)  # what is read of a model's folder
_WHOLE_BYTES = 16 << 20  # files up to this are hashed again by `verify`
_EDGE_BYTES = 1 << 20
_AGAIN = "fetch again into this run with `decompft fetch`, or start another one with --run-dir DIR"


@dataclass(frozen=True, kw_only=True)
class PinnedFile:
    """One file as it was fetched."""

    num_bytes: int
    sha256: str
    edges: str  # sha256 of the first and the last MiB, which can be looked at again without reading 140 GB


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One thing that a recipe names, and the files that it was at the time."""

    part: str  # model, tokenizer, data.train[0], ...
    kind: Literal["hub", "local"]
    id: str  # as the recipe has it
    revision: str  # that was asked for; "" for what is no repository
    commit: str
    folder: str  # that the names of `files` are relative to; "/" for files of anywhere
    files: dict[str, PinnedFile]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files.values())


def read(run_dir: Path) -> tuple[Pin, ...] | None:
    """The pins of a run, or None for one without.

    Raises:
        UserError: the file is damaged, or another version's.
    """
    path = run_dir / FILE
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["pins"]
        return tuple(
            Pin(**row | {"files": {name: PinnedFile(**file) for name, file in row["files"].items()}})
            for row in rows
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read: {error}", "delete it, and fetch again") from error


def write(run_dir: Path, pins: Iterable[Pin]) -> Path:
    """Write fetched.json; returns its path."""
    run_dir.mkdir(parents=True, exist_ok=True)
    row = {"version": 1, "pins": [asdict(pin) for pin in pins]}
    write_atomic(run_dir / FILE, json.dumps(row, indent=2, sort_keys=True) + "\n")
    return run_dir / FILE


def pinned(recipe: Recipe, run_dir: Path) -> Recipe:
    """The recipe with commits and folders in place of branches and hub names; as it is when nothing is pinned.

    Raises:
        UserError: the recipe names a model or data that fetched.json does not know.
    """
    pins = read(run_dir)
    if pins is None:
        return recipe
    known = {pin.part: pin for pin in pins}
    model = recipe.model
    for part, name, revision in wanted(recipe):
        pin = known.get(part)
        if pin is None or not _fits(pin, name, revision):
            told = "nothing" if pin is None else f"{pin.id}{f' ({pin.revision})' if pin.revision else ''}"
            raise UserError(
                f"{run_dir / FILE}: for {part} it pins {told}, the recipe says {name}"
                f"{f' ({revision})' if revision else ''}",
                _AGAIN,
            )
    if "model" in known and known["model"].kind == "hub":
        model = model.model_copy(update={"revision": known["model"].commit})
    if "tokenizer" in known and known["tokenizer"].kind == "hub":
        model = model.model_copy(update={"tokenizer": known["tokenizer"].folder})
    return recipe.model_copy(update={"model": model, "data": _pinned_data(recipe.data, known)})


def wanted(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """(part, id, revision) of everything that a recipe reads; the revision is "" for what has none."""
    model = recipe.model
    if model.id is not None and needs_files(recipe):
        yield "model", model.id, model.revision if is_hub(model.id) else ""
    if model.tokenizer is not None:
        yield "tokenizer", model.tokenizer, "main" if is_hub(model.tokenizer) else ""
    for part, source in sources(recipe.data):
        name = source.path or source.hub or ""
        revision = "main" if source.hub is not None and not Path(source.hub).is_dir() else ""
        yield part, name, revision


def sources(data: DataSection) -> Iterator[tuple[str, Source]]:
    """The data sets of a recipe under the names that pins give them."""
    for part in ("train", "eval"):
        for number, source in enumerate(getattr(data, part)):
            yield f"data.{part}[{number}]", source


def needs_files(recipe: Recipe) -> bool:
    """Whether anything of `model.id` is read: random weights of a model that the built-in table knows need nothing."""
    from decompft.launcher.known_models import known_config

    model = recipe.model
    return model.weights == "checkpoint" or model.id is None or known_config(model.id) is None


def is_hub(name: str) -> bool:
    """Whether a model or tokenizer is a repository of the hub; `source.load` has made paths absolute."""
    return not (
        is_packaged(name) or Path(name).is_absolute() or name.startswith((".", "~")) or Path(name).exists()
    )


def local_files(part: str, name: str) -> dict[str, Path]:
    """Files that a path, a glob, a folder or a packaged model stands for, by absolute name."""
    path = packaged_file(name) if is_packaged(name) else Path(name).expanduser()
    if path.is_dir() and part in ("model", "tokenizer"):
        found = [file for file in path.iterdir() if file.is_file() and file.suffix in _MODEL_SUFFIXES]
    elif path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file()]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]
    return {str(file.absolute()): file for file in sorted(found)}


def pin_file(path: Path) -> PinnedFile:
    """Read a file from end to end."""
    with path.open("rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest()
    return PinnedFile(num_bytes=path.stat().st_size, sha256=whole, edges=_edges(path))


def verify(run_dir: Path) -> None:
    """Compare the files of a run's pins with what lies there now: sizes and ends of all, the whole of small ones.

    Raises:
        UserError: a file is missing, has changed, or has come in besides.
    """
    for pin in read(run_dir) or ():
        for name, file in pin.files.items():
            path = Path(pin.folder) / name
            why = _difference(path, file)
            if why:
                at = f" at commit {pin.commit[:12]}" if pin.commit else ""
                raise UserError(
                    f"{path}: {why}; {pin.part} was pinned as {pin.id}{at}",
                    "put the file back, or " + _AGAIN
                    if Path(pin.folder).is_dir()
                    else f"{pin.folder} is not there: HF_HOME must be on a disk that this machine "
                    "shares with the one of the fetch",
                )
        if pin.kind == "local":
            new = sorted(
                set(local_files(pin.part, pin.id)) - {str(Path(pin.folder) / name) for name in pin.files}
            )
            if new:
                raise UserError(f"{new[0]}: is new; {pin.part} was pinned without it ({pin.id})", _AGAIN)


def _fits(pin: Pin, name: str, revision: str) -> bool:
    """Whether a pin is of this; a recipe that was pinned before names the commit, or the folder, itself."""
    as_pinned = pin.kind == "hub" and name in (pin.id, pin.folder) and revision in (pin.commit, "")
    return as_pinned or (pin.id, pin.revision) == (name, revision)


def _difference(path: Path, file: PinnedFile) -> str:
    try:
        num_bytes = path.stat().st_size
        if num_bytes != file.num_bytes:
            return f"has {num_bytes} bytes, {file.num_bytes} were fetched"
        if num_bytes <= _WHOLE_BYTES:
            with path.open("rb") as opened:
                is_same = hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
        else:
            is_same = _edges(path) == file.edges
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if is_same else "is not the file that was fetched (its sha256 differs)"


def _edges(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_EDGE_BYTES))
        file.seek(max(file.tell(), path.stat().st_size - _EDGE_BYTES))
        digest.update(file.read())
    return digest.hexdigest()


def _pinned_data(data: DataSection, known: Mapping[str, Pin]) -> DataSection:
    update: dict[str, list[Any]] = {"train": [], "eval": []}
    for part, source in sources(data):
        pin = known[part]
        new = source.model_copy(update={"hub": pin.folder}) if pin.kind == "hub" else source
        update[part.partition("[")[0].removeprefix("data.")].append(new)
    return data.model_copy(update=update)
