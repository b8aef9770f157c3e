"""The printed job script: its text, its shell, and what it does between a fake srun and a fake Python."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path
from textwrap import dedent

import pytest
from test_runs import make_checkpoint, make_plan

from decompft.launcher.errors import PlanError
from decompft.launcher.outcome import Outcome, write_outcome
from decompft.launcher.plan import Plan
from decompft.launcher.runs import RunDir
from decompft.slurm import batch
from decompft.slurm.render import script

pytestmark = pytest.mark.dist

GOLDEN = Path(__file__).parent / "golden"


def on_gpus(plan: Plan, *, nodes: int) -> Plan:
    world = plan.world.model_copy(update={"device": "cuda", "nodes": nodes})
    return plan.model_copy(update={"world": world})


def gpu_script() -> str:
    slurm: dict[str, object] = {
        "time": "1-12:00:00", "partition": "gpu", "account": "proj.1", "cpus_per_task": 32, "mem": "400G"
    }  # fmt: skip
    plan = on_gpus(make_plan(ranks=8, slurm=slurm), nodes=4)
    return script(plan, recipe_path="recipes/llama7b_map.yaml", run_dir="runs/llama7b")


def cpu_script() -> str:
    return script(make_plan(ranks=2), recipe_path="tiny.yaml", run_dir="runs/tiny")


NASTY = ('it\'s a "recipe" $HOME `id`\n; touch pwned.yaml', "train.max_steps=$(touch pwned)", "a b=*")


def nasty_script() -> str:
    plan = make_plan(ranks=2, slurm={"time": "1:00:00"})
    return script(plan, recipe_path=NASTY[0], run_dir="runs/it's $HOME %j", overrides=NASTY[1:])


SCRIPTS = {"gpu_4x8": gpu_script, "cpu_1x2": cpu_script, "nasty": nasty_script}


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_equals_its_golden(name: str, update_golden: bool) -> None:
    text, path = SCRIPTS[name](), GOLDEN / f"{name}.sbatch"
    if update_golden:
        path.write_text(text)
    assert text == path.read_text(), "differs from the golden; review, then --update-golden"


def test_every_golden_belongs_to_a_script() -> None:
    assert sorted(p.stem for p in GOLDEN.glob("*.sbatch")) == sorted(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_can_parse_it(name: str) -> None:
    done = subprocess.run(["bash", "-n"], input=SCRIPTS[name](), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str) -> None:
    done = subprocess.run(["shellcheck", "-"], input=SCRIPTS[name](), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_directives_come_first_and_no_machine_path_is_in_it() -> None:
    lines = gpu_script().splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[: last + 1])
    assert "#SBATCH --gpus-per-node=8" in lines and "#SBATCH --time=1-12:00:00" in lines
    assert "gpus-per-node" not in "\n".join(line for line in cpu_script().splitlines() if line[0:1] == "#")
    for text in (gpu_script(), cpu_script()):
        assert str(Path.home()) not in text and os.getcwd() not in text and "/venv" not in text


def test_a_time_limit_without_room_for_a_save_is_refused() -> None:
    with pytest.raises(PlanError, match="slurm.time: 00:05:59"):
        script(make_plan(slurm={"time": "00:05:59"}), recipe_path="r", run_dir="d")
    script(make_plan(slurm={"time": "00:06:00"}), recipe_path="r", run_dir="d")


@pytest.mark.parametrize("value", ["gpu --wrap=id", "a\n#SBATCH --x=1", "$USER", "'a'"])
def test_a_value_that_would_break_the_header_is_refused(value: str) -> None:
    with pytest.raises(PlanError, match="slurm.partition"):
        script(make_plan(slurm={"partition": value}), recipe_path="r", run_dir="d")


# a Python that records what it was asked and answers as the real modules would
PYTHON = """
    #!/bin/bash
    printf '%s\\0' "$@" >> calls; printf '\\n' >> calls
    case "$2 $3" in
    *batch\\ begin) mkdir -p "$4/incarnations/7" "$4/logs/incarnation-7"
        echo "7 10.0.0.1 4242 $CHECKPOINT"; exit "${BEGIN_CODE:-0}" ;;
    *prepare*) exit "${PREPARE_CODE:-0}" ;;
    *batch\\ end) [ -e "$4/incarnations/7/stop" ] && exit 75; exit 0 ;;
    esac
"""
# runs the command of the step as node 1, after what the test wants of it
SRUN = """
    #!/bin/bash
    eval "$SRUN_DOES"
    while [[ $1 == --* ]]; do shift; done
    SLURM_NODEID=1 exec "$@"
"""
SCONTROL = """
    #!/bin/bash
    printf 'vn-1\\nvn-2\\n'
