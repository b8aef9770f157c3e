"""Starting a job here: signals, dead ranks, outcomes, and what is said about them.

The jobs are small real programs; the ones under torchrun are marked `dist`.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest
from rich.console import Console
from test_runs import RECIPE, make_checkpoint, make_plan

from decompft.launcher.ending import report
from decompft.launcher.errors import PlanError, UserError
from decompft.launcher.job import MARK, JobSpec, free_port
from decompft.launcher.local import launch
from decompft.launcher.outcome import Outcome, read_outcome, write_outcome
from decompft.launcher.runs import RunDir
from decompft.launcher.supervise import Interrupts, PortTaken, supervise

pytestmark = pytest.mark.dist

# what a child program starts with: its incarnation's folders, and the words of a rank
PRELUDE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

run = Path(sys.argv[1]); here = run / "incarnations/1"; logs = run / "logs/incarnation-1"
rank = int(os.environ.get("RANK", "0"))
def log(text): (logs / f"rank-{rank}.log").open("a").write(text + "\\n")
def tell(name, **row):
    row = {"step": 0, "message": "", "hint": "", "rank": None} | row
    (here / f".{name}").write_text(json.dumps(row)); (here / f".{name}").rename(here / name)
def signal_again(number): time.sleep(1.05); os.kill(os.getppid(), number)  # sooner is the same notice
def wait_for(path):
    while not path.exists(): time.sleep(0.01)
"""


class Job:
    """A run directory with a child program in it."""

    def __init__(self, folder: Path) -> None:
        self.run = RunDir.create(folder / "run", recipe_text=RECIPE, plan=make_plan(ranks=2))
        assert self.run.next_incarnation() == 1
        self.said: list[str] = []

    def spec(self, body: str, *, port: int | None = None) -> JobSpec:
        script = self.run.path.parent / "child.py"
        script.write_text(PRELUDE + dedent(body))
        torchrun = (
            *("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "0"),
            *("--master-addr", "127.0.0.1", "--master-port", str(port)),
        )
        return JobSpec(
            argv=(sys.executable, *(torchrun if port else ()), str(script), str(self.run.path)),
            env={MARK: f"{self.run.path}#1", "OMP_NUM_THREADS": "1"},
            run_dir=self.run.path,
            nodes=1,
            ranks_per_node=2,
        )

    def supervise(self, body: str, *, port: int | None = None) -> Outcome:
        job = self.spec(body, port=port)
        with Interrupts() as interrupts:
            return supervise(job, self.run, 1, interrupts=interrupts, say=self.said.append)

    def report(self, outcome: Outcome) -> str:
        lines: list[str] = []
        report(self.run, 1, outcome, again="decompft launch x --resume auto", say=lines.append)
        return "\n".join(lines)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_orderly_end_is_rank_0s_word_whatever_the_exit_code(job: Job) -> None:
    outcome = job.supervise("tell('outcome.json', result='finished', step=10); sys.exit(1)")
    assert (outcome.result, outcome.step, outcome.exit_code) == ("finished", 10, 0)
    assert "finished at step 10" in job.report(outcome)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
)
def test_a_signal_becomes_a_stop_file_and_the_run_ends_with_75(job: Job, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    outcome = job.supervise(f"""
        signal.signal({number}, lambda *_: tell('outcome.json', result='failed'))  # must not come here
        os.kill(os.getppid(), {number})
        wait_for(here / 'stop')
        tell('outcome.json', result='checkpointed', step=4)
    """)
    assert (outcome.result, outcome.exit_code) == ("checkpointed", 75)
    assert signal.getsignal(number) is before
    assert len(job.said) == 1 and number.name in job.said[0] and "save and stop" in job.said[0]
    events = (job.run.path / "events.jsonl").read_text()
    assert f'"signal": "{number.name}"' in events
    assert "--resume auto" in job.report(outcome)


def test_a_second_signal_kills_a_job_that_does_not_listen(job: Job) -> None:
    began = time.monotonic()
    outcome = job.supervise(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getppid(), signal.SIGINT)
        wait_for(here / 'stop')
        signal_again(signal.SIGINT)
        time.sleep(600)
        """
    )
    assert time.monotonic() - began < 60
    assert (outcome.result, outcome.exit_code) == ("failed", 3)
    assert "second signal" in outcome.message
    assert read_outcome(job.run.incarnation_dir(1)) == outcome


def test_a_second_signal_after_the_save_still_ends_with_75(job: Job) -> None:
    outcome = job.supervise("""
        os.kill(os.getppid(), signal.SIGINT)
        wait_for(here / 'stop')
        tell('outcome.json', result='checkpointed', step=4)
        signal_again(signal.SIGINT)
        time.sleep(600)
    """)
    assert outcome.exit_code == 75


def test_a_notice_sent_twice_is_one(job: Job) -> None:
    outcome = job.supervise("""
        for _ in range(3): os.kill(os.getppid(), signal.SIGTERM)
        wait_for(here / 'stop')
        tell('outcome.json', result='checkpointed', step=4)
    """)
    assert outcome.exit_code == 75
    assert len(job.said) == 1


def test_a_schedulers_notice_and_its_sigterm_at_the_end_are_one(job: Job) -> None:
    outcome = job.supervise("""
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            signal_again(number)
        wait_for(here / 'stop')
        time.sleep(1)
        tell('outcome.json', result='checkpointed', step=4)
    """)
    assert outcome.exit_code == 75
    assert len(job.said) == 1 and job.said[0].startswith("SIGUSR1: ") and "once more" not in job.said[0]


def test_a_second_sigterm_after_a_notice_kills(job: Job) -> None:
    outcome = job.supervise("""
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM):
            signal_again(number)
        time.sleep(600)
    """)
    assert outcome.exit_code == 3 and "second signal" in outcome.message


def test_a_job_does_not_die_of_the_notice_that_it_gets_as_well(job: Job) -> None:
    """Slurm sends it to every process of a step."""
    outcome = job.supervise("""
        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            os.kill(child.pid, number)
            os.kill(os.getpid(), number)
        time.sleep(0.5)
        assert child.poll() is None
        child.kill()
        tell('outcome.json', result='finished', step=4)
    """)
    assert outcome.exit_code == 0


def test_ranks_that_outlive_a_killed_agent_are_ended(job: Job) -> None:
    outcome = job.supervise("""
        # as torchrun does: a rank in a session of its own
        sleep = [sys.executable, '-c', 'import time; time.sleep(600)']
        child = subprocess.Popen(sleep, start_new_session=True)
        (run / 'pid').write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    pid = int((job.run.path / "pid").read_text())
    deadline = time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(pid)
    assert outcome.exit_code == 3
    assert "the process that started the ranks was killed by signal 9 (SIGKILL)" in outcome.message
    assert "out of memory" in outcome.hint


