"""What is wrong with this recipe, or profile, in words? From pydantic's errors to a path, a sentence and a hint."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from decompft.adapters.spec import ADAPTER_SPECS, UNSUPPORTED
from decompft.adapters.specs.base import WrapperOptions
from decompft.launcher.recipe import AdapterSection, Recipe
from decompft.launcher.yaml_tree import KeyPath

_UNKNOWN_KEY = {"extra_forbidden", "unexpected_keyword_argument"}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Complaint:
    """One thing that is wrong."""

    path: KeyPath
    message: str
    hint: str = ""
    is_about_key: bool = False  # the key itself, not its value


def complaints(error: ValidationError, value: dict[str, Any], model: Any = Recipe) -> list[Complaint]:
    """Say each error once, in the order in which pydantic found them.

    Args:
        error: what `model.model_validate(value)` raised.
        value: the file as plain values.
        model: what the whole file is, a Section.
    """
    groups: dict[KeyPath, list[Any]] = {}
    for detail in error.errors(include_url=False):
        groups.setdefault(_path_in(value, detail["loc"], detail["type"]), []).append(detail)
    found = []
    for path, details in groups.items():
        # an item of a list that is one branch of a union says more than "this is no text either"
        if len(details[0]["loc"]) > len(path) and any(p != path and p[: len(path)] == path for p in groups):
            continue
        for detail in _most_telling(details):
            found.append(_complaint(path, detail, value, model))
    return found


def nearest(word: str, known: Iterable[str]) -> str:
    """'did you mean X?', or '' when nothing is near."""
    words = {k.lower(): k for k in known}
    near = difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=0.6)
    return f"did you mean {words[near[0]]}?" if near else ""


def _path_in(value: Any, loc: tuple[int | str, ...], kind: str) -> KeyPath:
    """The part of pydantic's location that is keys; it also names the branches of a union."""
    path: list[int | str] = []
    for i, step in enumerate(loc):
        if isinstance(value, dict) and value.get("kind") == step and i < len(loc) - 1:
            continue  # a branch that may have the name of a key: {kind: module, module: ...}
        is_key = isinstance(value, dict) and step in value
        is_index = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if is_key or is_index:
            value = value[step]
            path.append(step)
        elif kind == "missing" and i == len(loc) - 1:
            path.append(step)
    return tuple(path)


def _most_telling(details: list[Any]) -> list[Any]:
    """Of the branches of a union: the one whose type fits but not its bounds, else any one."""
    if len(details) == 1 or all(d["type"] == "value_error" for d in details):
        return details
    other = [d for d in details if not d["type"].endswith(("_type", "literal_error"))]
    return (other or details)[:1]


def _complaint(path: KeyPath, detail: Any, value: dict[str, Any], model: Any) -> Complaint:
    kind, found, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind in _UNKNOWN_KEY:
        hint = _hint_unknown(path, value, model)
        return Complaint(path=path, message="unknown key", hint=hint, is_about_key=True)
    if kind == "missing":
        description = _description(path, value, model)
        hint = f"add it: {description}" if description else "add it"
        return Complaint(path=path, message="this key is required and missing", hint=hint, is_about_key=True)
    if (
        path[:1] == ("adapter",)
        and path[-1] == "method"
        and kind == "value_error"
        and found not in UNSUPPORTED
    ):
        hint = f"{nearest(found, ADAPTER_SPECS)} known: {', '.join(ADAPTER_SPECS)}".strip()
        return Complaint(path=path, message=f"unknown method {found!r}", hint=hint)
    if kind == "union_tag_not_found":
        return Complaint(path=path, message=f"needs a kind: {_kinds(path, model, value)}", is_about_key=True)
    if kind == "union_tag_invalid":
        kinds, tag = _kinds(path, model, value), str(context["tag"])
        hint = f"{nearest(tag, kinds.split(', '))} known: {kinds}".strip()
        return Complaint(path=(*path, "kind"), message=f"unknown kind {tag!r}", hint=hint)
    if kind == "value_error":
        if detail["loc"][-1:] == ("[key]",):
            return Complaint(path=path, message=str(context["error"]), is_about_key=True)
        return Complaint(path=path, message=str(context["error"]), is_about_key=isinstance(found, dict))
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return Complaint(path=path, message=f"{found} is out of range, it must be {words} {context[name]}")
    if kind == "finite_number":
        return Complaint(path=path, message=f"found {found}, expected a finite number")
    if kind == "too_short":
        return Complaint(path=path, message=f"the list needs at least {context['min_length']} item")
    annotation = _annotation(model, path, value)
    if kind == "string_pattern_mismatch":
        hint = _description(path, value, model)
        return Complaint(path=path, message=f"{found!r} does not have the form of this key", hint=hint)
    if annotation is None:
        return Complaint(path=path, message=detail["msg"])
    message = f"found {_found(found)}, expected {_expected(annotation)}"
    return Complaint(path=path, message=message, hint=_hint_type(found, annotation))


