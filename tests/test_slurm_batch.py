"""What the job script asks Python for: a run to begin or continue, and what to do when its ranks are gone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_runs import make_checkpoint, make_plan

from decompft.launcher.outcome import Outcome, write_outcome
from decompft.launcher.runs import RunDir
from decompft.slurm import batch
from decompft.slurm.after import (
    Decision,
    Job,
    Record,
    begin_again,
    decide,
    decide_unfit,
    read_record,
    write_record,
)
from decompft.slurm.begin import address_towards

pytestmark = pytest.mark.dist

RECIPE = """
name: tiny
model: {config: {model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2,
        num_attention_heads: 4, num_key_value_heads: 4, vocab_size: 320}, weights: random}
data: {train: [{path: train.jsonl}], sequence_length: 64}
train: {max_steps: 4, global_batch_size: 4}
"""


def begin(*words: str, capsys: pytest.CaptureFixture[str], hosts: str = "vn-1") -> list[str]:
    argv = [
        "begin",
        "runs/tiny",
        "--device=cpu",
        f"--hosts={hosts}",
        "--job=5",
        "--recipe=tiny.yaml",
        *(f"--override={word}" for word in words),
    ]
    code = batch.main(argv)
    captured = capsys.readouterr()
    return captured.out.split() if code == 0 else [str(code), captured.err]


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DECOMPFT_DEVICE", "cpu")
    Path("tiny.yaml").write_text(RECIPE)
    Path("train.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    return tmp_path / "runs/tiny"


def test_begin_makes_the_run_and_then_continues_it(
    submitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    act, incarnation, address, count, nodes, patience, checkpoint = begin("train.max_steps=2", capsys=capsys)
    assert (act, incarnation, address) == ("start", "1", "127.0.0.1")
    assert (count, nodes, checkpoint) == ("1", "vn-1", "-")
    assert int(patience) == 180  # checkpoint.grace_s and a minute
    assert RunDir.open(submitted).read_plan().recipe.train.max_steps == 2
    assert (submitted / "recipe.yaml").read_text() == RECIPE
    make_checkpoint(submitted, 1)
    (submitted / "events.jsonl").open("a").write('{"event": "save", "save_s": 50.0}\n{"event": "save", "sa')
    assert begin("train.max_steps=2", capsys=capsys)[1::5] == ["2", "step-00000001"]
    assert begin("train.max_steps=2", capsys=capsys)[5] == "280"
    code, error = begin("train.max_steps=2", "train.seed=5", capsys=capsys)  # another run
    assert code == "2" and "train.seed" in error
    assert batch.main(["begin", "runs/x", "--device=cuda", "--hosts=vn-1", "--recipe=tiny.yaml"]) == 2
    assert not Path("runs/x").exists()


def test_begin_names_the_whole_path_of_a_checkpoint_that_a_fork_begins_with(
    submitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script looks for a name in the run's own folder, where it is not."""
    begin(capsys=capsys)
    origin = make_checkpoint(submitted, 1).rename(submitted.parent / "step-00000001")
    (origin.parent / "checkpoints").mkdir()
    origin = origin.rename(origin.parent / "checkpoints/step-00000001")
    shutil.copy(submitted / "plan.json", submitted.parent / "plan.json")
    RunDir(submitted).write_origin(origin)
    assert begin(capsys=capsys)[-1] == str(origin.absolute())
    make_checkpoint(submitted, 2)
    assert begin(capsys=capsys)[-1] == "step-00000002"


NODES = "127.0.0.1 127.0.0.2 127.0.0.3 127.0.0.4"  # names that resolve everywhere


