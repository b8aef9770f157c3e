"""What values does a YAML text hold, and where does each of them stand?

YAML as a recipe needs it, by the rules of version 1.2: `3e-4` is a number, `1:30:00` and `yes` are
text, only true and false are booleans, and a key that stands twice is an error, not the last one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from decompft.launcher.errors import RecipeError

KeyPath = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_SCALARS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    (
        "float",
        re.compile(r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"),
        list("-+.0123456789"),
    ),
)
# what the parser says -> what usually causes it
_SYNTAX_HINTS = (
    ("mapping values are not allowed", "put a value that contains ': ' in quotes, or check the indentation"),
    ("could not find expected ':'", "a key is followed by a colon and a space, as in 'rank: 16'"),
    ("expected <block end>", "check the indentation of this line against the lines above"),
    ("did not find expected key", "check the indentation of this line against the lines above"),
    ("did not find expected '-'", "check the indentation of this line against the lines above"),
    ("cannot start any token", "put the value in quotes"),
    ("undefined alias", "a value that starts with * is put in quotes"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A place in a text; both count from 1."""

    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.line}:{self.column}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """A parsed text."""

    value: Any  # dict (keys are text), list, str, int, float, bool or None
    key_marks: dict[KeyPath, Mark]  # where the key, or the list item, stands
    value_marks: dict[KeyPath, Mark]  # where its value starts
    twice: tuple[tuple[KeyPath, Mark, Mark], ...]  # repeated keys: path, first place, second place


def read(text: str, *, where: str) -> Tree:
    """Parse one YAML document.

    Args:
        text: the document.
        where: what to call it in errors.

    Raises:
        RecipeError: it is not YAML, or uses a part of YAML that recipes leave out.
    """
    import yaml  # here, because a rank imports the recipe's types but never reads YAML

    try:
        loader = _loader_class()(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, where) from error
    except yaml.reader.ReaderError as error:
        mark = _mark_at(text, error.position)
        message = f"{where}:{mark}: a character that YAML does not allow: {_code(error.character)}"
        raise RecipeError(message, "delete it, or save the file as plain UTF-8 text") from error
    walk = _Walk(where)
    value = None if node is None else walk.value(node, ())
    return Tree(value=value, key_marks=walk.key_marks, value_marks=walk.value_marks, twice=tuple(walk.twice))


def dotted(path: KeyPath) -> str:
    """`data.train[0].path`"""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


@cache
def _loader_class() -> Any:  # a yaml Loader subclass; yaml's stubs do not name the C one's base
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loader: Any = type("RecipeLoader", (base,), {"yaml_implicit_resolvers": {}})
    for name, pattern, first in _SCALARS:
        loader.add_implicit_resolver(_TAG + name, pattern, first)
    return loader


class _Walk:
    """Turns nodes into values and notes the place of each."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.key_marks: dict[KeyPath, Mark] = {}
        self.value_marks: dict[KeyPath, Mark] = {}
        self.twice: list[tuple[KeyPath, Mark, Mark]] = []
        self.open: set[int] = set()  # nodes that the walk is inside of

    def value(self, node: Any, path: KeyPath) -> Any:
        mark = _mark(node)
        self.value_marks[path] = mark
        self.key_marks.setdefault(path, mark)
        if id(node) in self.open:
            raise RecipeError(f"{self.where}:{mark}: an anchor that contains itself")
        self.open.add(id(node))
        try:
            if node.id == "mapping" and node.tag == _TAG + "map":
                return self._mapping(node, path)
            if node.id == "sequence" and node.tag == _TAG + "seq":
                return [self.value(child, (*path, i)) for i, child in enumerate(node.value)]
            if node.id == "scalar":
                return self._scalar(node, mark)
        finally:
            self.open.discard(id(node))
        raise self._unknown_tag(node, mark)

    def _mapping(self, node: Any, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, child in node.value:
            mark = _mark(key_node)
            if key_node.id != "scalar":
                raise RecipeError(
                    f"{self.where}:{mark}: a key must be plain text",
                    "put a value that starts with { or [ in quotes",
                )
            key = key_node.value
            if key == "<<":
                raise RecipeError(
                    f"{self.where}:{mark}: merge keys (<<) cannot be used here", "write the keys out"
                )
            here = (*path, key)
            if key in found:
                self.twice.append((here, self.key_marks[here], mark))
                continue
            self.key_marks[here] = mark
            found[key] = self.value(child, here)
        return found

    def _scalar(self, node: Any, mark: Mark) -> Any:
        text, tag = node.value, node.tag.removeprefix(_TAG)
        try:
            match tag:
                case "str":
                    return text
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
                case "float":
                    return float(text.replace(".inf", "inf").replace(".nan", "nan"))
        except (ValueError, KeyError):  # an explicit tag on a text that is none: !!int abc
            raise RecipeError(f"{self.where}:{mark}: {text!r} is not of type !!{tag}") from None
        raise self._unknown_tag(node, mark)

    def _unknown_tag(self, node: Any, mark: Mark) -> RecipeError:
        tag = node.tag.replace(_TAG, "!!")
        return RecipeError(
            f"{self.where}:{mark}: the tag {tag} is not known here",
            "put a value that starts with ! in quotes",
        )


def _mark(node: Any) -> Mark:
    return Mark(line=node.start_mark.line + 1, column=node.start_mark.column + 1)


def _mark_at(text: str, position: int) -> Mark:
    before = text[:position]
    return Mark(line=before.count("\n") + 1, column=position - before.rfind("\n"))


def _code(character: Any) -> str:
    # the C reader gives the number, the Python one the character
    number = character if isinstance(character, int) else ord(character)
    return f"U+{number:04X}"


def _syntax_error(error: Any, text: str, where: str) -> RecipeError:
    mark = error.problem_mark or error.context_mark
    line = text.splitlines()[mark.line] if mark.line < len(text.splitlines()) else ""
    place = f"{where}:{mark.line + 1}:{mark.column + 1}"
    if "\t" in line[: len(line) - len(line.lstrip())] or line[mark.column : mark.column + 1] == "\t":
        return RecipeError(f"{place}: a tab is used to indent or to separate", "use spaces")
    problem = error.problem or "this is not YAML"
    if "expected a single document" in f"{error.context} {problem}":
        return RecipeError(f"{place}: a second document starts here", "remove the line with ---")
    context = f" {error.context}" if error.context else ""
    hint = next((hint for sign, hint in _SYNTAX_HINTS if sign in problem), "")
    return RecipeError(f"{place}: this is not valid YAML:{context} {problem}".replace(":  ", ": "), hint)
