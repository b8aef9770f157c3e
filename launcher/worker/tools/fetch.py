"""Download what a recipe names, and pin it for a run: `decompft fetch RECIPE`, on a machine with a network."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from decompft.launcher import fetched, source
from decompft.launcher.errors import UserError
from decompft.launcher.fetched import OFFLINE, Pin, PinnedFile
from decompft.launcher.recipe import Recipe
from decompft.launcher.runs import RunDir
from decompft.launcher.worker import hub_repository
from decompft.launcher.worker.tools.main import run_tool

_MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")  # never a pickle
_CONFIG_FILES = _MODEL_FILES[1:]
_README = "README.md"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="decompft fetch")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--run-dir", type=Path)
    args = parser.parse_intermixed_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    recipe = source.load(Path(args.recipe), args.overrides)
    if recipe.sweep is not None:
        raise UserError(
            f"{args.recipe}: each task of a sweep is a run of its own, and pins are a run's",
            "add sweep=null: that fills the cache; the tasks then run with HF_HUB_OFFLINE=1 in the environment",
        )
    run_dir = args.run_dir or Path("runs") / str(recipe.name)
    before = fetched.read(run_dir)
    if before is None and RunDir(run_dir).plan_path.exists():
        raise UserError(
            f"{run_dir}: this run has begun without pins",
            "fetch before the first launch: choose another run with --run-dir DIR",
        )
    known = {pin.part: pin for pin in before or ()}
    pins = []
    for part, name, revision in fetched.wanted(recipe):
        old = known.get(part)
        # what is pinned already stays what it is, whatever its branch has become
        is_same = old is not None and (old.id, old.revision) == (name, revision)
        pin = _pin(recipe, part, name, revision, commit=old.commit if old is not None and is_same else "")
        # a commit never has other files; what a disk holds may change until a run has begun with it
        is_fixed = pin.kind == "hub" or RunDir(run_dir).plan_path.exists()
        if old is not None and is_same and is_fixed and old.files != pin.files:
            changed = next(n for n in old.files.keys() | pin.files if old.files.get(n) != pin.files.get(n))
            raise UserError(
                f"{Path(pin.folder) / changed}: is not what was pinned for {part}",
                "delete it and fetch again"
                if pin.kind == "hub"
                else "put it back, or start another run with --run-dir DIR",
            )
        pins.append(pin)
        _say(f"{part}: {len(pin.files)} files, {pin.num_bytes / 2**30:.2f} GiB, in {pin.folder}")
    if not pins:
        _say("the recipe names nothing that could be fetched or pinned")
    path = fetched.write(run_dir, pins)
    _say(f"pinned in {path}: runs in {run_dir} read these files and no others")
    _say(f"they need no network: {' '.join(f'{key}={value}' for key, value in OFFLINE.items())}")


def _pin(recipe: Recipe, part: str, name: str, revision: str, *, commit: str) -> Pin:
    if not revision:
        return _local(part, name)
    if part == "model":
        patterns = _MODEL_FILES if recipe.model.weights == "checkpoint" else _CONFIG_FILES
        return _hub(part, name, revision, "model", _model_files(recipe, patterns), commit=commit)
    if part == "tokenizer":
        return _hub(part, name, revision, "model", _model_files(recipe, _CONFIG_FILES), commit=commit)
    found = dict(fetched.sources(recipe.data))[part]
    pin = _hub(part, name, revision, "dataset", _data_files(found.name), commit=commit)
    _try_to_read(part, found.model_copy(update={"hub": pin.folder}))
    return pin


def _local(part: str, name: str) -> Pin:
    files = fetched.local_files(part, name)
    if not files:
        raise UserError(f"{part}: {name} does not exist", "paths in a recipe are relative to its folder")
    _say(f"{part}: hashing {name}")
    return Pin(
        part=part, kind="local", id=name, revision="", commit="", folder="/",
        files={path.removeprefix("/"): fetched.pin_file(file) for path, file in files.items()},
    )  # fmt: skip


def _hub(part: str, name: str, revision: str, kind: Any, choose: Any, *, commit: str) -> Pin:
    got = hub_repository.fetch(name, commit or revision, kind=kind, part=part, choose=choose, say=_say)
    files: dict[str, PinnedFile] = {}
    for path, sha256 in got.files.items():
        files[path] = fetched.pin_file(got.folder / path)
        if sha256 and files[path].sha256 != sha256:
            raise UserError(
                f"{got.folder / path}: is not what the hub has; the download was damaged",
                f"delete {(got.folder / path).resolve()}, and fetch again",
            )
    if part == "model" and any(path.endswith(".safetensors") for path in files):
        from decompft.launcher.checking import check_weights

        check_weights(got.folder)
    return Pin(
        part=part,
        kind="hub",
        id=name,
        revision=revision,
        commit=got.commit,
        folder=str(got.folder),
        files=files,
    )


Choose = Callable[[Sequence[str], Callable[[str], str]], list[str]]


def _model_files(recipe: Recipe, patterns: Sequence[str]) -> Choose:
    """What transformers and our loader read: no subfolders, which hold other formats, and nothing twice."""

    def choose(names: Sequence[str], read: Callable[[str], str]) -> list[str]:
        wanted = [*patterns, *(["*.py"] if recipe.model.trust_remote_code else [])]
        top = [name for name in names if "/" not in name and not name.startswith("consolidated")]
        found = hub_repository.matching(top, wanted)
        if "*.safetensors" in patterns and not any(name.endswith(".safetensors") for name in found):
            raise UserError(
                f"model.id: {recipe.model.id} has no safetensors files",
                "pickled weights are never loaded; look for a revision or a copy with safetensors",
            )
        return found

    return choose


def _data_files(config: str | None) -> Choose:
    """The files of one configuration as the repository's README lists them; all, where it lists none."""

    def choose(names: Sequence[str], read: Callable[[str], str]) -> list[str]:
        plain = [name for name in names if not name.endswith(".py") and name != ".gitattributes"]
        patterns = _patterns(read(_README), config) if _README in names else None
        if patterns is None:
            return plain
        return [_README, *(name for name in hub_repository.matching(plain, patterns) if name != _README)]

    return choose


