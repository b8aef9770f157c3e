"""What the nodes say before training becomes a verdict: which node is bad, why, and when it is no node's fault."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from decompft.launcher.node_file import Link, NodeFile, Problem
from decompft.launcher.node_report import NodeReport, read
from decompft.launcher.worker.node_links import rounds

SAME = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.17.0", "code": "a" * 64}


def good(number: int) -> NodeFile:
    """A node that has nothing to complain about; node 1 is the head."""
    return NodeFile(
        node=f"n-{number}", node_id=number - 1, phase="done", took_s=1.0, device="cpu", versions=SAME,
        file_system="nfs4 server:/home", reached_head=True, sees_head=True, clock_ahead_s=0.001 * number,
    )  # fmt: skip


def verdict(folder: Path, files: list[NodeFile], num_expected: int | None = None) -> NodeReport:
    for file in files:
        file.write(folder)
    expected = [f"n-{number}" for number in range(1, (num_expected or len(files)) + 1)]
    return read(folder, expected)


def broken(file: NodeFile, kind: str, text: str = "is broken", severity: str = "bad") -> NodeFile:
    problem = Problem(kind=kind, severity=severity, text=text, hint="mend it")  # type: ignore[arg-type]
    return replace(file, problems=(*file.problems, problem))


def linked(
    files: list[NodeFile], speeds: dict[tuple[int, int], float], usual: float = 1000.0
) -> list[NodeFile]:
    """The same nodes, each pair timed; speeds in MB/s by pair of numbers, 0 for one that failed."""
    links: dict[int, list[Link]] = {number: [] for number in range(1, len(files) + 1)}
    for a, b in itertools.combinations(links, 2):
        speed = speeds.get((a, b), usual)
        error = "" if speed else "connection refused"
        links[a].append(Link(peer=f"n-{b}", mb_per_s=speed, error=error))
        links[b].append(Link(peer=f"n-{a}", mb_per_s=speed, error=error))
    return [replace(file, links=tuple(links[number])) for number, file in enumerate(files, start=1)]


def test_good_nodes_give_no_verdict(tmp_path: Path) -> None:
    report = verdict(tmp_path, linked([good(n) for n in range(1, 5)], {}))
    assert (report.bad, report.user_error, report.warnings) == ([], None, [])
    assert [line.split(" (")[0] for line in report.lines()] == ["n-1: ok", "n-2: ok", "n-3: ok", "n-4: ok"]


def test_a_node_without_a_word_is_bad(tmp_path: Path) -> None:
    report = verdict(tmp_path, [good(1), good(2)], num_expected=3)
    assert [node for node, _ in report.bad] == ["n-3"]
    assert "left no word" in report.bad[0][1]


def test_no_word_at_all_is_no_node_s_fault(tmp_path: Path) -> None:
    report = verdict(tmp_path, [], num_expected=2)
    assert report.bad == []
    assert report.user_error is not None and "no node left a word" in report.user_error.message


def test_a_damaged_file_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "n-2.json").write_text('{"node": "n-2", "links"')
    assert [node for node, _ in verdict(tmp_path, [good(1)], num_expected=2).bad] == ["n-2"]


def test_two_reasons_for_one_node_are_both_told(tmp_path: Path) -> None:
    file = broken(broken(good(2), "gpu", "ECC"), "scratch", "full")
    assert verdict(tmp_path, [good(1), file, good(3)]).bad == [("n-2", "ECC; full")]


@pytest.mark.parametrize("kind", ["scratch", "gpu count", "run folder", "memory"])
def test_what_all_nodes_have_is_the_input_s(kind: str, tmp_path: Path) -> None:
    report = verdict(tmp_path, [broken(good(number), kind, f"text {number}") for number in (1, 2, 3)])
    assert report.bad == []
    assert report.user_error is not None and report.user_error.message == "all 3 nodes: text 1"
    assert report.user_error.hint == "mend it"


def test_a_job_of_one_node_blames_the_node_for_its_gpu_and_the_input_for_its_folder(tmp_path: Path) -> None:
    assert verdict(tmp_path, [broken(good(1), "gpu count")]).bad == [("n-1", "is broken")]
    report = verdict(tmp_path, [broken(good(1), "run folder")])
    assert report.bad == [] and report.user_error is not None


@pytest.mark.parametrize("key, name", [("python", "python"), ("torch", "torch"), ("code", "decompft's code")])
def test_other_versions_are_the_minority_s(key: str, name: str, tmp_path: Path) -> None:
    other = replace(good(2), versions=SAME | {key: "b" * 64})
    ((node, why),) = verdict(tmp_path, [good(1), other, good(3)]).bad
    assert node == "n-2" and f"has {name} bbbbbbbbbbbb," in why


def test_versions_without_a_majority_are_the_input_s(tmp_path: Path) -> None:
    report = verdict(tmp_path, [good(1), replace(good(2), versions=SAME | {"torch": "2.11.0"})])
    assert report.bad == []
    assert report.user_error is not None and "n-1 2.13.0, n-2 2.11.0" in report.user_error.message


def test_a_clock_is_judged_against_the_others(tmp_path: Path) -> None:
    off = [replace(good(n), clock_ahead_s=ahead) for n, ahead in ((1, 0.0), (2, -100.0), (3, -99.9))]
    report = verdict(tmp_path, off)  # the head is the odd one
    assert [node for node, _ in report.bad] == ["n-1"]
    assert "100.0 s ahead of that of the other nodes" in report.bad[0][1] or "99.9" in report.bad[0][1]


def test_a_small_skew_warns_and_an_uncertain_one_does_not(tmp_path: Path) -> None:
    files = [good(1), replace(good(2), clock_ahead_s=-5.0), good(3)]
    files.append(replace(good(4), clock_ahead_s=5.0, clock_error_s=4.0))
    report = verdict(tmp_path, files)
    assert report.bad == []
    assert report.warnings == ["n-2: its clock is 5.0 s behind that of the other nodes"]


def test_a_folder_that_nobody_else_sees_is_the_input_s(tmp_path: Path) -> None:
    blind = [replace(good(n), sees_head=False) for n in (2, 3)]
    report = verdict(tmp_path, [good(1), *blind])
    assert report.bad == []
    assert report.user_error is not None and "is not the same on all nodes" in report.user_error.message
    assert "n-2, n-3" in report.user_error.message and "--run-dir" in report.user_error.hint


@pytest.mark.parametrize("num_nodes", [2, 3])
def test_a_mount_that_one_node_lacks_is_that_node_s(num_nodes: int, tmp_path: Path) -> None:
    blind = replace(good(2), sees_head=False, file_system="ext4 /dev/sda1")
    report = verdict(tmp_path, [good(1), blind, *(good(n) for n in range(3, num_nodes + 1))])
    ((node, why),) = report.bad
    assert node == "n-2" and "ext4 /dev/sda1" in why and "nfs4 server:/home" in why
    assert report.user_error is None


@pytest.mark.parametrize("num_nodes", [3, 4, 5, 6])
def test_a_slow_node_is_named_and_its_partners_are_not(num_nodes: int, tmp_path: Path) -> None:
    speeds = {tuple(sorted((2, n))): 90.0 for n in range(1, num_nodes + 1) if n != 2}
    report = verdict(tmp_path, linked([good(n) for n in range(1, num_nodes + 1)], speeds))  # type: ignore[arg-type]
    ((node, why),) = report.bad
    assert node == "n-2" and "90 MB/s at best, others at 1000" in why


def test_a_slow_pair_of_good_nodes_warns(tmp_path: Path) -> None:
    report = verdict(tmp_path, linked([good(n) for n in range(1, 5)], {(2, 3): 40.0}))
    assert report.bad == []
    assert report.warnings == [
        "an all-reduce between n-2 and n-3 runs at 40 MB/s; with others they are faster"
    ]


def test_a_fifth_of_the_others_is_the_limit_and_a_fast_link_is_never_slow(tmp_path: Path) -> None:
    files = [good(n) for n in range(1, 5)]
    speeds = {(1, 4): 199.0, (2, 4): 199.0, (3, 4): 199.0}
    assert [node for node, _ in verdict(tmp_path, linked(files, speeds)).bad] == ["n-4"]
    assert verdict(tmp_path, linked(files, dict.fromkeys(speeds, 201.0))).bad == []
    # beside 5,000 MB/s a fifth would be 1,000, but a link of 201 MB/s on CPUs is no slow one
    assert verdict(tmp_path, linked(files, dict.fromkeys(speeds, 201.0), usual=5000.0)).bad == []


def test_two_slow_nodes_of_two_cannot_be_told_apart(tmp_path: Path) -> None:
    report = verdict(tmp_path, linked([good(1), good(2)], {(1, 2): 5.0}))
    assert report.bad == [] and report.user_error is None
    assert report.warnings == ["the network between the nodes is slow: 5 MB/s at best"]


def test_a_node_that_nobody_can_reduce_with_is_bad(tmp_path: Path) -> None:
    files = linked([good(n) for n in range(1, 5)], {(1, 3): 0.0, (2, 3): 0.0, (3, 4): 0.0})
    ((node, why),) = verdict(tmp_path, files).bad
    assert node == "n-3" and "failed each time: connection refused" in why


def test_when_nobody_can_reduce_the_interface_is_to_blame(tmp_path: Path) -> None:
    report = verdict(tmp_path, linked([good(1), good(2)], {(1, 2): 0.0}))
    assert report.bad == [] and report.user_error is not None
    assert "connection refused" in report.user_error.message and "interface" in report.user_error.hint


def test_a_node_that_cannot_reach_the_head_is_bad(tmp_path: Path) -> None:
    report = verdict(tmp_path, [good(1), replace(good(2), reached_head=False, sees_head=None), good(3)])
    assert report.bad == [("n-2", "cannot reach n-1 over the network")]


def test_a_check_that_did_not_end_says_where_it_was(tmp_path: Path) -> None:
    ((node, why),) = verdict(tmp_path, [good(1), replace(good(2), phase="computing"), good(3)]).bad
    assert node == "n-2" and "it was computing" in why


def test_torch_that_loads_slowly_everywhere_excludes_nobody(tmp_path: Path) -> None:
    report = verdict(tmp_path, [replace(good(n), phase="loading torch") for n in (1, 2)])
    assert report.bad == [] and report.user_error is None and len(report.warnings) == 2


def test_a_node_of_another_job_is_not_counted(tmp_path: Path) -> None:
    broken(good(9), "gpu").write(tmp_path)
    assert verdict(tmp_path, [good(1), good(2)]).bad == []


def test_the_report_is_a_table_on_a_terminal_and_lines_elsewhere(tmp_path: Path) -> None:
    report = verdict(tmp_path, [good(1), broken(good(2), "gpu", "ECC [x]"), good(3)])
    plain, screen = io.StringIO(), io.StringIO()
    report.show(Console(file=plain))
    report.show(Console(file=screen, force_terminal=True, width=100))
    assert plain.getvalue().splitlines() == report.lines()
    assert "  bad: ECC [x]" in report.lines()
    assert "\u2501" in screen.getvalue() and "ECC [x]" in screen.getvalue()


@pytest.mark.parametrize("num_nodes", range(1, 12))
def test_nobody_has_two_partners_in_a_round_or_one_partner_twice(num_nodes: int) -> None:
    played = rounds(range(num_nodes))
    pairs = [pair for pairs in played for pair in pairs]
    assert len(set(pairs)) == len(pairs) and all(a < b for a, b in pairs)
    for turn in played:
        nodes = [node for pair in turn for node in pair]
        assert len(set(nodes)) == len(nodes) >= num_nodes - num_nodes % 2
    assert len(played) == min(3, num_nodes - 1 + num_nodes % 2 if num_nodes > 1 else 0)
    if 1 < num_nodes <= 4:
        assert len(pairs) == num_nodes * (num_nodes - 1) // 2
