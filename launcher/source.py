"""Which recipe does this file mean, with these overrides?"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from decompft.adapters.spec import ADAPTER_SPECS
from decompft.launcher.errors import RecipeError
from decompft.launcher.packaged import is_packaged
from decompft.launcher.recipe import AdapterSection, Recipe
from decompft.launcher.recipe_section import KEY, Section
from decompft.launcher.yaml_tree import KeyPath, Mark, Tree, dotted, read

if TYPE_CHECKING:
    from decompft.launcher.complaints import Complaint

SectionT = TypeVar("SectionT", bound=Section)
_MOST_ERRORS = 10  # more than these only bury the first


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: a YAML file; relative paths in it are relative to its folder.
        overrides: `section.key=value` each; relative paths in them are relative to the current folder.

    Returns:
        The checked recipe: name set, paths of files absolute, hub ids as written.

    Raises:
        RecipeError: with the place of each thing that is wrong.
    """
    text = read_text(path, hint="`decompft recipes list` shows those that ship")
    return parse(text, where=str(path), base_dir=path.parent, overrides=overrides)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """One value of a sweep."""

    key: str  # of the recipe
    value: Any  # as YAML has it
    path: KeyPath  # where it stands in the recipe: sweep, parameters, ...


def parse(
    text: str,
    *,
    where: str,
    base_dir: Path,
    overrides: Sequence[str] = (),
    chosen: Sequence[Chosen] = (),
) -> Recipe:
    """As `load`, from text.

    Args:
        text: YAML.
        where: what to call the text in errors; its stem is the recipe's default name.
        base_dir: folder that relative paths in the text are relative to.
        overrides: as in `load`.
        chosen: values of the recipe's own sweep, which come after the overrides; errors name their lines.
    """
    tree = read(text, where=where)
    if tree.value is None:
        raise RecipeError(f"{where}: the recipe is empty", "a recipe needs model, data and train")
    if not isinstance(tree.value, dict):
        raise RecipeError(f"{where}:1:1: a recipe is a list of sections (model:, data:, ...)")
    value = copy.deepcopy(tree.value)
    changes = [_apply(value, override) for override in overrides]
    sources = _Sources(where=where, tree=tree, changes=changes)
    if chosen:
        sources = _Sources(where=where, tree=tree, changes=[*changes, *_choose(value, chosen, sources)])
    _validate(Recipe, value, sources)
    _resolve_paths(value, sources, base_dir)
    value.setdefault("name", None)
    value["name"] = value["name"] or _name(where)
    return Recipe.model_validate(value)


def read_section(kind: type[SectionT], text: str, where: str) -> SectionT:
    """Another file than a recipe, checked in the same way, e.g. the profile of a site.

    Args:
        kind: what the whole file is; an empty one has all defaults.
        text: YAML.
        where: what to call the text in errors.

    Raises:
        RecipeError: with the place of each thing that is wrong.
    """
    tree = read(text, where=where)
    value = {} if tree.value is None else tree.value
    if not isinstance(value, dict):
        raise RecipeError(
            f"{where}:1:1: the file is a list of keys ({', '.join(list(kind.model_fields)[:3])}, ...)"
        )
    return _validate(kind, value, _Sources(where=where, tree=tree, changes=[]))


def read_text(path: Path, *, hint: str) -> str:
    """A file's text; `hint` is for a file that is not there."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file", hint) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8 text", "save the file as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None


def schema_json() -> str:
    """The JSON Schema of a recipe, with each method's options, for editors."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    adapter = schema["$defs"]["AdapterSection"]
    adapter["properties"]["method"]["enum"] = sorted(ADAPTER_SPECS)
    adapter["allOf"] = []
    default = AdapterSection.model_fields["method"].default
    for name, spec in sorted(ADAPTER_SPECS.items()):
        options = TypeAdapter(spec.options).json_schema()
        for field, metadata in (
            (f, spec.options.__dataclass_fields__[f].metadata) for f in options["properties"]
        ):
            options["properties"][field]["description"] = metadata["doc"]
        schema["$defs"][options["title"]] = options
        when: dict[str, Any] = {"properties": {"method": {"const": name}}}
        if name != default:  # without `required` the condition also holds where no method is named
            when["required"] = ["method"]
        then = {"properties": {"options": {"$ref": f"#/$defs/{options['title']}"}}}
        adapter["allOf"].append({"if": when, "then": then})
    return json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=True) + "\n"