# -- unknown keys --


def _hint_unknown(path: KeyPath, value: dict[str, Any], model: Any) -> str:
    key, parent = str(path[-1]), path[:-1]
    valid = _keys(parent, value, model)
    if near := nearest(key, valid):
        return near
    method = _method(parent, value)
    if method or parent == ("adapter",):
        owners = [name for name, spec in ADAPTER_SPECS.items() if key in _fields(spec.options)]
        above = _method(("adapter", "options"), value)
        if not method and above in owners:
            return f"it is an option of {above}: write it under adapter.options"
        if owners:
            return f"it is an option of {', '.join(owners)}, not of {method or above}"
    homes = [f"{name}.{key}" for name in model.model_fields if key in _keys((name,), value, model)]
    if homes:
        return f"did you mean {homes[0]}?"
    return f"known here: {', '.join(valid)}" if valid else "it takes no keys here"


def _keys(path: KeyPath, value: dict[str, Any], model: Any) -> tuple[str, ...]:
    """The keys that may stand under a path."""
    if method := _method(path, value):
        return _fields(ADAPTER_SPECS[method].options)
    models = [a for a in _branches(_annotation(model, path, value)) if _is_section(a)]
    chosen = _of_kind(models, _at(value, path))
    return tuple(chosen[0].model_fields) if len(chosen) == 1 else ()


def _method(path: KeyPath, value: dict[str, Any]) -> str:
    """The method whose options stand at a path: the adapter's, an override's, or one under those; '' elsewhere."""
    match path:
        case ("adapter", "options", *below):
            place = value["adapter"]
        case ("adapter", "overrides", int(number), "options", *below):
            place = value["adapter"]["overrides"][number]
        case _:
            return ""
    section = value["adapter"]
    default = section.get("method", AdapterSection.model_fields["method"].default)
    method, given = place.get("method") or default, place.get("options", {})
    kept = section.get("options") if method == default else None  # an override's are added to the section's
    if below and isinstance(kept, dict):
        given = kept | given
    for step in below:
        kind = ADAPTER_SPECS[method].options
        if step != "inner" or not issubclass(kind, WrapperOptions):
            return ""
        default = next(f.default for f in dataclasses.fields(kind) if f.name == "over")
        method, given = given.get("over", default), given["inner"]
    return str(method)


def _fields(options: Any) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(options))


# -- types --


def _annotation(model: Any, path: KeyPath, value: dict[str, Any]) -> Any:
    """The declared type at a path; None where the recipe declares none (inside model.config)."""
    if method := _method(path[:-1], value):
        return typing.get_type_hints(ADAPTER_SPECS[method].options).get(str(path[-1]))
    here: Any = model
    for i, step in enumerate(path):
        steps = [_inside(branch, step) for branch in _of_kind(_branches(here), _at(value, path[:i]))]
        here = next((s for s in steps if s is not None), None)
        if here is None:
            return None
    return here