def test_begin_takes_as_many_nodes_as_come_and_as_the_batch_allows(
    submitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def taken(count: int, nodes: str) -> list[str]:
        hosts = " ".join(NODES.split()[:count])
        return begin(f"parallel.nodes={nodes}", capsys=capsys, hosts=hosts)

    assert taken(2, "3-4") == ["requeue", "-"]  # before there is a run
    assert taken(4, "1-4")[3:5] == ["4", NODES.replace(" ", ",")]
    assert taken(3, "1-4")[3:5] == ["2", "127.0.0.1,127.0.0.2"]  # four rows cannot be spread over three
    assert taken(4, "1")[3:5] == ["1", "127.0.0.1"]  # the others are spares
    assert taken(2, "3-4") == ["requeue", "-"]
    assert RunDir.open(submitted).read_plan().recipe.parallel.nodes == 1


def test_begin_leaves_out_nodes_that_are_down_or_were_at_fault(
    submitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(capsys=capsys)
    write_record(RunDir(submitted), Record(excluded=("127.0.0.2",)))
    argv = ["begin", "runs/tiny", "--device=cpu", f"--hosts={NODES}", "--down=127.0.0.3", "--job=5"]
    assert batch.main([*argv, "--recipe=tiny.yaml", "--override=parallel.nodes=2"]) == 0
    assert capsys.readouterr().out.split()[3:5] == ["2", "127.0.0.1,127.0.0.4"]


def test_a_node_whose_name_does_not_resolve_is_named(
    submitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = begin("parallel.nodes=2", capsys=capsys, hosts="localhost no-such-node.invalid")
    assert code == "2" and "the name of node no-such-node.invalid does not resolve" in error


def test_a_second_job_in_the_same_run_is_refused(submitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(capsys=capsys)
    argv = ["begin", "runs/tiny", "--device=cpu", "--hosts=a", "--live=4\n5", "--recipe=tiny.yaml"]
    assert batch.main([*argv, "--job=6"]) == 2
    assert "job 5 is running in this directory" in capsys.readouterr().err
    assert batch.main([*argv, "--job=5"]) == 0


def ended(run: RunDir, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert batch.main(["end", str(run.path), "1", "137", "--hosts=vn-1 vn-2", *words]) == 0
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("result", "does"), [("finished", "exit 0"), ("checkpointed", "requeue -"), ("user_error", "exit 2")]
)
def test_end_turns_the_outcome_into_an_act(
    tmp_path: Path, result: str, does: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir.create(tmp_path, recipe_text="", plan=make_plan())
    run.next_incarnation()
    write_outcome(run.incarnation_dir(1), Outcome(result=result, step=3))  # type: ignore[arg-type]
    assert ended(run, capsys) == does


def test_a_suspect_checkpoint_is_no_progress_and_giving_up_names_a_fork(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each start goes on before it and comes to it again."""
    run = RunDir.create(tmp_path / "run", recipe_text="", plan=make_plan(slurm={"max_failures": 2}))
    run.next_incarnation()
    good = make_checkpoint(run.path, 6)
    make_checkpoint(run.path, 8, reason="non-finite")
    write_outcome(run.incarnation_dir(1), Outcome(result="failed", cause="non_finite", step=8))
    acts = []
    for _ in range(3):
        write_record(run, replace(read_record(run), step=6))  # as `begin` does
        assert batch.main(["end", str(run.path), "1", "1", "--hosts=vn-1 vn-2"]) == 0
        told = capsys.readouterr()
        acts.append(told.out.split()[0])
    assert acts[-1] == "exit" and "exit" not in acts[:-1]
    lower = (
        f"decompft launch RECIPE train.learning_rate=0.0001 --resume {good} --run-dir {run.path}-2 --slurm"
    )
    assert f"next: {lower} (" in told.err


def test_a_run_that_was_cancelled_or_reached_its_stop_is_not_requeued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir.create(tmp_path, recipe_text="", plan=make_plan(train={"stop_after_steps": 3}))
    run.next_incarnation()
    write_outcome(run.incarnation_dir(1), Outcome(result="checkpointed", step=2))
    assert ended(run, capsys) == "requeue -"
    (run.path / "slurm/cancelled").write_text("{}")
    assert ended(run, capsys) == "exit 75"
    (run.path / "slurm/cancelled").unlink()
    write_outcome(run.incarnation_dir(1), Outcome(result="checkpointed", step=3))
    assert ended(run, capsys) == "exit 75"


def test_end_finds_the_rank_behind_sruns_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir.create(tmp_path, recipe_text="", plan=make_plan(ranks=2))
    run.next_incarnation()
    report = ["[0]:", "  host      : vn-2", "  rank      : 3 (local_rank: 1)", "  exitcode  : -9 (pid: 5)"]
    run.launcher_log(1).write_text("".join(f"1: {line}\n" for line in report))
    assert batch.main(["end", str(tmp_path), "1", "1", "--hosts=vn-1 vn-2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "here -\n"
    assert "rank 3 was killed by signal 9 (SIGKILL)" in captured.err
    assert read_record(run).suspects == {"vn-2": 1}


def test_sruns_own_cancelling_is_no_preemption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir.create(tmp_path, recipe_text="", plan=make_plan(ranks=2))
    run.next_incarnation()
    (run.incarnation_dir(1) / "slurm.json").write_text('{"job_id": "5", "restart": 0, "nodes": ["vn-1"]}')
    report = ["  host      : localhost", "  rank      : 1 (local_rank: 1)", "  exitcode  : -11 (pid: 5)"]
    cancelled = "0: slurmstepd-vn-1: error: *** STEP 39.0 ON vn-1 CANCELLED AT 2026-11-22T17:42:05 ***"
    ended_by = "srun: launch/slurm: _step_signal: Terminating StepId=39.0"
    lines = [*(f"1: {line}" for line in report), ended_by, cancelled]
    run.launcher_log(1).write_text("".join(f"{line}\n" for line in lines))
    assert ended(run, capsys) == "here -"
    assert read_record(run).suspects == {"vn-1": 1}


def test_address_towards_another_node_is_not_taken_from_the_own_name() -> None:
    assert address_towards("") == "127.0.0.1"
    assert address_towards("localhost") in ("127.0.0.1", "::1")


def test_the_node_at_fault_has_slurms_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir.create(tmp_path, recipe_text="", plan=make_plan(ranks=2))
    run.next_incarnation()
    (run.incarnation_dir(1) / "slurm.json").write_text(
        '{"job_id": "5", "restart": 0, "nodes": ["vn-1", "vn-2"]}'
    )
    failed = Outcome(result="failed", cause="crash", rank=3, node="localhost")
    for outcome in (
        failed,
        replace(failed, node="vn-2.cluster.example", rank=0),
        replace(failed, node="vn-2"),
    ):
        write_outcome(run.incarnation_dir(1), outcome)
        write_record(run, Record())
        ended(run, capsys)
        assert read_record(run).suspects == {"vn-2": 1}


def test_a_job_that_was_submitted_after_a_cancel_goes_on(
    submitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(capsys=capsys)
    mark = submitted / "slurm/cancelled"
    for jobs, stays in ((["5"], True), (["4"], False)):
        mark.write_text(json.dumps({"jobs": jobs}))
        begin(capsys=capsys)
        assert mark.exists() == stays


def test_a_stale_script_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir.create(tmp_path, recipe_text="", plan=make_plan())
    run.next_incarnation()
    run.next_incarnation()
    assert ended(run, capsys) == "exit 75"
    assert not (run.path / "slurm").exists() and not (run.path / "events.jsonl").exists()


def test_starts_that_leave_no_word_and_make_no_step_end_some_day(
    submitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(capsys=capsys)
    run = RunDir(submitted)
    write_record(run, Record(idle_stops=25))
    assert begin(capsys=capsys) == ["exit", "3"]
    assert begin(capsys=capsys)[:2] == ["start", "2"]  # submitted again, it counts from the beginning
    write_record(run, Record(idle_stops=25))
    make_checkpoint(submitted, 1)
    assert begin(capsys=capsys)[:2] == ["start", "3"]
    assert read_record(run) == Record(step=1)
    write_record(run, Record(step=1, idle_stops=25))
    write_outcome(
        run.incarnation_dir(3), Outcome(result="checkpointed", step=1)
    )  # this one had something to say
    assert begin(capsys=capsys)[:2] == ["start", "4"]


def test_a_first_node_without_its_gpus_is_left_out(
    submitted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    argv = ["begin", "runs/tiny", "--device=cuda", f"--hosts={NODES}", "--job=5", "--recipe=tiny.yaml"]
    assert batch.main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out == "requeue 127.0.0.1\n"
    assert "127.0.0.1 is not fit to train: Slurm gave 2 GPUs on it, 0 can be seen" in captured.err
    write_record(RunDir(submitted), replace(read_record(RunDir(submitted)), failures=3))
    assert batch.main([*argv[:3], f"--hosts={NODES[10:]}", *argv[4:]]) == 0
    captured = capsys.readouterr()
    assert captured.out == "exit 3\n" and "slurm.max_failures is 3" in captured.err
    # where the job was given none, the script is wrong, not the node
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    assert batch.main([*argv[:3], "--hosts=127.0.0.3", *argv[4:]]) == 2


def test_a_sites_grace_shortens_the_runs(submitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["begin", "runs/tiny", "--device=cpu", "--hosts=vn-1", "--job=5", "--recipe=tiny.yaml"]
    assert batch.main([*argv, "--grace=40"]) == 0
    assert RunDir.open(submitted).read_plan().recipe.checkpoint.grace_s == 35
    assert batch.main([*argv, "--grace=600"]) == 0
    assert RunDir.open(submitted).read_plan().recipe.checkpoint.grace_s == 120


# -- the decision itself --


def decided(outcome: Outcome, record: Record | None = None, *, saved: int = 0, hosts: str = "a b", down: str = "",
            fewest: int = 2, stopping: bool = False) -> Decision:  # fmt: skip
    job = Job(hosts=tuple(hosts.split()), down=tuple(down.split()), fewest=fewest, is_stopping=stopping)
    return decide(outcome, record or Record(), job, saved_step=saved, ends=False, cap=3)


CRASH = Outcome(result="failed", node="b", cause="crash")


def test_failures_in_a_row_end_at_the_cap_and_progress_starts_the_count_again() -> None:
    record, acts = Record(), []
    for _ in range(4):
        decision = decided(Outcome(result="failed", cause="data"), record)
        record = decision.record
        acts.append(decision.act)
    assert acts == ["here", "here", "here", "exit"] and decision.code == 3
    assert (record.failures, begin_again(record).failures) == (
        4,
        0,
    )  # whoever submits it again has changed something
    assert decided(CRASH, record, saved=5).record.failures == 1
    assert decided(Outcome(result="checkpointed"), record, saved=5).record.failures == 0


def test_twenty_preemptions_do_not_use_the_cap_up() -> None:
    record = Record()
    for step in range(20):
        decision = decided(Outcome(result="checkpointed", step=step), record, saved=step)
        assert decision.act == "requeue"
        record = decision.record
    assert record.failures == 0


def test_stops_that_never_let_it_make_a_step_end_some_day() -> None:
    record, acts = Record(), []
    for _ in range(26):
        decision = decided(Outcome(result="checkpointed"), record)
        record = decision.record
        acts.append(decision.act)
    assert acts == ["requeue"] * 25 + ["exit"] and decision.code == 75
    assert decided(Outcome(result="checkpointed"), record, saved=1).act == "requeue"


def test_a_rank_that_is_told_to_end_while_it_starts_is_no_failure() -> None:
    decision = decided(Outcome(result="failed", cause="preempted", node="b"), Record(failures=3))
    assert (decision.act, decision.record.failures, decision.record.suspects) == ("requeue", 3, {})


def test_a_node_that_is_at_fault_twice_is_left_out() -> None:
    first = decided(CRASH, hosts="a b c")
    assert (first.act, first.exclude, first.record.suspects) == ("here", (), {"b": 1})
    second = decided(CRASH, first.record, saved=7, hosts="a b c")
    assert (second.act, second.exclude) == ("here", ("b",))  # a spare takes its place
    assert second.record.excluded == ("b",) and second.record.suspects == {}
    assert decided(CRASH, first.record).act == "requeue"  # there is none
    assert decided(
        Outcome(result="failed", node="a", cause="crash"), Record(suspects={"a": 1}), hosts="a b c"
    ).act == (
        "requeue"  # the script itself runs there
    )


@pytest.mark.parametrize("cause", ["data", "non_finite", "out_of_memory_gpu", "disk", "user"])
def test_what_would_follow_the_run_anywhere_speaks_against_no_node(cause: str) -> None:
    assert decided(Outcome(result="failed", node="b", cause=cause)).record.suspects == {}


def test_a_lost_node_and_a_stop_do_not_start_here_again() -> None:
    lost = Outcome(result="failed", node="b", cause="node_lost")
    assert decided(lost).act == "requeue"
    assert decided(lost, hosts="a b c").act == "here"
    assert decided(CRASH, down="b").act == "requeue"
    assert decided(CRASH, stopping=True).act == "requeue"


def test_a_node_that_is_late_at_the_check_twice_is_left_out() -> None:
    job = Job(hosts=("a", "b", "c"), down=(), fewest=2, is_stopping=False)
    first = decide_unfit(["b"], ["a", "b"], Record(), job, cap=3, unsure=["b"])
    assert (first.act, first.exclude, first.record.suspects) == ("here", (), {"b": 1})
    second = decide_unfit(["b"], ["a", "b"], first.record, job, cap=3, unsure=["b"])
    assert (second.act, second.exclude, second.record.excluded) == ("here", ("b",), ("b",))
    # one that is surely bad goes at once
    assert decide_unfit(["b", "c"], ["a", "b", "c"], Record(), job, cap=3, unsure=["b"]).exclude == ("c",)