"""


class Cluster:
    """A folder of submission with fake commands on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder / "submit", folder / "bin"
        self.folder.mkdir()
        self.bin.mkdir()
        for name, text in {"python": PYTHON, "srun": SRUN, "scontrol": SCONTROL}.items():
            path = self.bin / name
            path.write_text(dedent(text).lstrip())
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run(self, text: str, **env: str) -> int:
        path = f"{self.bin}:{os.environ['PATH']}"
        known = {"SLURM_JOB_NODELIST": "vn-[1-2]", "SLURM_NNODES": "2", "SRUN_DOES": "", "CHECKPOINT": ""}
        done = subprocess.run(
            ["bash"], input=text, text=True, cwd=self.folder, env=os.environ | known | {"PATH": path} | env,
            timeout=60, capture_output=True,
        )  # fmt: skip
        assert "unbound variable" not in done.stderr and "syntax error" not in done.stderr, done.stderr
        return done.returncode

    @property
    def calls(self) -> list[list[str]]:
        lines = (self.folder / "calls").read_bytes().decode().split("\0\n")
        return [line.split("\0") for line in lines if line]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_every_value_reaches_its_program_as_it_was_given(cluster: Cluster) -> None:
    assert cluster.run(nasty_script(), CHECKPOINT="step-00000100") == 0
    run = "runs/it's $HOME %j"
    begin, prepare, ranks, end = cluster.calls
    pinned = ["parallel.nodes=1", "parallel.gpus_per_node=2"]
    assert begin == [
        *("-m", "decompft.slurm.batch", "begin", run, "--device=cpu", "--peer=vn-2", *NASTY, *pinned)
    ]
    assert prepare == ["-m", "decompft.launcher.worker.tools.prepare", run]
    assert ranks == [
        *("-m", "torch.distributed.run", "--nnodes=2", "--node-rank=1", "--nproc-per-node=2"),
        *("--master-addr=10.0.0.1", "--master-port=4242", "--max-restarts=0"),
        *("-m", "decompft.launcher.worker.main", run, "--incarnation", "7"),
        *("--resume", f"{run}/checkpoints/step-00000100"),
    ]
    assert end == ["-m", "decompft.slurm.batch", "end", run, "7", "0"]
    assert not list(cluster.folder.rglob("pwned*"))


@pytest.mark.parametrize("number", ["USR1", "TERM"])
def test_a_notice_becomes_a_stop_file_and_exit_75(cluster: Cluster, number: str) -> None:
    stop = "runs/tiny/incarnations/7/stop"
    does = f"kill -{number} $PPID; while [ ! -e {stop} ]; do sleep 0.05; done"
    assert cluster.run(cpu_script(), SRUN_DOES=does) == 75
    assert (cluster.folder / stop).exists()
    assert cluster.calls[-1][-1] == "0"  # srun's own code, not that of the interrupted wait


def test_a_users_mistake_starts_no_rank(cluster: Cluster) -> None:
    assert cluster.run(cpu_script(), BEGIN_CODE="2") == 2
    assert len(cluster.calls) == 1
    assert cluster.run(cpu_script(), PREPARE_CODE="2") == 2
    assert cluster.run(cpu_script(), PREPARE_CODE="137") == 3
    assert not any("torch.distributed.run" in call for call in cluster.calls)


RECIPE = """
name: tiny
model: {config: {model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2,
        num_attention_heads: 4, num_key_value_heads: 4, vocab_size: 320}, weights: random}
data: {train: [{path: train.jsonl}], sequence_length: 64}
train: {max_steps: 4, global_batch_size: 4}
"""


def test_begin_makes_the_run_and_then_continues_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DECOMPFT_DEVICE", "cpu")
    Path("tiny.yaml").write_text(RECIPE)
    Path("train.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    begin = ["begin", "runs/tiny", "--device=cpu", "--peer=", "tiny.yaml", "train.max_steps=2"]
    assert batch.main(begin) == 0, capsys.readouterr().err
    incarnation, address, port = capsys.readouterr().out.split()
    assert (incarnation, address, int(port) > 0) == ("1", "127.0.0.1", True)
    assert RunDir.open(Path("runs/tiny")).read_plan().recipe.train.max_steps == 2
    assert Path("runs/tiny/recipe.yaml").read_text() == RECIPE
    make_checkpoint(Path("runs/tiny"), 1)
    assert batch.main(begin) == 0
    assert capsys.readouterr().out.split()[0::3] == ["2", "step-00000001"]
    assert batch.main([*begin, "train.seed=5"]) == 2  # another run
    assert "train.seed" in capsys.readouterr().err
    assert batch.main(["begin", "runs/x", "--device=cuda", "tiny.yaml"]) == 2
    assert not Path("runs/x").exists()


@pytest.mark.parametrize(("result", "code"), [("finished", 0), ("checkpointed", 75), ("user_error", 2)])
def test_end_turns_the_outcome_into_the_exit_code(tmp_path: Path, result: str, code: int) -> None:
    run = RunDir.create(tmp_path, recipe_text="", plan=make_plan())
    run.next_incarnation()
    write_outcome(run.incarnation_dir(1), Outcome(result=result, step=3))  # type: ignore[arg-type]
    assert batch.main(["end", str(tmp_path), "1", "137"]) == code


def test_end_finds_the_rank_behind_sruns_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir.create(tmp_path, recipe_text="", plan=make_plan(ranks=2))
    run.next_incarnation()
    report = ["[0]:", "  host      : vn-2", "  rank      : 3 (local_rank: 1)", "  exitcode  : -9 (pid: 5)"]
    run.launcher_log(1).write_text("".join(f"1: {line}\n" for line in report))
    assert batch.main(["end", str(tmp_path), "1", "1"]) == 3
    assert "rank 3 was killed by signal 9 (SIGKILL)" in capsys.readouterr().err


def test_address_towards_another_node_is_not_taken_from_the_own_name() -> None:
    assert batch.address_towards("") == "127.0.0.1"
    assert batch.address_towards("localhost") in ("127.0.0.1", "::1")
