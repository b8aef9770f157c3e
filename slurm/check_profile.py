"""Does a profile fit the real cluster? Check by check: ok, not checked, or wrong and what to do. Submits nothing."""

from __future__ import annotations

import dataclasses
import getpass
import grp
import json
import os
from pathlib import Path

from decompft.launcher.errors import EXIT_DONE, EXIT_USER, SlurmError
from decompft.slurm import profile as profiles
from decompft.slurm.check_limits import (
    Finding,
    check_allowed,
    check_constraint,
    check_gpus,
    check_gres,
    check_partition,
    check_preemption,
    check_requeue,
    check_size,
    check_time,
)
from decompft.slurm.check_places import check_places
from decompft.slurm.cluster import Cluster, Node, Partition, read_cluster, read_nodes
from decompft.slurm.commands import call
from decompft.slurm.profile import Profile
from decompft.slurm.site_options import site_options
from decompft.slurm.times import seconds

_LAST = "sbatch --test-only"
_COLOURS = {"ok": "green", "not checked": "yellow", "wrong": "bold red"}


def doctor(name: str, *, as_json: bool) -> int:
    """Check a profile and print the table; "" is the profile that holds where none is named.

    Returns:
        0, or 2 where something is wrong.
    """
    cwd = Path.cwd()
    path = profiles.find(name, cwd=cwd) if name else None
    findings = check_profile(profiles.load(path) if path else profiles.default())
    is_fine = all(finding.state != "wrong" for finding in findings)
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"profile": str(path or ""), "ok": is_fine, "findings": rows}, indent=2))
    else:
        print(path or f"no profile, all defaults; known here: {', '.join(sorted(profiles.names(cwd)))}")
        _print(findings)
    return EXIT_DONE if is_fine else EXIT_USER


def check_profile(profile: Profile) -> list[Finding]:
    """Every check in order; one that fails hides no other."""
    found: list[Finding] = []
    try:
        _ask_slurm(profile, found)
    except SlurmError as error:
        # what was found before it stays, what needs no Slurm follows
        found.append(Finding(name="Slurm", state="wrong", text=error.message, fix=error.hint))
    at = len(found) - (found[-1].name == _LAST)
    return [*found[:at], *check_places(profile), *found[at:]]


def _ask_slurm(profile: Profile, found: list[Finding]) -> None:
    """Add what the cluster says, one by one; raises SlurmError where it stops answering."""
    cluster = read_cluster()
    name = cluster.config.get("ClusterName", "?")
    found.append(Finding(name="Slurm", state="ok", text=f"{cluster.version}, cluster {name}"))
    partition = cluster.partition(profile.partition)
    nodes = read_nodes(partition) if partition else ()
    found.append(check_partition(cluster, profile.partition, nodes, _groups()))
    if partition is None:
        text = "not without its partition"
        found.append(Finding(name="limits", state="not checked", text=text))
    else:
        found += _check_limits(cluster, profile, partition, nodes)
    if profile.reservation:
        found.append(_check_reservation(profile.reservation))
    found.append(check_requeue(cluster, profile))
    if profile.prepare:
        found.append(_check_prepare(cluster, profile))
    has_gpus = any(node.gpus(profile.gpu_type) for node in nodes)
    found.append(_try(profile, gpus_per_node=1 if has_gpus else 0))


def _check_limits(
    cluster: Cluster, profile: Profile, partition: Partition, nodes: tuple[Node, ...]
) -> list[Finding]:
    found = [check_time(partition, profile.time)]
    if profile.account:
        found.append(
            check_allowed(partition, "accounts", profile.account) or _account(cluster, profile.account)
        )
    if profile.qos:
        found.append(
            check_allowed(partition, "qos", profile.qos) or _qos(cluster, profile.account, profile.qos)
        )
    if nodes:
        found += [
            check_gpus(cluster, profile, nodes),
            *([check_gres(profile, nodes)] if profile.gres else []),
            check_size(partition, nodes, cpus=profile.cpus_per_node, mem=profile.mem),
            *([check_constraint(profile, nodes)] if profile.constraint else []),
        ]
    if cluster.config.get("PreemptType", "").endswith("qos"):
        return [*found, _check_qos_preemption(cluster, profile)]
    return [*found, check_preemption(cluster, profile, partition.preempt_mode, partition.grace_s)]


# -- accounting --


def _account(cluster: Cluster, account: str) -> Finding:
    if "associations" not in cluster.config.get("AccountingStorageEnforce", ""):
        return Finding(
            name="account", state="not checked", text=f"{account}: Slurm here enforces no accounts"
        )
    rows = _sacctmgr("show", "associations", f"user={getpass.getuser()}", "format=Account")
    if rows is None:
        return Finding(name="account", state="not checked", text=f"{account}: sacctmgr gives no answer here")
    own = sorted({row.split("|")[0] for row in rows})
    if account in own:
        return Finding(name="account", state="ok", text=account)
    text = f"you are not in {account}"
    return Finding(name="account", state="wrong", text=text, fix=f"yours: {', '.join(own) or 'none'}")


