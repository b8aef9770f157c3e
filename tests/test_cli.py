"""Verbs print and exit as documented; a user's mistake never shows a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from decompft.launcher.cli import main

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "recipes" / "tiny_map.yaml")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_check_says_ok(capsys: Capture) -> None:
    assert main(["check", TINY]) == 0
    assert capsys.readouterr().out == f"{TINY}: ok (tiny_map)\n"


def test_check_warns_of_data_that_is_not_there(capsys: Capture) -> None:
    assert main(["check", TINY, "data.train[0].path=none.jsonl"]) == 0
    assert "warning: data.train[0].path: " in capsys.readouterr().err


def test_launch_refuses_data_that_is_not_there(capsys: Capture) -> None:
    assert main(["launch", TINY, "data.train[0].path=none.jsonl"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: data.train[0].path: ") and "\n  hint: " in err
    assert not Path("runs").exists()


def test_a_wrong_key_is_an_error_in_words(capsys: Capture) -> None:
    assert main(["check", TINY, "adapter.rnk=3"]) == 2
    assert capsys.readouterr().err == (
        "error: override adapter.rnk=3: adapter.rnk: unknown key\n  hint: did you mean rank?\n"
    )


def test_a_missing_recipe_is_an_error_in_words(capsys: Capture) -> None:
    assert main(["plan", "none.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: none.yaml: no such file")


def test_overrides_may_follow_options(capsys: Capture) -> None:
    assert main(["plan", TINY, "adapter.rank=2", "--json", "train.max_steps=7"]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert (recipe["adapter"]["rank"], recipe["train"]["max_steps"]) == (2, 7)


@pytest.mark.parametrize(
    "argv",
    [["launch", TINY, "--dry-rnu"], ["schema", "a=b"], ["lunch"], ["launch"], ["check", TINY, "--x=3"]],
)
def test_what_argparse_does_not_know_is_wrong_input(argv: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_no_verb_prints_the_help(capsys: Capture) -> None:
    assert main([]) == 2
    assert "launch" in capsys.readouterr().out


def test_version(capsys: Capture) -> None:
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"decompft {version('decompft')}\n"


def test_dry_run_writes_nothing(capsys: Capture) -> None:
    assert main(["launch", TINY, "--dry-run", "--run-dir", "r"]) == 0
    assert "would" in capsys.readouterr().out
    assert list(Path().iterdir()) == []


def test_plan_json_is_the_plan(capsys: Capture) -> None:
    assert main(["plan", TINY, "--json"]) == 0
    out = capsys.readouterr().out
    plan = json.loads(out)
    assert plan["name"] == "tiny_map" and plan["batch"]["global_size"] == 4
    assert out == json.dumps(plan, indent=2, sort_keys=True) + "\n"


def test_sbatch_prints_a_script(capsys: Capture) -> None:
    assert main(["sbatch", TINY, "slurm.time=1:00:00", "--run-dir", "there", "adapter.rank=2"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!") and "--time=1:00:00" in script
    assert TINY in script and "adapter.rank=2" in script and "there" in script


def test_recipes_are_listed_shown_and_copied(capsys: Capture) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert main(["recipes", "list"]) == 0
    assert capsys.readouterr().out == listed
    assert any(line.startswith("tiny_map ") and "MAP" in line for line in listed.splitlines())
    assert main(["recipes", "show", "tiny_map"]) == 0
    assert capsys.readouterr().out == Path(TINY).read_text()
    assert main(["recipes", "copy", "tiny_map", "mine"]) == 0
    assert capsys.readouterr().out.endswith("next: decompft launch mine/tiny_map.yaml\n")
    assert main(["check", "mine/tiny_map.yaml"]) == 0
    assert main(["recipes", "copy", "tiny_map", "mine"]) == 2


def test_schema_is_json(capsys: Capture) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"


@pytest.mark.parametrize(
    "argv",
    [
        ["merge", "no-adapter", "--into", "dense", "--out", "out"],
        ["eval", "no-adapter", "--task", "a.jsonl", "b.jsonl", "--limit", "3", "--json", "--no-adapter"],
        ["generate", "no-adapter", "--prompt", "-5 + 3?", "--max-new-tokens", "4", "--format", "plain"],
        ["inspect", "data", TINY, "--num", "2", "data.train[0].path=none.jsonl"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_tool_that_is_given_nothing_real_exits_with_two(argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "decompft.launcher.cli", *argv], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "error: " in done.stderr
    assert "usage:" not in done.stderr, "the tool does not know these arguments"


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m decompft.launcher.cli schema | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")
