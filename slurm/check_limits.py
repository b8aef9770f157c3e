"""Does a profile fit what the controller says of its partition? Pure functions, one check each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from decompft.slurm.cluster import Cluster, Node, Partition, mebibytes
from decompft.slurm.profile import Profile
from decompft.slurm.times import clock, seconds

State = Literal["ok", "not checked", "wrong"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the table."""

    name: str
    state: State
    text: str
    fix: str = ""


def check_partition(
    cluster: Cluster, name: str | None, nodes: Sequence[Node], groups: Iterable[str]
) -> Finding:
    """Is it there, up, open to this user's groups, and has it nodes?"""
    found = cluster.partition(name)
    known = ", ".join(p.name for p in cluster.partitions)
    if found is None and name is None:
        return _wrong("partition", "no default partition here", f"name one of {known}")
    if found is None:
        return _wrong(
            "partition",
            f"there is no partition {name}",
            _near(name or "", (p.name for p in cluster.partitions)),
        )
    if found.state != "UP":
        return _wrong("partition", f"{found.name} is {found.state}", f"another one, or wait; known: {known}")
    allowed = found.allowed["groups"]
    if allowed is not None and not set(allowed) & set(groups):
        return _wrong(
            "partition", f"{found.name} is for the groups {', '.join(allowed)}", f"another of {known}"
        )
    up = sum(node.is_up for node in nodes)
    which = "" if name else ", the site's default"
    text = f"{found.name}{which}: {up} of {len(nodes)} nodes up"
    return (
        _ok("partition", text) if up else _wrong("partition", text, "ask the site, or take another partition")
    )


def check_time(partition: Partition, limit: str | None) -> Finding:
    most = partition.max_time_s
    if limit is None:
        # both NONE: the partition's longest
        text = f"not set: {partition.default_time} unless the recipe says slurm.time"
        return _ok("time", text)
    asked = seconds(limit) or 0
    if most is not None and asked > most:
        return _wrong(
            "time", f"{limit} is more than {partition.name} allows, {clock(most)}", f'time: "{clock(most)}"'
        )
    return _ok("time", f"{limit} of at most {'any time' if most is None else clock(most)}")


def check_gpus(cluster: Cluster, profile: Profile, nodes: Sequence[Node]) -> Finding:
    kinds = sorted({kind for node in nodes for name, kind, _ in node.gres if name == "gpu"})
    if not kinds:
        if profile.gpu_type:
            return _wrong(
                "GPUs", f"no node of the partition has any, nor {profile.gpu_type}", "another partition"
            )
        return _ok("GPUs", "no node of the partition has any: runs use its CPUs")
    offered = ", ".join(kind for kind in kinds if kind)
    if profile.gpu_type and profile.gpu_type not in kinds:
        fix = (
            f"{_near(profile.gpu_type, kinds)}" if offered else "leave gpu_type out: GPUs have no types here"
        )
        return _wrong("GPUs", f"no node of the partition has {profile.gpu_type}", fix)
    if profile.gpu_request == "gpus-per-node" and "cons_tres" not in cluster.config.get(
        "SelectType", "cons_tres"
    ):
        text = f"{cluster.config['SelectType']} does not know --gpus-per-node"
        return _wrong("GPUs", text, "gpu_request: gres")
    having = [node.gpus(profile.gpu_type) for node in nodes if node.gpus(profile.gpu_type)]
    few, many = min(having), max(having)
    number = str(few) if few == many else f"{few} to {many}"
    return _ok(
        "GPUs", f"{number} on each of {len(having)} nodes ({profile.gpu_type or offered or 'no types'})"
    )


def check_gres(profile: Profile, nodes: Sequence[Node]) -> Finding:
    """The resources other than GPUs."""
    offered = {name for node in nodes for name, _, _ in node.gres}
    for entry in profile.gres:
        name = entry.split(":")[0]
        if name not in offered:
            return _wrong("gres", f"no node of the partition has {name}", _near(name, offered))
    return _ok("gres", ", ".join(profile.gres))