def _patterns(readme: str, config: str | None) -> list[str] | None:
    """Patterns of the files of a configuration in the README's head; None where it tells of none."""
    import yaml

    parts = readme.split("---\n", 2)
    try:
        head = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return None
    rows = (
        [row for row in head.get("configs") or [] if isinstance(row, dict)] if isinstance(head, dict) else []
    )
    if config is None:  # as the datasets library chooses
        default = [row for row in rows if row.get("default") or row.get("config_name") == "default"]
        rows = default or rows
    else:
        rows = [row for row in rows if row.get("config_name") == config]
    if len(rows) != 1:
        return None
    files = rows[0].get("data_files")
    entries = files if isinstance(files, list) else [files] if files else []
    paths = [path for entry in entries for path in _paths(entry)]
    folder = rows[0].get("data_dir")
    if folder and not paths:
        return [f"{str(folder).strip('/')}/*"]
    return [f"{str(folder).strip('/')}/{path}" if folder else path for path in paths] or None


def _paths(entry: Any) -> list[str]:
    """Of `path` and of `{split: ..., path: one or several}`."""
    found = entry.get("path", []) if isinstance(entry, dict) else entry
    return [str(path).removeprefix("./") for path in (found if isinstance(found, list) else [found])]


def _try_to_read(part: str, found: Any) -> None:
    """The first record, from the files alone: a job that cannot read them would say so only once it runs."""
    from decompft.launcher.worker.data.records import iter_records

    _say(f"{part}: reading its first record")
    next(iter(iter_records(found, streaming=True)))


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_tool(main, sys.argv[1:])
