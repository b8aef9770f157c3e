"""A recipe with a sweep stands for one recipe a combination; what is wrong with one of them is told with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from decompft.launcher import source
from decompft.launcher.errors import PlanError, RecipeError, UserError
from decompft.launcher.outcome import Outcome, write_outcome
from decompft.launcher.sweep import Task, check_tasks, plan_tasks, tasks_of
from decompft.launcher.sweep_folder import Row, is_sweep, make_folder, read_sweep, tasks_to_run

pytestmark = pytest.mark.usefixtures("on_a_cpu")

RECIPE = """\
name: tiny
model: {config: {model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2,
        num_attention_heads: 4, num_key_value_heads: 4, vocab_size: 320}, weights: random}
adapter: {method: lora}
data: {train: [{path: train.jsonl}], sequence_length: 64}
train: {max_steps: 4, global_batch_size: 4}
sweep:
  parameters:
"""


def tasks(folder: Path, *lines: str, overrides: tuple[str, ...] = ()) -> tuple[Task, ...]:
    path = folder / "r.yaml"
    path.write_text(RECIPE + "".join(f"    {line}\n" for line in lines))
    return tasks_of(path, overrides)


def error(folder: Path, *lines: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        tasks(folder, *lines, overrides=overrides)
    return str(caught.value).replace(f"{folder}/", "")


def test_every_combination_is_a_task_the_last_key_fastest(tmp_path: Path) -> None:
    found = tasks(tmp_path, "adapter.rank: [4, 8]", "train.learning_rate: [1e-3, 2e-3, 3e-3]")
    assert [(t.recipe.adapter.rank, t.recipe.train.learning_rate) for t in found] == [
        (4, 1e-3), (4, 2e-3), (4, 3e-3), (8, 1e-3), (8, 2e-3), (8, 3e-3),
    ]  # fmt: skip
    assert found[3].parameters == {"adapter.rank": 8, "train.learning_rate": 1e-3}
    assert found[3].folder == "003-rank_8-learning_rate_0.001"
    assert [t.recipe.name for t in found[:2]] == ["tiny-000", "tiny-001"]
    assert all(t.recipe.sweep is None for t in found)


def test_overrides_hold_for_all_tasks(tmp_path: Path) -> None:
    found = tasks(tmp_path, "adapter.rank: [4, 8]", overrides=("train.max_steps=7",))
    assert [t.recipe.train.max_steps for t in found] == [7, 7]


def test_a_swept_path_is_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    line = "data.train[0].path: [a.jsonl, b.jsonl]"
    paths = [t.recipe.data.train[0].path for t in tasks(tmp_path, line)]
    assert paths == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    typed = tasks(tmp_path, "adapter.rank: [4]", overrides=('sweep.parameters={"data.train[0].path": [c]}',))
    assert typed[0].recipe.data.train[0].path == str(tmp_path / "elsewhere/c")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "adapter.rank: [4, 0]",
            "r.yaml:9:23: adapter.rank: 0 is out of range, it must be at least 1\n"
            "  in task 1 of the sweep: adapter.rank=0",
        ),
        (
            "adapter.rnk: [4]",
            "r.yaml:9:19: adapter.rnk: unknown key\n  in task 0 of the sweep: adapter.rnk=4\n  hint: did you",
        ),
        ("adapter.rank: [4, 4]", "r.yaml:9:19: sweep.parameters.adapter.rank: 4 is there twice"),
        ("adapter.rank: []", "r.yaml:9:19: sweep.parameters.adapter.rank: the list needs at least 1 item"),
        ("slurm.time: ['1:00:00']", "r.yaml:9:5: sweep.parameters.slurm.time: slurm cannot be swept: "),
        ("parallel.nodes: [1, 2]", "r.yaml:9:5: sweep.parameters.parallel.nodes: parallel.nodes cannot be swept"),
        ("rank..x: [1]", "r.yaml:9:5: sweep.parameters.rank..x: this is not a key of a recipe"),
        ("train.epochs: [1]", "r.yaml:6:1: train: give exactly one of max_steps and epochs\n  in task 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, line: str, told: str) -> None:
    assert error(tmp_path, line).startswith(told)


def test_the_first_of_several_wrong_tasks_is_named(tmp_path: Path) -> None:
    told = error(tmp_path, "adapter.rank: [4, 0]", "train.max_steps: [1, -1]")
    assert "task 1 of the sweep: adapter.rank=4, train.max_steps=-1" in told


def test_an_override_without_effect_is_refused(tmp_path: Path) -> None:
    told = error(tmp_path, "adapter.rank: [4, 8]", overrides=("adapter.rank=3",))
    assert told.startswith("override adapter.rank=3: has no effect")
    # a section above it has one
    tasks(tmp_path, "adapter.rank: [4, 8]", overrides=("adapter={method: map}",))


def test_a_thousand_tasks_are_enough(tmp_path: Path) -> None:
    lines = (f"train.seed: {list(range(101))}", f"adapter.rank: {list(range(1, 11))}")
    assert "1,010 combinations, at most 1,000" in error(tmp_path, *lines)


def test_folders_are_safe_names(tmp_path: Path) -> None:
    line = 'adapter.targets: [all-linear, ["*.mlp.*", "x y/$(id)"]]'
    first, second = (t.folder for t in tasks(tmp_path, line))
    assert first == "000-targets_all-linear"
    assert second == "001-targets__.mlp._x_y_id"


def test_model_and_data_of_every_task_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    found = tasks(tmp_path, "data.train[0].path: [train.jsonl, absent.jsonl]")
    with pytest.raises(UserError, match="absent.jsonl: no such file\n  in task 1 of the sweep"):
        check_tasks(found, strict=True)
    assert len(check_tasks(found, strict=False)) == 1


def test_every_task_is_planned(tmp_path: Path) -> None:
    plans = plan_tasks(tasks(tmp_path, "train.global_batch_size: [4, 8]"))
    assert [(p.name, p.batch.global_size) for p in plans] == [("tiny-000", 4), ("tiny-001", 8)]
    with pytest.raises(PlanError, match="in task 1 of the sweep: train.micro_batch_size=3"):
        plan_tasks(tasks(tmp_path, "train.micro_batch_size: [2, 3]"))


def test_the_folder_remembers_its_tasks_and_which_have_finished(tmp_path: Path) -> None:
    found = tasks(tmp_path, "adapter.rank: [4, 8]")
    folder = tmp_path / "runs/s"
    assert tasks_to_run(folder, found, resume=None) == found
    make_folder(folder, "text", found)
    assert is_sweep(folder) and read_sweep(folder) == tuple(Row.of(task) for task in found)
    with pytest.raises(UserError, match="exists already"):
        tasks_to_run(folder, found, resume=None)
    for number, result in ((1, "checkpointed"), (2, "finished")):
        incarnation = folder / found[0].folder / "incarnations" / str(number)
        incarnation.mkdir(parents=True)
        write_outcome(incarnation, Outcome(result=result, step=4))  # type: ignore[arg-type]  # a parameter
    assert tasks_to_run(folder, found, resume="auto") == found[1:]
    with pytest.raises(UserError, match="over other values"):
        tasks_to_run(folder, tasks(tmp_path, "adapter.rank: [4, 9]"), resume="auto")
    with pytest.raises(UserError, match="--resume other: a sweep has many runs"):
        tasks_to_run(folder, found, resume="other")


def test_the_shipped_sweep_is_four_tasks() -> None:
    path = Path(source.__file__).parent.parent / "recipes/tiny_sweep.yaml"
    found = tasks_of(path, ("train.max_steps=1",))
    assert len(plan_tasks(found)) == 4 and check_tasks(found, strict=True) == ()