def check_size(
    partition: Partition, nodes: Sequence[Node], *, cpus: int | None, mem: str | None, name: str = "node"
) -> Finding:
    """Cores and memory against the partition's nodes and limits."""
    most_cpus = min([max(node.cpus for node in nodes), *_known(partition.max_cpus)])
    most_mib = min([max(node.mem_mib for node in nodes), *_known(partition.max_mem_mib)])
    wanted_mib = mebibytes(mem) if mem else 0
    if cpus and cpus > most_cpus:
        return _wrong(name, f"{cpus} cores, a node gives {most_cpus} at most", f"ask for {most_cpus} cores")
    if wanted_mib > most_mib:
        fix = f'mem: "{most_mib // 1024}G", or "0" for all of it'
        return _wrong(name, f"memory {mem}, a node gives {most_mib} MiB at most", fix)
    fitting = sum(node.cpus >= (cpus or 0) and node.mem_mib >= wanted_mib for node in nodes)
    if not fitting:
        return _wrong(name, f"no node has both {cpus} cores and {mem}", "ask for less of one")
    text = f"{fitting} of {len(nodes)} nodes have {cpus or 'any number of'} cores and {mem or 'any'} memory"
    advice = "" if cpus else f"a task gets one core on many sites: ask for some, e.g. {most_cpus}"
    return Finding(name=name, state="ok", text=text, fix=advice)


def check_constraint(profile: Profile, nodes: Sequence[Node]) -> Finding:
    offered = {feature for node in nodes for feature in node.features}
    # a&b, a|b, [a*2&b*4], (a|b): the features in it
    asked = [w.split("*")[0] for w in re.split(r"[&|,()\[\]!]", profile.constraint or "")]
    for feature in asked:
        if feature and feature not in offered:
            text = f"no node of the partition has the feature {feature}"
            return _wrong("constraint", text, _near(feature, offered))
    return _ok("constraint", f"{profile.constraint}: all known here")


def check_preemption(cluster: Cluster, profile: Profile, mode: str, grace_s: int) -> Finding:
    """How long a preempted job has. `mode` and `grace_s` are the partition's or the qos's."""
    wait = cluster.number("KillWait", 30)
    if mode in ("OFF", "") or not re.search("partition_prio|qos", cluster.config.get("PreemptType", "")):
        return _ok("preemption", f"none in this partition; after scancel a job has {wait} s (KillWait)")
    if "SUSPEND" in mode:
        return _ok("preemption", f"{mode}: a preempted job is halted, and goes on later by itself")
    given = grace_s + wait
    if profile.grace_s is None:
        return _wrong(
            "preemption",
            f"the kill comes {given} s after the notice (GraceTime + KillWait), and the profile does not say so",
            f"grace_s: {given}",
        )
    if profile.grace_s > given:
        return _wrong(
            "preemption",
            f"grace_s {profile.grace_s}, but the kill comes {given} s after the notice (GraceTime + KillWait)",
            f"grace_s: {given}, and the recipe's checkpoint.grace_s below it",
        )
    told = "preempt_send_user_signal" in cluster.config.get("SlurmctldParameters", "")
    notice = f"{profile.signal} to the script" if told else "TERM to the ranks"
    after = "then gone, unless it left in time" if mode == "CANCEL" else "then requeued"
    return _ok(
        "preemption", f"{mode}: {notice}, {given} s to the kill, {after}; grace_s {profile.grace_s} fits"
    )


def check_requeue(cluster: Cluster, profile: Profile) -> Finding:
    if profile.requeue == "never":
        return _ok("requeue", "never: a run that stops waits for you")
    if profile.requeue == "successor":
        return _ok("requeue", "by a new job that waits for the old one")
    found = re.search(r"cred_expire=(\d+)", cluster.config.get("AuthInfo", ""))
    wait = int(found[1]) + 1 if found else 121
    off = (
        ""
        if cluster.number("JobRequeue", 1)
        else "off by default here (JobRequeue=0), the script asks for it; "
    )
    return _ok("requeue", f"{off}a requeued job waits at least {wait} s")


def check_allowed(partition: Partition, what: Literal["accounts", "qos"], name: str) -> Finding | None:
    """Against the partition's own lists; None: they say nothing against it."""
    allowed, denied = partition.allowed[what], partition.denied[what]
    row = "account" if what == "accounts" else "qos"
    if allowed is not None and name not in allowed:
        return _wrong(row, f"{partition.name} does not take {name}", f"it takes {', '.join(allowed)}")
    if name in denied:
        return _wrong(row, f"{partition.name} refuses {name}", "take another one, or another partition")
    return None


def _ok(name: str, text: str) -> Finding:
    return Finding(name=name, state="ok", text=text)


def _wrong(name: str, text: str, fix: str) -> Finding:
    return Finding(name=name, state="wrong", text=text, fix=fix)


def _near(word: str, known: Iterable[str]) -> str:
    names = sorted(name for name in known if name)
    near = difflib.get_close_matches(word, names, n=1)
    there = f"known: {', '.join(names)}" if names else "there is nothing of the kind: leave it out"
    return f"did you mean {near[0]}? {there}" if near else there


def _known(limit: int | None) -> list[int]:
    return [] if limit is None else [limit]
