"""docs/adapters: a page a method that names its options and says whether it is a reading, and a table of them all."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from decompft.adapters.spec import ADAPTER_SPECS, UNSUPPORTED, AdapterConfig, spec_of

FOLDER = Path(__file__).parent.parent / "docs" / "adapters"
INDEX = FOLDER / "README.md"
BEGIN, END = "<!-- table: tests/test_adapter_pages.py --update-golden -->\n", "<!-- end of table -->\n"


def page_of(name: str) -> Path:
    """A page of its own, or the one whose heading names it among others."""
    own = FOLDER / f"{name}.md"
    if own.exists():
        return own
    shared = [p for p in FOLDER.glob("*.md") if re.search(rf"\b{name}\b", p.read_text().splitlines()[0])]
    assert len(shared) == 1, f"docs/adapters has no page for {name}"
    return shared[0]


def of_base(name: str) -> str:
    """What a method needs of the base at its defaults."""
    spec = ADAPTER_SPECS[name]
    config = AdapterConfig(method=name, rank=16, alpha=32.0, dropout=0.0, options=spec.options())
    words = {
        "frobenius_norm": "its norm",
        "row_norms": "norms of rows",
        "column_norms": "norms of columns",
        "full_weight": "factors of the full-precision weight",
        "zero_fraction": "every weight, each step",
    }
    found = [words[n] for n in spec_of(config).needs(config)]
    if "start_step" in {f.name for f in dataclasses.fields(spec.options)}:
        found.append("all singular vectors of the full-precision weight, at step t")
    return ", ".join(found) or "products"


def table() -> str:
    rows = ["| method | formula | of the base | |", "| --- | --- | --- | --- |"]
    for name, spec in ADAPTER_SPECS.items():
        notes = ["a reading"] * spec.is_reading + ["does not merge"] * (not spec.mergeable)
        link = f"[`{name}`]({page_of(name).name})"
        formula = spec.title.replace("|", "\\|")
        rows.append(f"| {link} | {formula} | {of_base(name)} | {', '.join(notes)} |")
    return "\n".join(rows) + "\n"


def test_the_table_of_methods_is_current(request):
    text = INDEX.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    new = before + BEGIN + table() + END + after
    if request.config.getoption("--update-golden"):
        INDEX.write_text(new)
    assert INDEX.read_text() == new


@pytest.mark.parametrize("name", ADAPTER_SPECS)
def test_a_page_names_every_option_and_its_default(name):
    text = page_of(name).read_text()
    for option in dataclasses.fields(ADAPTER_SPECS[name].options):
        assert f"`{option.name}`" in text, option.name
    assert ("reading" in text.lower()) or not ADAPTER_SPECS[name].is_reading


@pytest.mark.parametrize("name", ADAPTER_SPECS)
def test_an_option_is_documented_in_one_line(name):
    for option in dataclasses.fields(ADAPTER_SPECS[name].options):
        assert option.metadata["doc"] and "\n" not in option.metadata["doc"]


def test_what_is_refused_is_said():
    text = INDEX.read_text()
    assert all(f"`{name}`" in text for name in UNSUPPORTED)


def test_no_page_is_of_nothing():
    pages = {page_of(name) for name in ADAPTER_SPECS}
    assert set(FOLDER.glob("*.md")) == {*pages, INDEX}
