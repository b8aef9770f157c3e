"""The check before training, by real processes that stand for nodes: each fault is found, and the right node named.

Faults come from outside: another disk, a stand-in for a program, or a sitecustomize in one node's PYTHONPATH that bends
the standard library or torch there. Nodes that need none are forked, which saves loading torch.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing as mp
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist

from decompft.launcher.job import free_port
from decompft.launcher.node_file import NodeFile, nodes_dir
from decompft.launcher.node_report import NodeReport, read
from decompft.launcher.planner import make
from decompft.launcher.runs import RunDir
from decompft.launcher.source import parse
from decompft.launcher.worker.tools import node_check

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 90.0  # of a check, on a machine that does other things too

AHEAD = "import time\n_time = time.time\ntime.time = lambda: _time() + 100.0\n"
# its network is slow in whatever pair it is
SLOW = """
import time
import torch.distributed as dist
_reduce = dist.all_reduce
def slowly(tensor, *args, **more):
    time.sleep(tensor.numel() / 1e6)  # 4 MB/s
    return _reduce(tensor, *args, **more)
dist.all_reduce = slowly
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A planned run with one incarnation."""
    text = json.dumps(tiny.recipe_data(tmp_path))
    plan = make(parse(text, where="test", base_dir=tmp_path), machine=tiny.CPU)
    run = RunDir.create(tmp_path / "run", recipe_text=text, plan=plan)
    run.next_incarnation()
    return run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of another kind."""
    place = tmp_path / "disk"
    place.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(argv, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def argv(run: Path, number: int, num_nodes: int, port: int, *more: str) -> list[str]:
    return [
        *(str(run), "--incarnation", "1", "--nodes", str(num_nodes), "--node-id", str(number - 1)),
        *("--address", "127.0.0.1", "--port", str(port), "--timeout", str(TIMEOUT_S), *more),
    ]


class Node:
    """A node that is a program of its own."""

    def __init__(self, words: list[str], number: int, path: list[Path]) -> None:
        env = os.environ | {"SLURMD_NODENAME": f"n-{number}", "OMP_NUM_THREADS": "1"}
        env |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": ":".join(map(str, path))}
        module = "decompft.launcher.worker.tools.node_check"
        self._child = subprocess.Popen(
            [sys.executable, "-m", module, *words], env=env, stderr=subprocess.PIPE, text=True
        )

    def end(self) -> tuple[int, str]:
        """The exit code and what it said."""
        said = self._child.communicate(timeout=TIMEOUT_S + 30)[1]
        return self._child.returncode, said


def fork(words: list[str], number: int, patch: Callable[[], None] | None = None) -> mp.context.ForkProcess:
    """A node that has torch already."""
    child = mp.get_context("fork").Process(target=_forked, args=(words, number, patch))
    child.start()
    return child


def _forked(words: list[str], number: int, patch: Callable[[], None] | None) -> None:
    torch.set_num_threads(1)  # first: a forked process hangs in the parent's OpenMP pool
    os.environ["SLURMD_NODENAME"] = f"n-{number}"
    if patch is not None:
        patch()
    node_check.main(words)
    os._exit(0)


def check(run: RunDir, num_nodes: int, **patches: Callable[[], None]) -> NodeReport:
    """Check with forked nodes; `n2=...` is called in node 2 first."""
    port = free_port()
    nodes = [
        fork(argv(run.path, number, num_nodes, port), number, patches.get(f"n{number}"))
        for number in range(1, num_nodes + 1)
    ]
    for node in nodes:
        node.join(TIMEOUT_S + 30)
        assert node.exitcode == 0
    return report(run, num_nodes)


def report(run: RunDir, num_nodes: int) -> NodeReport:
    return read(nodes_dir(run.incarnation_dir(1)), [f"n-{number}" for number in range(1, num_nodes + 1)])


def customize(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(text)
    return folder


def two_installations(folder: Path) -> tuple[Path, Path]:
    """Copies of decompft, one with a comment more; nobody edits them while the test runs."""
    for part in ("adapters", "launcher", "recipes", "slurm"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, folder / "one/decompft" / part, ignore=ignored)
    shutil.copytree(folder / "one", folder / "other")
    with (folder / "other/decompft/launcher/errors.py").open("a") as file:
        file.write("# other\n")
    return folder / "one", folder / "other"


def test_good_nodes_pass_and_leave_nothing_but_their_words(run: RunDir) -> None:
    found = check(run, 3)
    assert (found.bad, found.user_error) == ([], None)
    assert sorted(p.name for p in nodes_dir(run.incarnation_dir(1)).iterdir()) == [
        "n-1.json", "n-2.json", "n-3.json"
    ]  # fmt: skip
    for file in found.files:
        assert file.phase == "done" and file.sees_head and file.memory_free_bytes
        assert len(file.links) == 2 and all(link.mb_per_s > 20 for link in file.links)
        assert abs(file.clock_ahead_s or 0.0) < 1.0
    assert found.files[0].run_dir_free_bytes


def test_a_job_of_one_node_checks_itself(run: RunDir) -> None:
    found = check(run, 1)
    assert found.bad == [] and found.files[0].phase == "done" and found.files[0].reached_head is None


def test_a_wrong_clock_other_code_and_a_slow_network_are_named(run: RunDir, tmp_path: Path) -> None:
    port = free_port()
    one, other = two_installations(tmp_path)
    paths = {
        2: [customize(tmp_path / "ahead", AHEAD), one],
        3: [other],
        4: [customize(tmp_path / "slow", SLOW), one],
    }

    def use_the_copy() -> None:
        for part in ("adapters", "launcher", "recipes", "slurm"):
            importlib.import_module(f"decompft.{part}").__path__ = [str(one / "decompft" / part)]

    head = fork(argv(run.path, 1, 4, port), 1, use_the_copy)
    nodes = [Node(argv(run.path, n, 4, port), n, path) for n, path in paths.items()]
    said = [node.end() for node in nodes]
    head.join(TIMEOUT_S)
    assert [code for code, _ in said] == [0, 0, 0] and head.exitcode == 0, said
    found = report(run, 4)
    assert found.user_error is None
    whys = dict(found.bad)
    assert list(whys) == ["n-2", "n-3", "n-4"]
    assert "clock is 100.0 s ahead" in whys["n-2"]
    assert "decompft's code" in whys["n-3"]
    assert "an all-reduce with 3 other node(s) runs at" in whys["n-4"]


def test_a_missing_node_another_disk_and_a_full_scratch_are_named(run: RunDir, disk: Path) -> None:
    """n-4 never starts; n-3 has something else where the run folder should be; n-2's scratch is full."""
    mine = disk / "run"
    (mine / "incarnations/1").mkdir(parents=True)
    shutil.copy(run.plan_path, mine)
    scratch = disk / "scratch"
    scratch.mkdir()
    (disk / "big").write_bytes(bytes(1_500_000))
    port = free_port()
    short = ("--timeout", "45")
    nodes = [
        fork([*argv(run.path, 1, 4, port), *short], 1),
        fork(
            [*argv(run.path, 2, 4, port), *short],
            2,
            lambda: os.environ.__setitem__("DECOMPFT_SCRATCH", str(scratch)),
        ),
        fork([*argv(mine, 3, 4, port), *short], 3),
    ]
    for node in nodes:
        node.join(TIMEOUT_S)
        assert node.exitcode == 0
    found = report(run, 4)
    assert found.user_error is None
    whys = dict(found.bad)
    assert list(whys) == ["n-2", "n-3", "n-4"]
    assert f"{scratch}: scratch cannot be written: No space left on device" in whys["n-2"]
    assert "the run folder there (tmpfs tmpfs) is not the one that n-1 has" in whys["n-3"]
    assert "left no word" in whys["n-4"]
    # the others are timed without it
    assert all(len(file.links) == 2 for file in found.files)


def test_a_folder_of_each_node_s_own_is_the_user_s_error(run: RunDir, tmp_path: Path) -> None:
    """The second node has a folder of the same name, on its own disk, where nothing is."""
    port = free_port()
    nodes = [
        fork(argv(run.path, 1, 2, port), 1),
        fork(argv(tmp_path / "elsewhere", 2, 2, port), 2),
    ]
    for node in nodes:
        node.join(TIMEOUT_S)
    found = report(run, 2)
    assert found.user_error is not None
    assert "what n-1 writes there is not on n-2" in found.user_error.message
    assert not (tmp_path / "elsewhere").exists()  # nothing is left on the wrong disk


def test_a_folder_that_one_node_cannot_write_is_heard_of_through_the_head(run: RunDir) -> None:
    folder = nodes_dir(run.incarnation_dir(1))

    def forbid() -> None:
        write = Path.write_bytes

        def refuse(self: Path, data: bytes) -> int:
            if self.is_relative_to(folder):
                raise PermissionError(13, "Permission denied")
            return write(self, data)

        Path.write_bytes = refuse  # type: ignore[method-assign, assignment]

    ((node, why),) = check(run, 2, n2=forbid).bad
    assert node == "n-2" and f"{folder}: cannot be written: Permission denied" in why


def test_a_slow_pair_of_good_nodes_is_a_warning(run: RunDir) -> None:
    def slow_with_n3() -> None:
        reduce, prefix = dist.all_reduce, dist.PrefixStore  # type: ignore[attr-defined]
        keys: list[str] = []

        def named(key: str, store: Any) -> Any:
            keys.append(key)
            return prefix(key, store)

        def slowly(tensor: torch.Tensor, *args: Any, **more: Any) -> Any:
            if keys[-1].endswith("/1-2"):
                time.sleep(tensor.numel() / 1e6)
            return reduce(tensor, *args, **more)

        dist.PrefixStore, dist.all_reduce = named, slowly  # type: ignore[attr-defined]

    found = check(run, 3, n2=slow_with_n3)
    assert found.bad == []
    (warning,) = found.warnings
    assert warning.startswith("an all-reduce between n-2 and n-3 runs at")


def test_a_node_that_dies_while_it_reduces_spoils_no_other_pair(run: RunDir) -> None:
    def die() -> None:
        dist.all_reduce = lambda *args, **more: os._exit(9)

    port = free_port()
    nodes = [fork(argv(run.path, n, 4, port), n, die if n == 2 else None) for n in (1, 2, 3, 4)]
    for node in nodes:
        node.join(TIMEOUT_S)
    assert [node.exitcode for node in nodes] == [0, 9, 0, 0]
    found = report(run, 4)
    assert [name for name, _ in found.bad] == ["n-2"] and found.warnings == []
    for file in (found.files[n] for n in (0, 2, 3)):
        assert sum(link.mb_per_s > 20 for link in file.links) == 2


def test_a_check_that_hangs_ends_in_time_and_says_where(run: RunDir) -> None:
    def hang() -> None:
        torch.randint = lambda *args, **more: time.sleep(600)  # type: ignore[assignment]

    begin = time.monotonic()
    node = fork([*argv(run.path, 1, 1, free_port()), "--timeout", "4"], 1, hang)
    node.join(60)
    assert node.exitcode == 3 and time.monotonic() - begin < 30
    ((name, why),) = report(run, 1).bad
    assert name == "n-1" and "it was computing" in why


def test_a_head_that_never_comes_is_the_node_to_name(run: RunDir) -> None:
    """The second node waits half of its time, and goes home."""
    node = fork([*argv(run.path, 2, 2, free_port()), "--timeout", "10"], 2)
    node.join(60)
    assert node.exitcode == 0
    assert [name for name, _ in report(run, 2).bad] == ["n-1"]


def test_a_node_that_dies_in_the_middle_does_not_stop_the_others(run: RunDir) -> None:
    def die() -> None:
        torch.randint = lambda *args, **more: os._exit(9)  # type: ignore[assignment]

    port = free_port()
    nodes = [fork(argv(run.path, n, 3, port), n, die if n == 3 else None) for n in (1, 2, 3)]
    for node in nodes:
        node.join(TIMEOUT_S)
    assert [node.exitcode for node in nodes] == [0, 0, 9]
    found = report(run, 3)
    assert [name for name, _ in found.bad] == ["n-3"] and "it was computing" in found.bad[0][1]
    assert [len(file.links) for file in found.files] == [1, 1, 0]


def test_a_disk_that_takes_no_checkpoint_is_the_user_s_error(disk: Path, tmp_path: Path) -> None:
    text = json.dumps(tiny.recipe_data(tmp_path))
    plan = make(parse(text, where="test", base_dir=tmp_path), machine=tiny.CPU)
    run = RunDir.create(
        disk / "run", recipe_text=text, plan=plan.model_copy(update={"checkpoint_bytes": 2**30})
    )
    run.next_incarnation()
    error = check(run, 1).user_error
    assert error is not None and "a checkpoint takes 1.00 GiB" in error.message


def test_gpus_that_are_sick_or_missing_are_named(run: RunDir, tmp_path: Path) -> None:
    from test_node_gpus import GOOD, STATE, A, answer

    sick = GOOD | {STATE: f"0, {A}, NVIDIA H200, 4, 7\n"}
    with pytest.MonkeyPatch.context() as patch:
        answer(tmp_path, patch, sick)
        fork([*argv(run.path, 1, 1, free_port()), "--device", "cuda", "--gpus", "2"], 1).join(60)
    ((_, why),) = report(run, 1).bad
    assert "7 uncorrected ECC error(s)" in why and "1 of the 2 GPUs asked for are visible" in why
    assert "torch cannot use the GPUs" in why  # which there are none of here


def test_a_file_survives_being_written_and_read(run: RunDir) -> None:
    file = check(run, 2).files[1]
    assert NodeFile.from_json(file.to_json()) == file
