"""Which node is the bad one, and is it a node at all? What only a comparison of the nodes' files shows.

The rule throughout: what one node has and the others do not is that node's; what all of them have is the input's.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from decompft.launcher.node_file import PHASE_DONE, PHASE_TORCH, NodeFile, Problem, Severity

CLOCK_BAD_S, CLOCK_WARN_S = 30.0, 2.0
SLOW_FRACTION = 0.2  # of the median node's best link
# below the first a link is slow whatever the others are; above the second it never is; 10**6 bytes a second
SLOW_MB_PER_S = 20.0
FAST_MB_PER_S = {"cpu": 200.0, "cuda": 5000.0}
LATE = "late"  # a kind of problem: it may be a slow start, not a bad node
# seen on every node, these are no node's fault
_COMMON = ("run folder", "gpu count", "gpu memory", "gpu", "scratch", "memory", "torch", "check")


Pair = tuple[str, str]  # of node names, sorted


@dataclass(frozen=True, kw_only=True)
class Said:
    """A problem and the node it is about; "" for the whole job."""

    node: str
    problem: Problem


def compare(files: Sequence[NodeFile], expected: Sequence[str]) -> list[Said]:
    """All problems of the job, the nodes' own and those that only comparing them shows."""
    if not files:
        text = "no node left a word: the check did not start on any of them"
        return [_user("check", text, "the log of the step says why; is the run folder on a shared disk?")]
    own = [Said(node=file.node, problem=problem) for file in files for problem in file.problems]
    found = list(_common(own, files))
    for rule in (_missing, _unshared, _unreached, _unfinished, _versions, _clocks, _links):
        found += rule(files, expected)
    return found


def speed_limit(speeds: Mapping[Pair, float], device: str) -> float:
    """MB/s below which a link is slow, or a node whose best link is."""
    best = _best(speeds).values()
    limit = SLOW_FRACTION * statistics.median_high(best) if best else 0.0
    return max(SLOW_MB_PER_S, min(limit, FAST_MB_PER_S[device]))


def _common(own: list[Said], files: Sequence[NodeFile]) -> Iterator[Said]:
    """The nodes' own problems; a kind that all nodes have becomes one of the input."""
    nodes = {
        kind: {said.node for said in own if (said.problem.kind, said.problem.severity) == (kind, "bad")}
        for kind in _COMMON
    }
    alone = ("run folder", "torch")  # of these a job of one node blames the input, of the others the node
    told = set()
    for said in own:
        kind = said.problem.kind
        is_all = kind in _COMMON and len(nodes[kind]) == len(files) and (len(files) > 1 or kind in alone)
        if said.problem.severity != "bad" or not is_all:
            yield said
        elif kind not in told:
            told.add(kind)
            where = f"all {len(files)} nodes" if len(files) > 1 else said.node
            yield _user(kind, f"{where}: {said.problem.text}", said.problem.hint)


def _missing(files: Sequence[NodeFile], expected: Sequence[str]) -> Iterator[Said]:
    there = {file.node for file in files}
    missing = [node for node in expected if node not in there]
    if len(missing) > 1 and len(there) == 1:
        text = f"only {next(iter(there))} left a word, the other {len(missing)} nodes did not"
        yield _user("check", text, "the log of the step says why; is the run folder on a shared disk?")
        return
    for node in missing:
        yield _bad(node, LATE, "left no word: it cannot be reached, or the check did not start there")


def _unshared(files: Sequence[NodeFile], expected: Sequence[str]) -> Iterator[Said]:
    head = _head(files)
    others = [file for file in files if file.sees_head is not None and file is not head]
    blind = [file for file in others if not file.sees_head]
    if not blind or head is None:
        return
    same_kind = all(file.file_system == head.file_system for file in blind)
    if len(blind) == len(others) and (same_kind or len(blind) > 1):
        names = ", ".join(file.node for file in blind[:4]) + (" ..." if len(blind) > 4 else "")
        text = f"the run folder is not the same on all nodes: what {head.node} writes there is not on {names}"
        hint = (
            "it lies on a disk of each node's own; choose a folder that all nodes share, with --run-dir DIR"
        )
        yield _user("run folder", f"{text} ({_place(head)})", hint)
        return
    for file in blind:
        text = f"the run folder there ({_place(file)}) is not the one that {head.node} has ({_place(head)})"
        yield _bad(
            file.node, "run folder", text, "see whether the shared file system is mounted on that node"
        )


def _unreached(files: Sequence[NodeFile], expected: Sequence[str]) -> Iterator[Said]:
    head = _head(files)
    others = [file for file in files if file.reached_head is not None and file is not head]
    lost = [file for file in others if not file.reached_head]
    if not lost or head is None:  # a head without a word is the one to name
        return
    if any((problem.kind, problem.severity) == ("head", "bad") for problem in head.problems):
        return
    if len(lost) == len(others) and len(lost) > 1:
        text = f"no node can reach {head.node} over the network"
        hint = "see the address it was given, name resolution, and the firewall between the nodes"
        yield _user("head", text, hint)
        return
    for file in lost:
        yield _bad(file.node, "head", f"cannot reach {head.node} over the network")