def _qos(cluster: Cluster, account: str | None, qos: str) -> Finding:
    if "qos" not in cluster.config.get("AccountingStorageEnforce", ""):
        return Finding(name="qos", state="not checked", text=f"{qos}: Slurm here enforces no qos")
    rows = _sacctmgr("show", "associations", f"user={getpass.getuser()}", "format=Account,QOS")
    if rows is None:
        return Finding(name="qos", state="not checked", text=f"{qos}: sacctmgr gives no answer here")
    pairs = [row.split("|") for row in rows]
    own = sorted(
        {name for of, names, *_ in pairs if account in (None, of) for name in names.split(",") if name}
    )
    if qos in own:
        return Finding(name="qos", state="ok", text=qos)
    who = f"you, in the account {account}," if account else "you"
    return Finding(
        name="qos", state="wrong", text=f"{who} may not use {qos}", fix=f"yours: {', '.join(own) or 'none'}"
    )


def _check_qos_preemption(cluster: Cluster, profile: Profile) -> Finding:
    rows = _sacctmgr("show", "qos", profile.qos or "normal", "format=Name,PreemptMode,GraceTime")
    if not rows:
        text = "it depends on the qos here, and sacctmgr does not tell of it"
        return Finding(name="preemption", state="not checked", text=text)
    _, mode, grace, *_ = rows[0].split("|")
    own = cluster.config.get("PreemptMode", "OFF") if mode.lower() in ("", "cluster") else mode.upper()
    return check_preemption(cluster, profile, own, seconds(grace) or 0)


def _sacctmgr(*words: str) -> list[str] | None:
    """Rows of fields with | between; None where accounting does not answer."""
    try:
        answer = call(["sacctmgr", "--noheader", "--parsable2", "--readonly", *words])
    except SlurmError:
        return None
    return answer.lines if answer.code == 0 else None


# -- what only Slurm can say --


def _check_reservation(name: str) -> Finding:
    answer = call(["scontrol", "--oneliner", "show", "reservation", name])
    if answer.code != 0:
        known = call(["scontrol", "--oneliner", "show", "reservation"]).lines
        names = [line.split()[0].partition("=")[2] for line in known if line.startswith("ReservationName=")]
        fix = f"known: {', '.join(names)}" if names else "there is none here: leave it out"
        return Finding(name="reservation", state="wrong", text=f"there is no {name}", fix=fix)
    fields = dict(word.split("=", 1) for word in answer.stdout.split() if "=" in word)
    span = f"{name}, {fields.get('StartTime', '?')} to {fields.get('EndTime', '?')}"
    return Finding(name="reservation", state="ok", text=span)


def _check_prepare(cluster: Cluster, profile: Profile) -> Finding:
    assert profile.prepare is not None
    wanted = profile.prepare
    partition = cluster.partition(wanted.partition)
    nodes = read_nodes(partition) if partition else ()
    found = [check_partition(cluster, wanted.partition, nodes, _groups())]
    if partition and nodes:
        found.append(check_time(partition, wanted.time))
        found.append(check_size(partition, nodes, cpus=wanted.cpus, mem=wanted.mem))
    worst = next((f for f in found if f.state == "wrong"), found[0])
    return dataclasses.replace(worst, name="prepare")


def _try(profile: Profile, *, gpus_per_node: int) -> Finding:
    """One node, a task that does nothing: would Slurm take it?"""
    options = ["--nodes=1", *site_options(profile, gpus_per_node=gpus_per_node)]
    lines = "".join(f"#SBATCH {option}\n" for option in options)
    answer = call(["sbatch", "--test-only"], stdin=f"#!/bin/bash\n{lines}:\n")
    if answer.code == 0:
        return Finding(name=_LAST, state="ok", text=answer.words)
    fix = f"Slurm was asked for {' '.join(options)}"
    return Finding(name=_LAST, state="wrong", text=answer.words, fix=fix)


def _groups() -> list[str]:
    names = []
    for number in {os.getgid(), *os.getgroups()}:
        try:
            names.append(grp.getgrgid(number).gr_name)
        except KeyError:  # a group without a name cannot be in Slurm's list
            continue
    return names


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("check", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("what was found, and what to do", overflow="fold")
    for finding in findings:
        text = f"{finding.text}\n  do: {finding.fix}" if finding.fix else finding.text
        table.add_row(finding.name, Text(finding.state, style=_COLOURS[finding.state]), Text(text))
    Console().print(table)
