"""Every recipe that ships loads, is checked and is planned, with nothing but the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from decompft.launcher import checking, planner, shipped, source
from decompft.launcher.errors import RecipeError, UserError
from decompft.launcher.machine import Machine

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
NEEDED = {"quickstart", "tiny_map", "llama7b_map", "llama7b_lora", "llama70b_map"}


TWO_GPUS = Machine(num_gpus=2, gpu_memory_bytes=80 << 30, num_cores=16)


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights from this machine's hub cache."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def test_the_recipes_are_there() -> None:
    assert {path.stem for path in RECIPES} >= NEEDED
    assert [entry.path for entry in shipped.shipped()] == RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_checked_and_planned(path: Path) -> None:
    recipe = source.load(path)
    assert recipe.name == path.stem
    warnings = checking.check(recipe, strict=False)
    assert all("not on this machine" in w or "no such file" in w or "not installed" in w for w in warnings)
    # a CPU is too small for it: planned as on its hardware
    plan = planner.make(recipe, machine=TWO_GPUS if path.stem == "llama70b_map" else None)
    assert plan.recipe == recipe
    assert plan.num_adapter_params > 0 and plan.forecast.total_bytes > 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_opens_with_what_a_reader_needs(path: Path) -> None:
    lines = path.read_text(encoding="ascii").splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert header[0] == "# yaml-language-server: $schema=schema.json"
    for word in ("hardware:", "cost:", "command:"):
        assert sum(line.startswith(f"# {word}") for line in header) == 1, word
    assert f"decompft launch recipes/{path.name}" in "\n".join(header)


def test_the_shipped_schema_is_current() -> None:
    shown = (ROOT / "recipes" / "schema.json").read_text()
    assert shown == source.schema_json(), "run: decompft schema > recipes/schema.json"


@pytest.mark.parametrize("argument", ["tiny_map", "tiny_map.yaml", "recipes/tiny_map.yaml"])
def test_a_shipped_recipe_is_found_by_name(
    argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped.find(argument) == ROOT / "recipes" / "tiny_map.yaml"


def test_a_file_of_the_user_goes_before_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_map").write_text("")
    assert shipped.find("tiny_map") == Path("tiny_map")


@pytest.mark.parametrize("argument", ["tiny_mapp", "recipes/tinymap.yaml"])
def test_an_unknown_recipe_names_the_nearest(
    argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        shipped.find(argument)
    assert "did you mean tiny_map?" in caught.value.hint


def test_another_folder_is_not_taken_for_a_shipped_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        shipped.find(str(tmp_path / "tiny_map.yaml"))


def test_a_copy_runs_by_itself(tmp_path: Path) -> None:
    written = shipped.copy("tiny_map", tmp_path / "mine")
    assert [str(p.relative_to(tmp_path / "mine")) for p in written] == [
        "tiny_map.yaml",
        "schema.json",
        "data/tiny.jsonl",
    ]
    assert checking.check(source.load(written[0]), strict=True) == ()
    with pytest.raises(UserError, match="exists already"):
        shipped.copy("tiny_map", tmp_path / "mine")


def test_a_copy_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tiny.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="differs"):
        shipped.copy("tiny_map", tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["tiny.jsonl"]
    assert (tmp_path / "data" / "tiny.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("name", ["llama7b_map", "llama7b_lora"])
def test_launch_refuses_what_check_only_warns_of(name: str) -> None:
    recipe = source.load(shipped.find(name))
    assert checking.check(recipe, strict=False)
    with pytest.raises(UserError):
        checking.check(recipe, strict=True)
