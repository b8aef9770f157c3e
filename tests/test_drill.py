"""`decompft drill`: its verdicts, from made-up run folders; what it refuses; and real drills of a tiny recipe."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import planning
import pytest
from rich.console import Console

from decompft.launcher.cli import main
from decompft.launcher.drill import show
from decompft.launcher.drill_adapters import compare_adapters
from decompft.launcher.drill_launch import last_words
from decompft.launcher.drill_processes import all_pids, hold, rank_pids, release
from decompft.launcher.drill_verdicts import (
    ADAPTERS,
    FINISHES,
    LOSSES,
    SAMPLES,
    judge,
    not_applicable,
    same_end,
)
from decompft.launcher.drill_watch import began_at, look
from decompft.launcher.job import MARK, WORKER
from decompft.launcher.plan import to_json
from decompft.launcher.runs import RunDir

CPU_PLAN = planning.make(planning.CPU, planning.TINY)
GPU_PLAN = planning.make(planning.gpus(1, 80), planning.TINY)
WEIGHTS = {"a": [1.0, 2.0, 3.0], "b": [0.5]}


def write_adapter(path: Path, tensors: dict[str, list[float]], dtype: str = "F32") -> Path:
    """A safetensors file, written out by hand."""
    header, data = {}, b""
    for name, numbers in tensors.items():
        packed = struct.pack(f"<{len(numbers)}f", *numbers)
        if dtype == "BF16":
            packed = b"".join(packed[i + 2 : i + 4] for i in range(0, len(packed), 4))
        header[name] = {
            "dtype": dtype,
            "shape": [len(numbers)],
            "data_offsets": [len(data), len(data) + len(packed)],
        }
        data += packed
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def make_up(
    folder: Path, losses: dict[int, float], *, plan: Any = CPU_PLAN, tokens: int = 100, weights: Any = WEIGHTS
) -> RunDir:
    """A run that finished, as far as a drill looks at it."""
    run = RunDir(folder)
    folder.mkdir(parents=True)
    run.plan_path.write_text(to_json(plan))
    rows = [
        {"step": step, "loss": loss, "epoch": step / 8, "trained_tokens": tokens}
        for step, loss in losses.items()
    ]
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_adapter(folder / "adapter" / "adapter.safetensors", weights)
    return run


def results(unbroken: RunDir, broken: RunDir) -> dict[str, str]:
    return {verdict.claim: verdict.result for verdict in same_end("part", unbroken, broken)}


def test_a_run_that_ends_as_the_unbroken_one_holds(tmp_path: Path) -> None:
    runs = [make_up(tmp_path / name, {1: 5.0, 2: 4.0}) for name in ("unbroken", "broken")]
    assert results(*runs) == {claim: "holds" for claim in (FINISHES, LOSSES, SAMPLES, ADAPTERS)}


def test_the_last_bit_of_a_loss_fails_on_a_cpu_and_is_allowed_on_a_gpu(tmp_path: Path) -> None:
    for plan, expected in ((CPU_PLAN, "FAILS"), (GPU_PLAN, "holds")):
        device = plan.world.device
        unbroken = make_up(tmp_path / device / "unbroken", {1: 5.0, 2: 4.0}, plan=plan)
        broken = make_up(tmp_path / device / "broken", {1: 5.0, 2: 4.0000005}, plan=plan)
        assert results(unbroken, broken)[LOSSES] == expected, device


def test_the_farthest_loss_is_said_and_fails_on_a_gpu_too(tmp_path: Path) -> None:
    unbroken = make_up(tmp_path / "unbroken", {1: 5.0, 2: 4.0, 3: 3.0}, plan=GPU_PLAN)
    broken = make_up(tmp_path / "broken", {1: 5.0, 2: 4.4, 3: 3.1}, plan=GPU_PLAN)
    losses = same_end("part", unbroken, broken)[1]
    assert losses.result == "FAILS"
    assert "step 2 is the farthest: 4.4, not 4, relative 1.0e-01 (allowed on a GPU: 1e-02)" in losses.measured
    assert losses.numbers["loss_apart"] == pytest.approx(0.1)


def test_a_loss_that_is_not_finite_fails(tmp_path: Path) -> None:
    unbroken = make_up(tmp_path / "unbroken", {1: 5.0, 2: 4.0}, plan=GPU_PLAN)
    broken = make_up(tmp_path / "broken", {1: 5.0, 2: None}, plan=GPU_PLAN)  # type: ignore[dict-item]
    assert results(unbroken, broken)[LOSSES] == "FAILS"


@pytest.mark.parametrize("plan", [CPU_PLAN, GPU_PLAN], ids=["cpu", "gpu"])
def test_a_lost_or_a_repeated_step_and_other_samples_fail(tmp_path: Path, plan: Any) -> None:
    unbroken = make_up(tmp_path / "unbroken", {1: 5.0, 2: 4.0}, plan=plan)
    lost = make_up(tmp_path / "lost", {1: 5.0}, plan=plan)
    assert results(unbroken, lost)[LOSSES] == results(unbroken, lost)[SAMPLES] == "FAILS"
    extra = make_up(tmp_path / "extra", {1: 5.0, 2: 4.0, 3: 4.0}, plan=plan)
    assert "of the steps it adds 3" in same_end("part", unbroken, extra)[2].measured
    others = make_up(tmp_path / "others", {1: 5.0, 2: 4.0}, plan=plan, tokens=101)
    assert results(unbroken, others)[SAMPLES] == "FAILS"


def test_an_adapter_with_lost_numbers_fails_on_a_gpu_too(tmp_path: Path) -> None:
    unbroken = make_up(tmp_path / "unbroken", {1: 5.0}, plan=GPU_PLAN)
    near = make_up(tmp_path / "near", {1: 5.0}, plan=GPU_PLAN, weights={"a": [1.0, 2.0, 3.01], "b": [0.5]})
    reset = make_up(tmp_path / "reset", {1: 5.0}, plan=GPU_PLAN, weights={"a": [1.0, 2.0, 0.0], "b": [0.5]})
    assert results(unbroken, near)[ADAPTERS] == "holds"
    assert results(unbroken, reset)[ADAPTERS] == "FAILS"


def test_a_resume_that_did_not_finish_fails_and_compares_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    finished, *rest = same_end("part", run, run, failure="exit code 3: run failed: disk full")
    assert (finished.claim, finished.result) == (FINISHES, "FAILS") and "disk full" in finished.measured
    assert [verdict.result for verdict in rest] == ["not applicable"] * 3


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_distance_of_adapters_is_that_of_the_worst_tensor(tmp_path: Path, dtype: str) -> None:
    one = write_adapter(tmp_path / "one", {"a": [3.0, 4.0], "b": [1.0]}, dtype)
    two = write_adapter(tmp_path / "two", {"a": [3.0, 5.0], "b": [1.0]}, dtype)
    assert compare_adapters(one, one).is_same
    found = compare_adapters(one, two)
    assert (found.tensor, found.largest, found.problem) == ("a", pytest.approx(0.2), "")


def test_adapters_that_cannot_be_compared_say_why(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", {"a": [3.0, 4.0]})
    other = write_adapter(tmp_path / "other", {"b": [3.0, 4.0]})
    long = write_adapter(tmp_path / "long", {"a": [3.0, 4.0, 5.0]})
    assert "only one of them has a" in compare_adapters(one, other).problem
    assert "a differs in shape" in compare_adapters(one, long).problem
    assert "is missing" in compare_adapters(one, tmp_path / "none").problem
    (tmp_path / "cut").write_bytes(one.read_bytes()[:-1])
    assert "truncated" in compare_adapters(one, tmp_path / "cut").problem


def test_a_look_at_a_run_that_is_being_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert (look(run).incarnation, look(run).step, look(run).saved, look(run).has_plan) == (0, 0, (), False)
    for number in (1, 2):
        run.incarnation_dir(number).mkdir(parents=True)
    run.append_event("start", incarnation=1, checkpoint=None)
    run.append_event("eval", incarnation=1, step=4)
    run.append_event("start", incarnation=2, checkpoint="/somewhere/step-00000003")
    run.metrics_path.write_text('{"step": 4}\n{"step": 5}\n{"ste')
    for name in ("step-00000003", "step-00000006", ".tmp-step-00000009-inc2", ".tmp-deleted-step-00000001"):
        (run.checkpoints_dir / name).mkdir(parents=True)
    (run.checkpoints_dir / "step-00000003" / "COMPLETE").touch()
    now = look(run)
    assert (now.incarnation, now.step, now.saved) == (2, 5, (3,))
    assert [path.name for path in now.saving] == [".tmp-step-00000009-inc2"]
    assert now.has_event("start") and not now.has_event("eval", 4), (
        "the evaluation is of the incarnation before"
    )
    assert (began_at(run, 1), began_at(run, 2)) == (0, 3)


def test_ranks_are_found_held_still_and_released(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    counter = tmp_path / "count"
    code = f"import time\nwhile True: open({str(counter)!r}, 'a').write('x'); time.sleep(0.001)"
    env = {**os.environ, MARK: f"{run.path}#2"}
    agent = subprocess.Popen(["sleep", "60"], env=env)
    rank = subprocess.Popen([sys.executable, "-c", code, WORKER], env={**env, "RANK": "3"})
    try:
        while not counter.exists():
            time.sleep(0.01)
        assert rank_pids(run, 2) == {3: rank.pid}
        assert rank_pids(run, 1) == {}
        assert sorted(all_pids(run)) == sorted([agent.pid, rank.pid])
        hold([rank.pid])
        size = counter.stat().st_size
        time.sleep(0.05)
        assert counter.stat().st_size == size
        release([rank.pid])
        while counter.stat().st_size == size:
            time.sleep(0.001)
    finally:
        for child in (agent, rank):
            child.kill()
            child.wait()


def test_the_last_words_of_a_launch_are_its_failure_in_a_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "step 1\nrun failed: rank 1: no\n  last step: 3\n  hint: yes\n    | noise\nnext: decompft\n"
    )
    assert last_words(log) == "run failed: rank 1: no; hint: yes"
    log.write_text("step 1\nfinished at step 2: r\n\n")
    assert last_words(log) == "finished at step 2: r"


def test_the_table_has_a_line_a_claim_under_its_part() -> None:
    stream = StringIO()
    verdicts = [
        judge("one", "x is y", False, "z"),
        judge("one", "u", True, "v"),
        not_applicable("two", "p", "q"),
    ]
    show(verdicts, Console(file=stream))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert lines == [
        "one", "  x is y  FAILS           z", "  u       holds           v", "two", "  p       not applicable  q",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", "4"], "--steps 4: a drill needs 8 steps or more"),
        (["train.max_steps=5"], "override train.max_steps=5: a drill sets train.max_steps itself"),
        (["logging.wandb.project=x"], "a drill sets logging.wandb.project itself"),
        (["parallel.nodes=2"], "a drill runs on one machine"),
        (["adapter.rnk=2"], "did you mean"),
        (["--run-dir", "full"], "full: a drill needs a folder of its own"),
        (["--json", "none/here.json"], "its folder does not exist"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_ends_with_2_and_starts_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert main(["drill", "resume", "tiny_map", *words]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() and [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]


# -- real launches --

# a large adapter: its saves take long enough to be caught
WORDS = ["tiny_map", "adapter.rank=32"]


def start_drill(folder: Path, *words: str, path: Path | None = None) -> subprocess.Popen[str]:
    env = os.environ | {"DECOMPFT_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    if path is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    argv = [sys.executable, "-m", "decompft.launcher.cli", "drill", words[0], *WORDS, *words[1:]]
    return subprocess.Popen(
        [*argv, f"data.cache_dir={folder}", "--run-dir", "drilled", "--json", "verdicts.json"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=env,
    )  # fmt: skip


def run_drill(
    folder: Path, *words: str, path: Path | None = None
) -> tuple[int, str, dict[tuple[str, str], Any]]:
    """The exit code, what was printed, and the verdicts by part and claim."""
    child = start_drill(folder, *words, path=path)
    out, _ = child.communicate(timeout=560)
    assert "Traceback" not in out
    written = json.loads((folder / "verdicts.json").read_text())
    return child.returncode, out, {(v["part"], v["claim"]): v for v in written["verdicts"]}


def tried(verdicts: dict[tuple[str, str], Any], part: str) -> dict[str, str]:
    return {claim: v["result"] for (of, claim), v in verdicts.items() if of.startswith(part)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_drill_of_two_ranks(tmp_path: Path) -> None:
    code, out, verdicts = run_drill(tmp_path, "kill", "parallel.gpus_per_node=2")
    assert code == 0, out
    one, job = tried(verdicts, "SIGKILL to rank 1"), tried(verdicts, "SIGKILL to every process")
    assert one["the failure is named: which rank, and that it was killed"] == "holds"
    assert one["the ranks that are left save the last completed step"] == "holds"
    assert job["the ranks that are left save the last completed step"] == "not applicable"
    assert job["a half-written save is passed over, and cleared away"] == "holds"
    for part in (one, job):
        assert part[LOSSES] == part[SAMPLES] == part[ADAPTERS] == "holds"
        assert part["the resume takes the newest whole checkpoint"] == "holds"
    assert not (tmp_path / "drilled").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_preempt_drill_catches_every_phase(tmp_path: Path) -> None:
    code, out, verdicts = run_drill(tmp_path, "preempt", "--keep")
    assert code == 0, out
    assert {v["result"] for v in verdicts.values()} == {"holds"}, out
    for phase in ("preparing", "training", "loading", "evaluating"):
        assert verdicts[f"SIGTERM while {phase}", "it stops in order: exit code 75"]["result"] == "holds"
    assert (tmp_path / "drilled" / "unbroken.launch-1.log").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_resume_drill_finds_a_run_that_forgets_its_moments(tmp_path: Path) -> None:
    """The drill is right when it fails: ranks that resume are made to lose the optimizer's moments."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(
        "import sys\n"
        "if '--resume' in sys.orig_argv and 'decompft.launcher.worker.main' in sys.orig_argv:\n"
        "    import decompft.launcher.worker.state as state\n"
        "    state.write_moments = lambda *args, **kwargs: None\n"
    )
    code, out, verdicts = run_drill(tmp_path, "resume", path=tmp_path / "broken")
    assert code == 3, out
    found = tried(verdicts, "stopped in order")
    assert (found[LOSSES], found[ADAPTERS], found[SAMPLES]) == ("FAILS", "FAILS", "holds")
    assert "claims FAIL; runs and logs are kept: drilled" in out
    assert (tmp_path / "drilled" / "stopped.launch-2.log").exists()


@pytest.mark.slow
def test_a_drill_that_is_ended_leaves_no_process(tmp_path: Path) -> None:
    child = start_drill(tmp_path, "resume")
    run = RunDir(tmp_path / "drilled" / "unbroken")
    deadline = time.monotonic() + 60
    while not all_pids(run) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 3, out
    assert "kept, with the logs of every launch: drilled" in out and "Traceback" not in out
    assert not all_pids(run)
    shutil.rmtree(tmp_path / "drilled")
