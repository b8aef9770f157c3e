"""The README and docs/ say what is true: their commands run, their keys exist, their figures are in the results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import BaseModel

from decompft.launcher.deepspeed_config import ALLOWED
from decompft.launcher.recipe import Recipe
from decompft.launcher.source import parse

pytestmark = pytest.mark.dist

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

# what the line above a shell block may say: which test runs it, or why none does
QUICK, TOUR, OWN_DATA, CI, GPU_ONLY = "test: quick", "test: tour", "test: own-data", "ci", "gpu-only"
ON_A_CLUSTER = "needs a cluster"  # tests/test_slurm_survives.py does it, with another recipe
AS_PRINTED = "as printed"  # above a text block: each line is in the output of the block before


@dataclass(frozen=True)
class Block:
    """A fenced block, with the HTML comment on the line above it."""

    where: str
    language: str
    marker: str
    text: str


def blocks(page: Path) -> list[Block]:
    lines, found = page.read_text(encoding="ascii").splitlines(), []
    start: int | None = None
    for number, line in enumerate(lines):
        if start is None and line.startswith("```"):
            start = number
        elif start is not None and line == "```":
            above = re.fullmatch(r"<!-- (.*) -->", lines[start - 1])
            text = "\n".join(lines[start + 1 : number]) + "\n"
            marker = above[1] if above else ""
            found.append(Block(f"{page.name}:{start + 1}", lines[start].strip("`"), marker, text))
            start = None
    assert start is None, f"{page.name}:{start}: a block that does not end"
    return found


def run(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A block as a stranger would run it: bash, with the command on PATH, in a folder of its own."""
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DECOMPFT_CACHE": str(folder / ".cache"), "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",  # of the terminal whose output the pages show
    }  # fmt: skip
    return subprocess.run(
        ["bash", "-e", "-c", text], cwd=folder, env=env, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


ALL = [block for page in PAGES for block in blocks(page)]


def marked(marker: str) -> list[Block]:
    return [block for block in ALL if block.language == "sh" and block.marker == marker]


def test_every_shell_block_is_run_or_says_why_not() -> None:
    shell = [block for block in ALL if block.language in ("sh", "bash", "shell", "console", "")]
    assert len(shell) > 8
    known = (QUICK, TOUR, OWN_DATA, CI, GPU_ONLY, ON_A_CLUSTER)
    assert [block.where for block in shell if block.language != "sh" or block.marker not in known] == []
    assert len(marked(OWN_DATA)) == 1  # test_own_data.py
    for block in marked(CI):  # .ci/run calls `make test`; `make quickstart` installs, which no test does
        commands = [line.split("#")[0].strip() for line in block.text.splitlines()]
        assert set(commands) <= {"make quickstart", "make test"}, block.where


@pytest.mark.parametrize("block", marked(QUICK), ids=lambda block: block.where)
def test_a_quick_block_prints_what_the_page_shows(block: Block, tmp_path: Path) -> None:
    done = run(block.text, tmp_path)
    assert done.returncode == 0, done.stdout
    after = ALL[ALL.index(block) + 1 :][:1]
    if not after or after[0].marker != AS_PRINTED:
        return
    printed = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in after[0].text.splitlines():
        # dots stand for what was left out
        pattern = ".*".join(map(re.escape, " ".join(line.split()).split("...")))
        assert any(re.fullmatch(pattern, other) for other in printed), f"{line!r} not in\n{done.stdout}"


def test_as_printed_follows_a_quick_block() -> None:
    pairs = [(a.marker, b.marker) for a, b in zip(ALL, ALL[1:], strict=False)]
    assert sum(b == AS_PRINTED for _, b in pairs) >= 4
    assert all(a == QUICK for a, b in pairs if b == AS_PRINTED)


@pytest.mark.slow
def test_the_tour_runs_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    tour = marked(TOUR)
    assert len(tour) == 5
    said = ""
    for block in tour:
        done = run(block.text, tmp_path)
        assert done.returncode == 0, f"{block.where}\n{done.stdout}"
        said += done.stdout
    for words in (
        "exit code 75", "resuming from runs/tiny_map/checkpoints/step-00000012", "finished at step 20",
        "[[The capital of Italy is Rome.</s>]]", '"num_records": 2', "transformers loads it",
        "next: decompft launch tiny_map train.stop_after_steps=null --resume auto --run-dir runs/tiny_map",
    ):  # fmt: skip
        assert words in said, said
    assert (tmp_path / "runs/tiny_map/adapter/adapter.safetensors").is_file()
    assert (tmp_path / "merged/model.safetensors").is_file()


def test_the_recipes_on_the_pages_are_recipes(tmp_path: Path) -> None:
    import yaml

    needed = {
        "model": {"id": "some/model"}, "data": {"train": [{"path": "x.jsonl"}]}, "train": {"max_steps": 1}
    }  # fmt: skip
    texts = [(block.where, block.text) for block in ALL if block.language == "yaml"]
    texts += [
        (b.where, text) for b in ALL for text in re.findall(r"<<'END'\n(model:.*?)^END$", b.text, re.S | re.M)
    ]
    assert len(texts) >= 3
    for where, text in texts:
        # a part of a recipe is completed with what every recipe must have
        missing = {key: value for key, value in needed.items() if f"\n{key}:" not in "\n" + text}
        whole = text + (yaml.safe_dump(missing) if missing else "")
        parse(whole, where=where, base_dir=tmp_path)


def test_every_key_that_a_page_names_exists() -> None:
    sections = Recipe.model_fields
    named = {
        (page.name, key)
        for page in PAGES
        for key in re.findall(rf"`((?:{'|'.join(sections)})\.\w+)", page.read_text())
    }
    assert len(named) > 20

    def exists(key: str) -> bool:
        name, field = key.split(".")
        section = sections[name].annotation
        assert isinstance(section, type) and issubclass(section, BaseModel)
        return field in section.model_fields

    # data.jsonl is a file
    assert {(page, key) for page, key in named if key != "data.jsonl" and not exists(key)} == set()


def test_figures_of_speed_and_accuracy_are_in_the_results() -> None:
    results = ROOT / "benchmarks" / "results"
    rows = [
        row for name in ("single_gpu", "matrix") for row in json.loads((results / f"{name}.json").read_text())
    ]
    speeds = {f"{row['tokens_per_s']:,}" for row in rows if "tokens_per_s" in row}
    section = README.read_text().split("## Speed\n")[1].split("\n## ")[0]
    shown = set(re.findall(r"\b\d\d,\d{3}\b", section))
    assert len(shown) > 8 and shown <= speeds, shown - speeds
    tasks = ("boolq", "arc_easy", "arc_challenge", "openbookqa", "mean")  # the table's columns
    cases = {
        tuple(f"{100 * row['accuracy'][task]:.1f}" for task in tasks)
        for row in json.loads((results / "commonsense.json").read_text())
    }  # fmt: skip
    section = README.read_text().split("## Accuracy")[1].split("\n## ")[0]
    table = {
        tuple(re.findall(r"\d+\.\d", line.split("|", 2)[2]))
        for line in section.splitlines()
        if line.startswith("| ")
    }
    assert table - {()} == cases


def test_measured_figures_of_strategies_are_in_the_results() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "matrix.json").read_text())
    page = (ROOT / "docs" / "parallel.md").read_text().split("## Measured on two H200s\n")[1]
    names = {(row["call"], row["micro_batch"], row["strategy"]): row for row in rows if row["phase"] == "engines"
             and row["case"] == row["strategy"]}  # fmt: skip
    shown = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in page.split("###")[0].splitlines()
        if "|" in line
    ]
    for strategy, call, micro, tokens, times, _, peak, error, loss, tolerance in shown[2:]:
        row = names[call, int(micro), strategy.split(",")[0]]
        assert tokens == f"{row['tokens_per_s']:,}"
        assert float(times.split()[0]) == row.get("times_single", row.get("times_single_of_another_call"))
        assert (peak, error) == (f"{row['peak_gib']:.1f}", f"{row['forecast_error_percent']} %")
        assert not loss or float(loss) == float(f"{row['loss_difference_to_single']:.1e}")
        assert "tolerance" not in row or not tolerance or float(tolerance) == float(f"{row['tolerance']:.1e}")


def test_every_key_that_deepspeeds_config_may_be_given_is_on_the_page() -> None:
    page = (ROOT / "docs" / "parallel.md").read_text()
    named = set(re.findall(r"`(\w+)`", page.split("## parallel.deepspeed\n")[1].split("\n## ")[0]))
    zero = ALLOWED["zero_optimization"]
    assert {*ALLOWED, *zero, *zero["offload_param"], *zero["offload_optimizer"]} == named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="ascii")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.is_file(), f"{page.name}: {target}"
        heads = re.findall(r"^#+ (.*)$", other.read_text(), re.M)
        anchors = {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}
        assert not anchor or anchor in anchors, f"{page.name}: {target}"