def _validate(kind: type[SectionT], value: dict[str, Any], sources: _Sources) -> SectionT:
    found = [
        (sources.place(path, at_key=True, mark=second), f"written twice, first at line {first}", "keep one")
        for path, first, second in sources.tree.twice
    ]
    section = None
    try:
        section = kind.model_validate(value)
    except ValidationError as error:
        # here: a file without errors does not pay for the words
        from decompft.launcher.complaints import complaints

        found += [sources.spell(complaint) for complaint in complaints(error, value, kind)]
    if section is None or found:
        raise _error(found, sources.where)
    return section


# -- where a value came from --


@dataclass(frozen=True, kw_only=True, slots=True)
class _Change:
    path: KeyPath
    here: str  # the override as typed, or the place of a sweep's value
    is_typed: bool = True  # on the command line


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sources:
    """Finds the place of a value: a line of the file, or an override."""

    where: str
    tree: Tree
    changes: list[_Change]

    def override_of(self, path: KeyPath) -> _Change | None:
        """The last override that wrote this value or a part of what surrounds it."""
        fitting = [c for c in self.changes if c.path == path[: len(c.path)]]
        if not fitting and path not in self.tree.key_marks:  # a section that only overrides made
            fitting = [c for c in self.changes if path and c.path[: len(path)] == path]
        return fitting[-1] if fitting else None

    def place(self, path: KeyPath, *, at_key: bool, mark: Mark | None = None) -> _Place:
        if mark is None and (change := self.override_of(path)):
            return _Place(prefix=f"{change.here}: ", path=path, order=(1, self.changes.index(change), 0))
        marks = self.tree.key_marks if at_key else self.tree.value_marks
        known = path
        while mark is None and known:  # a missing key: the section it belongs to
            mark = marks.get(known) if known == path else self.tree.key_marks.get(known)
            known = known[:-1]
        if mark is None:
            return _Place(prefix=f"{self.where}: ", path=path, order=(0, 0, 0))
        return _Place(prefix=f"{self.where}:{mark}: ", path=path, order=(0, mark.line, mark.column))

    def spell(self, complaint: Complaint) -> tuple[_Place, str, str]:
        path = complaint.path
        if not path:  # a combination of keys: the place of the first key it names
            named = re.findall(r"\b[a-z_]+\.[a-z_]+\b", complaint.message)
            paths: list[KeyPath] = [tuple(n.split(".")) for n in named]
            near = [p for p in paths if p in self.tree.key_marks or self.override_of(p)]
            place = self.place((near or paths or [()])[0], at_key=True)
            return _Place(prefix=place.prefix, path=(), order=place.order), complaint.message, complaint.hint
        return self.place(path, at_key=complaint.is_about_key), complaint.message, complaint.hint


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    prefix: str
    path: KeyPath
    order: tuple[int, int, int]  # the file's lines first, then the overrides

    def __str__(self) -> str:
        return self.prefix + (f"{dotted(self.path)}: " if self.path else "")


def _error(found: list[tuple[_Place, str, str]], where: str) -> RecipeError:
    found = sorted(found, key=lambda entry: entry[0].order)
    if len(found) == 1:
        place, message, hint = found[0]
        return RecipeError(f"{place}{message}", hint)
    lines = [f"{where}: {len(found)} errors"]
    for place, message, hint in found[:_MOST_ERRORS]:
        lines.append(f"  {place}{message}")
        if hint:
            lines.append(f"    hint: {hint}")
    if len(found) > _MOST_ERRORS:
        lines.append(f"  and {len(found) - _MOST_ERRORS} more")
    return RecipeError("\n".join(lines))


# -- overrides --