def test_a_failed_rank_is_named_with_step_cause_lines_and_the_next_command(job: Job) -> None:
    outcome = job.supervise("""
        for n in range(20): log(f'line {n} [0/2]')
        tell('rank-0.json', result='failed', step=12, time_s=2.0, message='Connection closed by peer')
        tell('rank-1.json', result='failed', step=12, time_s=3.0, rank=1,
             message='torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB')
        rank = 1; log('the last line of rank 1')
        sys.exit(1)
    """)
    assert (outcome.rank, outcome.step, outcome.exit_code) == (1, 12, 3)
    text = job.report(outcome)
    assert "run failed: rank 1: torch.OutOfMemoryError" in text
    assert "the GPU ran out of memory" in text
    assert "last step: 12" in text
    assert "| the last line of rank 1" in text and "line 19" not in text
    assert text.endswith("next: decompft launch x --resume auto")


def test_a_users_mistake_on_a_rank_ends_with_2_and_no_log(job: Job) -> None:
    outcome = job.supervise("""
        log('noise')
        tell('rank-1.json', result='user_error', time_s=3.0, message='adapter.targets: no such layer',
             hint='try q_proj')
        tell('rank-0.json', result='failed', time_s=2.0, message='Connection reset by peer')
        sys.exit(1)
    """)
    assert outcome.exit_code == 2
    text = job.report(outcome)
    assert "cannot train: rank 1: adapter.targets: no such layer" in text and "hint: try q_proj" in text
    assert "noise" not in text
    # the same command would only fail again
    assert text.splitlines()[-1] == "next, when that is mended: decompft launch x --resume auto"


