"""Which recipes come with the package, and how does a user get one of their own?"""

from __future__ import annotations

import difflib
import shutil
from dataclasses import dataclass
from pathlib import Path

from decompft.launcher.errors import RecipeError, UserError

_SCHEMA = "schema.json"  # recipes name it in their first line, for editors


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipped:
    """A recipe of the package."""

    name: str
    purpose: str  # the file's first comment
    path: Path


def shipped() -> tuple[Shipped, ...]:
    """All of them, by name."""
    return tuple(
        Shipped(name=path.stem, purpose=_purpose(path.read_text(encoding="utf-8")), path=path)
        for path in sorted(folder().glob("*.yaml"))
    )


def folder() -> Path:
    """Where they lie."""
    # here: only a verb that needs it pays for this import
    from importlib.resources import files

    return Path(str(files("decompft.recipes")))


def find(recipe: str) -> Path:
    """The file that a RECIPE argument means: a file, or the name of a shipped recipe.

    `quickstart`, `quickstart.yaml` and `recipes/quickstart.yaml` all name the shipped one where
    there is no such file.

    Raises:
        RecipeError: neither.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(f"{recipe}: a folder, not a recipe", "name a .yaml file in it")
    known = {path.stem: path for path in folder().glob("*.yaml")}
    # a path into some other folder means that folder, not ours
    if path.suffix in ("", ".yaml") and str(path.parent) in (".", "recipes") and path.stem in known:
        return known[path.stem]
    beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1) or difflib.get_close_matches(
        path.stem, known, n=1
    )
    hint = f"did you mean {near[0]}? " if near else ""
    raise RecipeError(
        f"{recipe}: no such file, and no shipped recipe of that name",
        f"{hint}shipped: {', '.join(sorted(known))}",
    )


def copy(recipe: str, to: Path) -> tuple[Path, ...]:
    """Copy a shipped recipe, and the data files beside it that it reads, so that the copy runs.

    Returns:
        The files that were written, the recipe first.

    Raises:
        UserError: the recipe is not a shipped one, or a file is there already and differs.
    """
    names = {entry.name: entry for entry in shipped()}
    name = Path(recipe).stem if recipe.endswith(".yaml") else recipe
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(names)}"
        raise RecipeError(f"{recipe}: no shipped recipe of that name", hint)
    source = names[name].path
    if (to / source.name).exists():
        raise UserError(f"{to / source.name}: exists already", "name another folder, or remove the file")
    wanted = [source, source.parent / _SCHEMA, *_data_files(source)]
    pairs = [(path, to / path.relative_to(source.parent)) for path in wanted]
    # a data file may be there from another copy; the same bytes are no conflict
    missing = [(path, target) for path, target in pairs if not _is_same(path, target)]
    for path, target in missing:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return tuple(target for _, target in missing)


def _purpose(text: str) -> str:
    for line in text.splitlines():
        comment = line.removeprefix("#").strip()
        if line.startswith("#") and not comment.startswith("yaml-language-server"):
            return comment
    return ""


def _data_files(recipe: Path) -> list[Path]:
    """Files below the recipe's own folder that its data sections name."""
    from decompft.launcher.source import load

    data = load(recipe).data
    paths = [Path(source.path) for source in (*data.train, *data.eval) if source.path is not None]
    return [path for path in dict.fromkeys(paths) if path.is_relative_to(recipe.parent) and path.is_file()]


def _is_same(path: Path, target: Path) -> bool:
    if not target.exists():
        return False
    if target.is_file() and target.read_bytes() == path.read_bytes():
        return True
    raise UserError(f"{target}: exists already and differs", "name another folder, or remove the file")