def _apply(value: dict[str, Any], override: str) -> _Change:
    """Write `section.key=value` into the recipe's values."""
    key, equals, text = override.partition("=")
    here = f"override {override}"
    if not equals or not KEY.fullmatch(key):
        raise RecipeError(
            f"{here}: this is not KEY=VALUE", "e.g. adapter.rank=8 or data.train[0].path=my.jsonl"
        )
    return _Change(path=_put(value, key, _value(text, here), here), here=here)


def _choose(value: dict[str, Any], chosen: Sequence[Chosen], sources: _Sources) -> list[_Change]:
    """Write the values of one combination of a sweep into the recipe's values."""
    changes = []
    for one in chosen:
        here = sources.place(one.path, at_key=False).prefix.removesuffix(": ")
        path = _put(value, one.key, copy.deepcopy(one.value), here)
        changes.append(_Change(path=path, here=here, is_typed=sources.override_of(one.path) is not None))
    return changes


def _put(value: dict[str, Any], key: str, new: Any, here: str) -> KeyPath:
    """Change what stands at a key that is well formed; the key's path."""
    steps = re.findall(r"[^.\[\]]+", key)
    node: Any = value
    path: list[str | int] = []
    for i, step in enumerate(steps):
        is_last = i == len(steps) - 1
        fresh: Any = new if is_last else [] if steps[i + 1].isdigit() else {}
        if isinstance(node, list):
            if not step.isdigit() or int(step) > len(node):
                raise RecipeError(
                    f"{here}: {dotted(tuple(path))} is a list of {len(node)}, it has no item {step}",
                    f"use {dotted((*path, 0))} to change an item, {dotted((*path, len(node)))} to add one",
                )
            index = int(step)
            path.append(index)
            if index == len(node):
                node.append(fresh)
            elif is_last:
                node[index] = fresh
            node = node[index]
        elif isinstance(node, dict):
            path.append(step)
            if is_last or node.get(step) is None:
                node[step] = fresh
            node = node[step]
        else:
            raise RecipeError(f"{here}: {dotted(tuple(path))} is the value {node!r} and has no keys")
    return tuple(path)


def _value(text: str, here: str) -> Any:
    # an anchor, alias or tag makes no sense in one value, but the pattern *.mlp.* does
    if text[:1] in tuple("*&!%@`"):
        return text
    try:
        return read(text, where=here).value
    except RecipeError as error:
        hint = "quote the value for YAML too: key='\"a: b\"'"
        raise RecipeError(f"{here}: the value is not valid YAML", hint) from error


# -- paths --


def _resolve_paths(value: dict[str, Any], sources: _Sources, base_dir: Path) -> None:
    """Make the paths in a valid recipe absolute, in place."""

    def resolve(holder: dict[str, Any], path: KeyPath, is_path: Any) -> None:
        text = holder.get(str(path[-1]))
        if text is None:
            return
        change = sources.override_of(path)
        base = Path.cwd() if change is not None and change.is_typed else base_dir
        full = os.path.abspath(base / Path(text).expanduser())
        if is_path(text, full):
            holder[str(path[-1])] = full

    model, data = value["model"], value["data"]
    resolve(model, ("model", "id"), _is_model_path)
    resolve(model, ("model", "tokenizer"), _is_model_path)
    resolve(data, ("data", "cache_dir"), lambda text, full: True)
    for part in ("train", "eval"):
        for i, source in enumerate(data.get(part, ())):
            resolve(source, ("data", part, i, "path"), lambda text, full: True)
            resolve(source, ("data", part, i, "hub"), lambda text, full: os.path.isdir(full))


def _is_model_path(text: str, full: str) -> bool:
    if is_packaged(text):
        return False  # looked up where it runs
    # a hub id is `name` or `owner/name`
    looks_local = text.startswith((".", "/", "~")) or text.count("/") > 1
    return looks_local or text.endswith((".gguf", ".model", ".json")) or os.path.exists(full)


def _name(where: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(where).stem).lstrip("._-")
    return stem or "recipe"