def _inside(annotation: Any, step: str | int) -> Any:
    if _is_section(annotation):
        field = annotation.model_fields.get(step)
        return field.annotation if field else None
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is list and isinstance(step, int):
        return arguments[0]
    if typing.get_origin(annotation) is tuple and isinstance(step, int):
        return arguments[min(step, len(arguments) - 1)]
    if typing.get_origin(annotation) is dict and arguments[1] is not Any:
        return arguments[1]
    return None


def _branches(annotation: Any) -> list[Any]:
    """The members of a union, without null and without bounds."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [b for a in typing.get_args(annotation) for b in _branches(a) if a is not type(None)]
    return [annotation]


def _of_kind(branches: list[Any], value: Any) -> list[Any]:
    """Of sections that a key `kind` tells apart, the one that the value says it is."""
    kind = value.get("kind") if isinstance(value, dict) else None
    fields = [b.model_fields.get("kind") if _is_section(b) else None for b in branches]
    named = [b for b, f in zip(branches, fields, strict=True) if f and kind in typing.get_args(f.annotation)]
    return named or branches


def _kinds(path: KeyPath, model: Any, value: dict[str, Any]) -> str:
    """What the key `kind` may be in the union of sections at a path."""
    sections = [b for b in _branches(_annotation(model, path, value)) if _is_section(b)]
    return ", ".join(word for s in sections for word in typing.get_args(s.model_fields["kind"].annotation))


def _at(value: Any, path: KeyPath) -> Any:
    """What stands at a path, None where nothing does."""
    for step in path:
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            return None
    return value


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _description(path: KeyPath, value: dict[str, Any], model: Any) -> str:
    parent = [a for a in _branches(_annotation(model, path[:-1], value)) if _is_section(a)]
    parent = _of_kind(parent, _at(value, path[:-1]))
    field = parent[0].model_fields.get(str(path[-1])) if parent else None
    return (field.description or "") if field else ""


def _expected(annotation: Any) -> str:
    words = [_expected_one(branch) for branch in _branches(annotation)]
    return " or ".join(dict.fromkeys(words))


def _expected_one(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        choices = [str(a) for a in arguments]
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if origin is list:
        return "a list" if _is_section(arguments[0]) else f"a list of {_plural(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} {_plural(arguments[0])}"
    if _is_section(annotation) or origin is dict:
        return "a section (key: value)"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(annotation, str(annotation))


def _plural(annotation: Any) -> str:
    return {float: "numbers", int: "whole numbers", str: "texts"}.get(_branches(annotation)[0], "items")


def _found(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case str():
            return f"the text {value!r}" if len(value) <= 60 else f"the text {value[:57]!r}..."
        case int() | float():
            return f"the number {value}"
        case list() | tuple():
            return f"a list of {len(value)}"
    return "a section (key: value)"


def _hint_type(value: Any, annotation: Any) -> str:
    branches = _branches(annotation)
    choices = [str(a) for b in branches if typing.get_origin(b) is Literal for a in typing.get_args(b)]
    if isinstance(value, str) and (near := nearest(value, choices)):
        return near
    if bool in branches:
        return "write true or false"
    if value is None:
        return "write a value, or remove the line for the default"
    if isinstance(value, float) and int in branches and value.is_integer():
        return f"write {int(value)}"
    if isinstance(value, str) and (int in branches or float in branches):
        digits = value.replace("_", "").replace(",", "")
        try:
            is_number = math.isfinite(float(digits))
        except ValueError:
            is_number = False
        if not is_number:
            return ""
        return f"write {digits}, without quotes or separators"
    if isinstance(value, bool | int | float) and str in branches:
        return f'put it in quotes: "{_found(value).removeprefix("the number ")}"'
    if not isinstance(value, list) and any(typing.get_origin(b) is list for b in branches):
        return "start each item with '- '"
    return ""
