"""docs/slurm-profiles.md has a row for every field of a profile; the examples and the schema are those of the code."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import pytest

from decompft.launcher.cli import main
from decompft.launcher.recipe_section import Section
from decompft.slurm import profile as profiles
from decompft.slurm.profile import Profile, load

PAGE = Path(__file__).parent.parent / "docs/slurm-profiles.md"
BEGIN, END = "<!-- table: tests/test_slurm_profiles_page.py --update-golden -->\n", "<!-- end of table -->\n"
EXAMPLES = ("container-pyxis", "generic-gpu", "gres-modules-infiniband")


def test_the_examples_are_these_and_valid() -> None:
    folder = Path(profiles.__file__).parent / "profiles"
    assert tuple(sorted(path.stem for path in folder.glob("*.yaml"))) == EXAMPLES
    read = {name: load(folder / f"{name}.yaml") for name in EXAMPLES}
    assert {p.environment.kind for p in read.values()} == {"venv", "conda", "pyxis"}
    assert {p.gpu_request for p in read.values()} == {"gpus-per-node", "gres"}
    for name in EXAMPLES:
        text = (folder / f"{name}.yaml").read_text(encoding="ascii")
        assert text.startswith("# ") and text.count("#") > 8, f"{name} should teach"


def rows(kind: type[Section], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Key, what it may be, default and meaning of each field, sections opened."""
    found = []
    for name, field in kind.model_fields.items():
        key = f"{prefix}{name}"
        inner = [a for a in branches(field.annotation) if isinstance(a, type) and issubclass(a, Section)]
        if len(inner) > 1:
            for branch in inner:
                of = typing.get_args(branch.model_fields["kind"].annotation)[0]
                found += [(k, f"{v}", d, m) for k, v, d, m in rows(branch, f"{key} ({of}).")]
        elif inner:
            found += rows(inner[0], f"{key}.")
        else:
            found.append((key, value_of(field.annotation), default_of(field), field.description or ""))
    return found


def branches(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        return branches(typing.get_args(annotation)[0])
    if type(None) in typing.get_args(annotation) or str(annotation).startswith(("typing.Union", "decompft")):
        return [b for a in typing.get_args(annotation) for b in branches(a) if a is not type(None)]
    if " | " in str(annotation) and not isinstance(annotation, type):
        return [b for a in typing.get_args(annotation) for b in branches(a) if a is not type(None)]
    return [annotation]


def value_of(annotation: Any) -> str:
    (one,) = branches(annotation)
    match typing.get_origin(one):
        case typing.Literal:
            return " ".join(f"`{word}`" for word in typing.get_args(one))
        case origin if origin is list:
            return f"list of {value_of(typing.get_args(one)[0])}"
        case origin if origin is dict:
            return "NAME: value"
    return {str: "text", int: "number", bool: "`true` `false`"}[one]


def default_of(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default()
    if value in (None, [], {}, ""):
        return ""
    words = value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else value]
    return " ".join(f"`{word}`" for word in words)


def table() -> str:
    lines = ["| field | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key, value, standard, meaning in rows(Profile):
        lines.append(f"| `{key}` | {value} | {standard} | {meaning} |")
    return "\n".join(lines) + "\n"


def test_the_page_has_a_row_for_every_field(update_golden: bool) -> None:
    text = PAGE.read_text(encoding="ascii")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    new = before + BEGIN + table() + END + after
    if update_golden:
        PAGE.write_text(new, encoding="ascii")
    assert PAGE.read_text(encoding="ascii") == new, "review, then --update-golden"


def test_every_field_says_what_it_means() -> None:
    found = rows(Profile)
    assert len(found) > 40
    assert [key for key, _, _, meaning in found if not meaning or "\n" in meaning or "|" in meaning] == []


def test_the_schema_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--profile"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(Profile.model_fields)
    assert schema["additionalProperties"] is False
