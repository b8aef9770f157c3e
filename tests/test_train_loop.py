"""The loop's own decisions: when it evaluates, when it ends early, what it proves, what it recomputes."""

import json

import pytest
from tiny import losses, make_run, metrics, recipe_data, run_ranks
from workers import Ended, run_worker

from decompft.launcher.checkpoints import newest_valid
from decompft.launcher.runs import RunDir

pytestmark = pytest.mark.dist

TRAIN = {"max_steps": 6, "learning_rate": 0.01, "global_batch_size": 4, "micro_batch_size": 2}


def run_with_eval(folder, **train) -> RunDir:
    data = {**recipe_data(folder)["data"], "eval_fraction": 0.2}
    run = make_run(folder, data=data, train={**TRAIN, **train})
    run_ranks(run)
    return run


def events(run: RunDir, name: str) -> list[dict]:
    rows = map(json.loads, (run.path / "events.jsonl").read_text().splitlines())
    return [row for row in rows if row["event"] == name]


def test_evaluates_at_the_start_as_asked_and_at_the_end(tmp_path):
    run = run_with_eval(tmp_path, eval_every_steps=4)
    assert [row["step"] for row in events(run, "eval")] == [0, 4, 6]


def test_a_cpu_reads_the_next_step_beside_its_passes(tmp_path):
    """A pass has ended when it returns: what is begun after it is hidden by nothing."""
    seen = tmp_path / "seen"

    def watch() -> None:
        from decompft.launcher.worker.data.ahead import Ahead
        from decompft.launcher.worker.recorded import PlainPasses

        submit, run_pass = Ahead._submit, PlainPasses.run

        def noted_submit(self, step):
            with seen.open("a") as file:
                print("read", step, file=file)
            return submit(self, step)

        def noted_pass(self, batch, num_targets):
            with seen.open("a") as file:
                print("pass", file=file)
            return run_pass(self, batch, num_targets)

        Ahead._submit, PlainPasses.run = noted_submit, noted_pass

    run_ranks(make_run(tmp_path, train={**TRAIN, "max_steps": 2}), patch=watch)
    passes = ["pass"] * (TRAIN["global_batch_size"] // TRAIN["micro_batch_size"])
    # of what is past the end nothing is read, asked for as often as it is
    found = [line for line in seen.read_text().splitlines() if line != "read 2"]
    assert found == ["read 0", "read 1", *passes, *passes]


def test_the_held_out_loss_falls(tmp_path):
    first, *_, last = events(run_with_eval(tmp_path), "eval")
    assert last["loss"] < first["loss"]


def test_stops_early_when_the_evaluation_does_not_improve(tmp_path):
    """At a rate of 1 the loss only grows: two evaluations without gain end the run, which counts as finished."""
    run = run_with_eval(
        tmp_path, learning_rate=1.0, max_grad_norm=0, eval_every_steps=1, early_stop_evals=2, max_steps=40
    )
    steps = [row["step"] for row in events(run, "eval")]
    found = [row["loss"] for row in events(run, "eval")]
    assert 2 <= len(losses(run)) < 40
    assert min(found[:-2]) <= min(found[-2:])
    assert steps[-1] == len(losses(run))
    assert (run.path / "adapter" / "adapter.json").is_file()


def go_on(folder, run: RunDir, **train) -> Ended:
    """A fork of the newest checkpoint with another `train` section."""
    data = {**recipe_data(folder)["data"], "eval_fraction": 0.2}
    fork = make_run(folder, "fork", data=data, train={**TRAIN, **train})
    return run_worker(fork, resume=newest_valid(run.checkpoints_dir)[0])


def test_a_resume_says_how_another_length_makes_the_rate_jump(tmp_path):
    run = run_with_eval(tmp_path, max_steps=4)
    ended = go_on(tmp_path, run, max_steps=8)
    rows = [*metrics(run), *metrics(RunDir(tmp_path / "fork"))]
    before, after = rows[3]["learning_rate"], rows[4]["learning_rate"]
    assert after > 2 * before
    words = f"the learning rate jumps from {before:.3g} at step 4 to {after:.3g} at step 5"
    assert f"{words}: the schedule was laid out for 4 steps, now it is for 8" in ended.screen


@pytest.mark.parametrize("train", [{}, {"schedule": "constant"}])
def test_a_resume_says_nothing_where_the_rate_goes_on(tmp_path, train):
    run = run_with_eval(tmp_path, stop_after_steps=3, **train)
    longer = {**train, "max_steps": 9} if train else {}
    assert "jumps" not in go_on(tmp_path, run, **longer).screen


def test_past_the_end_nothing_is_trained_and_no_change_claimed_that_was_not_measured(tmp_path):
    run = run_with_eval(tmp_path, stop_after_steps=4)
    assert [row["step"] for row in events(run, "eval")] == [0]
    ended = go_on(tmp_path, run, max_steps=3)
    assert ended.outcome.exit_code == 0
    assert "nothing was left to train: the checkpoint is of step 4, the run ends at step 3" in ended.screen
    assert "held-out loss" not in ended.outcome.message and "jumps" not in ended.screen


def test_recomputation_changes_no_number(tmp_path):
    plain = make_run(tmp_path, "plain", train={**TRAIN, "recompute": "none"})
    full = make_run(tmp_path, "full", train={**TRAIN, "recompute": "full"})
    for run, expected in ((plain, "none"), (full, "full")):
        assert run.read_plan().recompute == expected
        run_ranks(run)
    assert losses(full) == losses(plain)


def test_a_tensor_without_gradient_stops_the_run_by_name(tmp_path):
    def cut_off_one_layer() -> None:
        from decompft.adapters.base import Adapter

        whole = Adapter.forward

        def forward(self, x):
            # the wiring fault that users of other tools meet: a layer that runs on its base alone
            return self.base(x) if self.base.out_features == 128 else whole(self, x)

        Adapter.forward = forward

    run = make_run(tmp_path)
    with pytest.raises(
        AssertionError, match=r"step 1: 4 trained tensors have a zero gradient, first .*gate_proj"
    ):
        run_ranks(run, patch=cut_off_one_layer)


def test_a_fork_with_nothing_left_to_train_still_has_its_own_adapter(tmp_path):
    first = make_run(tmp_path, "first", train=TRAIN)
    run_ranks(first)
    fork = make_run(tmp_path, "fork", train=TRAIN)
    run_ranks(fork, resume=first.checkpoints_dir / "step-00000006")
    assert (fork.path / "adapter" / "adapter.safetensors").is_file()


def test_finished_says_what_was_gained_where_it_was_measured():
    from decompft.launcher.worker.train import Progress, held_out_change

    at = Progress(step=9, trained_tokens=1234, start_eval=2.0, last_eval=1.5, eval_step=9)
    assert held_out_change(at) == "; held-out loss 2.0000 -> 1.5000 (-25.0 %)"
    at.eval_step = 6
    assert held_out_change(at) == ""