def _unfinished(files: Sequence[NodeFile], expected: Sequence[str]) -> Iterator[Said]:
    late = [file for file in files if file.phase != PHASE_DONE]
    is_all = len(late) == len(files)
    for file in late:
        text = f"the check did not end in time there; it was {file.phase}"
        if file.phase == PHASE_TORCH and is_all:  # a cold file system; training will wait for it, too
            yield Said(node=file.node, problem=Problem(kind="check", severity="warn", text=text))
        else:
            yield _bad(file.node, LATE, text)


def _versions(files: Sequence[NodeFile], expected: Sequence[str]) -> Iterator[Said]:
    keys = {key: "decompft's code" if key == "code" else key for key in files[0].versions}
    for key, name in keys.items():
        seen = Counter(file.versions.get(key, "unknown") for file in files)
        if len(seen) == 1:
            continue
        usual, count = seen.most_common(1)[0]
        hint = "use one environment on a shared disk, or bring the nodes' own to the same versions"
        if 2 * count <= len(files):
            there = ", ".join(
                f"{file.node} {_short(file.versions.get(key, 'unknown'))}" for file in files[:4]
            )
            yield _user("versions", f"the nodes have different versions of {name}: {there}", hint)
            continue
        for file in files:
            other = file.versions.get(key, "unknown")
            if other != usual:
                text = f"has {name} {_short(other)}, the other nodes have {_short(usual)}"
                yield _bad(file.node, "versions", text, hint)


def _clocks(files: Sequence[NodeFile], expected: Sequence[str]) -> Iterator[Said]:
    known = [file for file in files if file.clock_ahead_s is not None]
    if len(known) < 2:
        return
    ahead = [file.clock_ahead_s or 0.0 for file in known]
    head = _head(files)
    # of two clocks the head's counts as the right one
    right = 0.0 if len(known) == 2 else statistics.median_low(ahead)
    for file, offset in zip(known, ahead, strict=True):
        off = offset - right
        sure = abs(off) - file.clock_error_s
        if sure > CLOCK_WARN_S:
            whose = head.node if head is not None and len(known) == 2 else "the other nodes"
            text = f"its clock is {abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} that of {whose}"
            severity: Severity = "bad" if sure > CLOCK_BAD_S else "warn"
            hint = "see whether chrony or ntpd runs on that node"
            yield Said(node=file.node, problem=Problem(kind="clock", severity=severity, text=text, hint=hint))


def _links(files: Sequence[NodeFile], expected: Sequence[str]) -> Iterator[Said]:
    speeds = _speeds(files)
    if not speeds:
        return
    limit = speed_limit(speeds, files[0].device)
    # a slow node is slow, or fails, in every pair of its own
    slow = {node for node, speed in _best(speeds).items() if speed < limit}
    pairs = {pair for pair, speed in speeds.items() if speed < limit and not slow & set(pair)}
    failed = next((link.error for file in files for link in file.links if link.error), "")
    nodes = {node for pair in speeds for node in pair}
    hint = "name the interface that connects the nodes (network.interface in the profile)"
    if not any(speeds.values()):
        if len(nodes) == 2:
            yield _user("link", f"{' and '.join(sorted(nodes))} cannot reduce together: {failed}", hint)
        else:
            yield _user("link", f"no two nodes can reduce together: {failed}", hint)
        return
    if slow == nodes:  # nobody to compare with
        text = f"the network between the nodes is slow: {max(speeds.values()):.0f} MB/s at best"
        yield Said(node="", problem=Problem(kind="link", severity="warn", text=text, hint=hint))
        return
    for node in sorted(slow):
        best, number = max(s for p, s in speeds.items() if node in p), sum(node in p for p in speeds)
        usual = statistics.median_high(s for p, s in speeds.items() if not slow & set(p))
        text = f"an all-reduce with {number} other node(s) runs at {best:.0f} MB/s at best, others at {usual:.0f}"
        if best == 0.0:
            text = f"an all-reduce with {number} other node(s) failed each time: {failed}"
        yield _bad(node, "link", text)
    for a, b in sorted(pairs):
        text = (
            f"an all-reduce between {a} and {b} runs at {speeds[a, b]:.0f} MB/s; with others they are faster"
        )
        yield Said(node="", problem=Problem(kind="link", severity="warn", text=text))


def _best(speeds: Mapping[Pair, float]) -> dict[str, float]:
    """Each node's fastest link."""
    best: dict[str, float] = {}
    for pair, speed in speeds.items():
        for node in pair:
            best[node] = max(best.get(node, 0.0), speed)
    return best


def _speeds(files: Sequence[NodeFile]) -> dict[Pair, float]:
    """MB/s by pair of names, the better of the two sides' times."""
    speeds: dict[Pair, float] = {}
    for file in files:
        for link in file.links:
            pair = (min(file.node, link.peer), max(file.node, link.peer))
            speeds[pair] = max(speeds.get(pair, 0.0), link.mb_per_s)
    return speeds


def _head(files: Sequence[NodeFile]) -> NodeFile | None:
    return next((file for file in files if file.node_id == 0), None)


def _place(file: NodeFile) -> str:
    return file.file_system or "unknown file system"


def _short(value: str) -> str:
    return value[:12] if len(value) == 64 else value  # a digest


def _bad(node: str, kind: str, text: str, hint: str = "") -> Said:
    return Said(node=node, problem=Problem(kind=kind, severity="bad", text=text, hint=hint))


def _user(kind: str, text: str, hint: str) -> Said:
    return Said(node="", problem=Problem(kind=kind, severity="user", text=text, hint=hint))