def test_the_last_step_comes_from_this_incarnations_metrics(job: Job) -> None:
    job.run.metrics_path.write_text('{"step": 40}\n')
    died_early = job.supervise("sys.exit(1)")
    assert died_early.step == 0
    (job.run.incarnation_dir(1) / "outcome.json").unlink()
    outcome = job.supervise("""
        with (run / 'metrics.jsonl').open('a') as file: file.write('{"step": 41}\\n{"step": 42}\\n{"st')
        print('ImportError: libcuda.so', file=sys.stderr)
        sys.exit(1)
    """)
    assert outcome.step == 42
    assert "ended with exit code 1" in outcome.message and "doctor" in outcome.hint
    assert "ImportError: libcuda.so" in job.report(outcome)  # no rank log: the launcher's


def test_a_port_that_was_taken_is_no_failure_of_the_run(job: Job) -> None:
    with pytest.raises(PortTaken):
        job.supervise("print('... errno: 98 EADDRINUSE ...', file=sys.stderr); sys.exit(1)")
    assert read_outcome(job.run.incarnation_dir(1)) is None


@pytest.mark.dist
def test_torchrun_meets_a_taken_port(job: Job) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        with pytest.raises(PortTaken):
            job.supervise("log('never')", port=stranger.getsockname()[1])


@pytest.mark.dist
def test_under_torchrun_the_rank_that_was_killed_is_found_not_the_one_that_complains(job: Job) -> None:
    outcome = job.supervise(
        """
        log(f'rank {rank} is up')
        if rank == 1:
            wait_for(here / 'rank-0.json')
            os.kill(os.getpid(), signal.SIGKILL)
        tell('rank-0.json', result='failed', step=3, time_s=1.0, message='Connection closed by peer')
        time.sleep(600)
        """,
        port=free_port(),
    )
    assert "rank 1 was killed by signal 9 (SIGKILL)" in outcome.message
    assert outcome.rank == 1
    text = job.report(outcome)
    assert "rank 1 is up" in text and "out of memory" in text


def launched(tmp_path: Path, **changes: object) -> tuple[int, str]:
    out = io.StringIO()
    settings: dict[str, object] = {"run_dir": tmp_path / "r", "resume": None, "dry_run": True} | changes
    plan = settings.pop("plan", make_plan(ranks=2))
    code = launch(plan, RECIPE, console=Console(file=out, width=80), **settings)  # type: ignore[arg-type]
    return code, out.getvalue()


def test_dry_run_shows_all_and_writes_nothing(tmp_path: Path) -> None:
    code, text = launched(tmp_path)
    assert code == 0
    assert list(tmp_path.iterdir()) == []
    assert "torch.distributed.run --nnodes 1 --nproc-per-node 2" in text
    assert "forecast: 1.00 of 8.00 GiB a rank (base 1.00)" in text
    assert "PYTHONSAFEPATH=1" in text and f"would make {tmp_path / 'r'}" in text
    assert launched(tmp_path)[1] == text


def test_dry_run_names_the_checkpoint_it_would_resume(tmp_path: Path) -> None:
    plan = make_plan(ranks=2)
    RunDir.create(tmp_path / "r", recipe_text=RECIPE, plan=plan)
    checkpoint = make_checkpoint(tmp_path / "r", 7)
    _, text = launched(tmp_path, resume="auto")
    assert f"resuming from {checkpoint}" in text and f"--resume {checkpoint}" in text


def test_a_run_on_several_nodes_is_not_started_here(tmp_path: Path) -> None:
    plan = make_plan()
    far = plan.model_copy(update={"world": plan.world.model_copy(update={"nodes": 2})})
    with pytest.raises(PlanError, match="parallel.nodes"):
        launched(tmp_path, plan=far)


def test_a_run_in_use_is_not_continued(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "r", recipe_text=RECIPE, plan=make_plan(ranks=2))
    held = run.lock()
    with pytest.raises(UserError, match="another launch"):
        launched(tmp_path, resume="auto", dry_run=False)
    os.close(held)


def test_a_full_disk_does_not_hide_the_outcome(job: Job) -> None:
    # a folder in the way stands for every reason a file cannot be replaced
    (job.run.incarnation_dir(1) / "outcome.json").mkdir()
    outcome = job.supervise(
        "tell('rank-0.json', result='failed', message='Errno 28', time_s=1.0); sys.exit(1)"
    )
    assert outcome.exit_code == 3 and "disk" in outcome.hint
    with pytest.raises(OSError):
        write_outcome(job.run.incarnation_dir(1), outcome)
