"""The whole of `decompft launch` with real processes: two ranks under torchrun, a resume, signals, dead ranks.

Each launch imports torch and transformers in every process: tens of seconds on a busy machine.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from decompft.launcher.checkpoints import newest_valid
from decompft.launcher.drill_processes import all_pids, send
from decompft.launcher.runs import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CLI = [sys.executable, "-m", "decompft.launcher.cli"]
TWO = ["parallel.gpus_per_node=2", "logging.tensorboard=false"]
ENDLESS = ["train.max_steps=100000", "checkpoint.every_steps=5"]


class Launch:
    """`decompft launch tiny_map` with a run directory of its own, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = RunDir(folder / "run")
        self.text = ""  # what the last launch showed, stdout and stderr
        self._screen = folder / "screen"
        self._child: subprocess.Popen[str] | None = None

    def start(self, *words: str, screen: int | None = None) -> None:
        """Start it; `screen` is a descriptor that takes what it shows, default a file that `wait` reads."""
        argv = [*CLI, "launch", "tiny_map", *words, f"data.cache_dir={self.folder}", "--run-dir", "run"]
        env = os.environ | {"DECOMPFT_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        with self._screen.open("w") as file:
            out = file if screen is None else screen
            self._child = subprocess.Popen(argv, stdout=out, stderr=out, text=True, cwd=self.folder, env=env)

    def wait(self) -> int:
        """The exit code; what was shown is in `text` then."""
        assert self._child is not None
        code = self._child.wait(240)
        self.text = self._screen.read_text()
        assert "Traceback" not in self.text, self.text
        return code

    def __call__(self, *words: str) -> int:
        self.start(*words)
        return self.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self._child is not None
        self._child.send_signal(number)

    def until(self, is_true: Callable[[], Any]) -> None:
        assert self._child is not None
        deadline = time.monotonic() + 200
        while not is_true():
            ended = self._child.poll() is not None
            assert not ended and time.monotonic() < deadline, self._screen.read_text()
            time.sleep(0.02)

    def until_step(self, step: int) -> None:
        self.until(lambda: any(row["step"] >= step for row in self.rows()))

    def rows(self) -> list[dict[str, Any]]:
        if not self.run.metrics_path.exists():
            return []
        # the last line may be half a row while the run writes
        return [json.loads(line) for line in self.run.metrics_path.read_text().split("\n")[:-1]]

    def pid_of(self, rank: int) -> int:
        """The process of a rank, found by its environment and its module."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environ = (folder / "environ").read_bytes().split(b"\0")
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"RANK={rank}".encode() in environ and str(self.run.path).encode() in words:
                return int(folder.name)
        raise AssertionError(f"no process of rank {rank}")

    def kill(self) -> None:
        if self._child is not None and self._child.poll() is None:
            # twice: the second makes it kill its ranks
            for _ in range(2):
                self._child.send_signal(signal.SIGINT)
                time.sleep(1.2)
            self._child.wait(30)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    launch = Launch(tmp_path)
    yield launch
    launch.kill()


def kept(launch: Launch) -> str:
    checkpoint, skipped = newest_valid(launch.run.checkpoints_dir)
    assert checkpoint is not None and not skipped
    return checkpoint.name


def test_a_run_that_was_stopped_continues_the_losses_of_an_unbroken_one(tmp_path: Path) -> None:
    launches = []
    for name in ("unbroken", "broken"):
        (tmp_path / name).mkdir()
        launches.append(Launch(tmp_path / name))
    unbroken, broken = launches
    steps = [*TWO, "train.max_steps=6"]
    assert unbroken(*steps) == 0
    assert "finished at step 6: run" in unbroken.text and "ddp on 2 x cpu" in unbroken.text
    assert (unbroken.run.path / "adapter" / "adapter.safetensors").exists()
    # bad input first: the same command works once it is corrected
    assert broken(*steps, "data.sequence_length=16") == 2
    assert "tokens, but data.sequence_length is 16" in broken.text
    assert broken(*steps, "train.stop_after_steps=3") == 75
    assert "stopped in order at step 3, state saved: run" in broken.text
    command = broken.text.splitlines()[-1]
    assert command.startswith("next: decompft launch tiny_map ") and "--resume auto" in command, command
    assert kept(broken) == "step-00000003" and not (broken.run.path / "adapter").exists()
    assert broken(*steps, "--resume", "auto") == 0
    assert "resuming from run/checkpoints/step-00000003" in broken.text
    found, expected = broken.rows(), unbroken.rows()
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]
    tensors = [launch.run.path / "adapter" / "adapter.safetensors" for launch in launches]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()


def test_sigterm_to_the_launcher_ends_with_75_and_a_checkpoint(launch: Launch) -> None:
    launch.start(*ENDLESS, *TWO, "parallel.strategy=fsdp")
    launch.until_step(3)
    launch.signal(signal.SIGTERM)
    assert launch.wait() == 75
    assert "SIGTERM: asked every rank to save and stop" in launch.text
    step = launch.rows()[-1]["step"]
    assert f"stopped in order at step {step}, state saved" in launch.text
    assert kept(launch) == f"step-{step:08d}"
    events = [
        json.loads(line)["event"] for line in (launch.run.path / "events.jsonl").read_text().splitlines()
    ]
    assert [e for e in events if e in ("start", "signal", "end")] == ["start", "signal", "end"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_notice_to_every_process_ends_with_75_and_a_checkpoint(
    launch: Launch, number: signal.Signals
) -> None:
    """As Slurm's --signal=USR1@120 sends it to launcher, torchrun and ranks."""
    launch.start(*ENDLESS, *TWO)
    launch.until_step(3)
    pids = all_pids(launch.run)
    assert len(pids) >= 3
    send(pids, number)
    time.sleep(0.5)
    assert set(pids) <= set(all_pids(launch.run))
    launch.signal(number)
    assert launch.wait() == 75
    assert f"{number.name}: asked every rank to save and stop" in launch.text
    assert kept(launch) == f"step-{launch.rows()[-1]['step']:08d}"


def test_ctrl_c_in_a_pipe_whose_reader_it_took_ends_with_75_and_a_checkpoint(launch: Launch) -> None:
    """`decompft launch ... 2>&1 | tee log`: the terminal's Ctrl-C ends tee at once."""
    reader, writer = os.pipe()
    launch.start(*ENDLESS, screen=writer)
    os.close(writer)
    launch.until_step(3)
    os.close(reader)
    last = launch.rows()[-1]["step"]
    launch.until_step(last + 2)  # nobody watches, and it goes on
    launch.signal(signal.SIGINT)
    assert launch.wait() == 75
    assert kept(launch) == f"step-{launch.rows()[-1]['step']:08d}"


def test_a_rank_that_is_killed_is_named_with_what_it_did_and_what_to_do(launch: Launch) -> None:
    launch.start(*ENDLESS, *TWO)
    launch.until_step(8)
    os.kill(launch.pid_of(1), signal.SIGKILL)
    assert launch.wait() == 3
    assert "run failed: rank 1 was killed by signal 9 (SIGKILL)" in launch.text
    assert "out of memory" in launch.text
    logged = launch.rows()[-1]["step"]
    said = re.search(r"last step: (\d+)", launch.text)
    assert said is not None
    assert logged <= int(said[1]) <= logged + 1  # the row is written after the step
    assert f"end of {launch.run.log_dir(1).relative_to(launch.folder)}" in launch.text
    # what torchao and bitsandbytes say at their import is not what it died of
    for rank in range(2):
        log = launch.run.rank_log(1, rank).read_text()
        assert not re.search("torchao|kernels-community|Detected no triton|KernelPreference", log), log
    assert launch.text.splitlines()[-1].startswith("next: decompft launch tiny_map ")


@pytest.mark.parametrize("rank", [1, 0])
def test_the_survivor_of_a_killed_ddp_rank_saves_the_last_step(launch: Launch, rank: int) -> None:
    """torchrun sends it SIGTERM while it is at it. No checkpoint is due for long."""
    words = [*TWO, "parallel.strategy=ddp", "checkpoint.every_steps=50000"]
    launch.start("train.max_steps=100000", *words)
    launch.until_step(8)
    os.kill(launch.pid_of(rank), signal.SIGKILL)
    assert launch.wait() == 3
    assert f"run failed: rank {rank} was killed by signal 9 (SIGKILL)" in launch.text
    assert f"  first to fail: rank {rank} on {platform.node()}\n" in launch.text
    logged = launch.rows()[-1]["step"]
    saved = int(kept(launch).removeprefix("step-"))
    assert saved >= logged - 1 and saved >= 7
    stop = f"train.stop_after_steps={saved + 3}"
    assert launch("train.max_steps=100000", stop, *words, "--resume", "auto") == 75
    assert f"resuming from run/checkpoints/step-{saved:08d}" in launch.text
    assert [row["step"] for row in launch.rows()] == list(range(1, saved + 4))


def test_a_rank_that_raises_ends_the_others(launch: Launch) -> None:
    # a folder in the way of a file that only rank 0 writes
    launch.run.metrics_path.mkdir(parents=True)
    began = time.monotonic()
    launch.start(*ENDLESS, *TWO)
    assert launch.wait() == 3
    assert time.monotonic() - began < 120
    assert "run failed: rank 0: IsADirectoryError: " in launch.text and "metrics.jsonl'" in launch.text
    assert "    | IsADirectoryError" in launch.text  # the last lines of its log
    assert "last step: none" in launch.text
    with pytest.raises(AssertionError, match="no process"):
        launch.pid_of(1)
