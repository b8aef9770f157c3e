"""How long a collective takes: a latency a hop and a bandwidth, of the links inside a node and between nodes.

The shape is NCCL's own cost model (src/graph/tuning.cc of NCCL 2.2x): a ring of n ranks on m nodes has n - 1 steps, of
which m cross nodes; a tree has the depth log2(m) between nodes and a chain inside each. Bandwidth is bus bandwidth: the
number of bytes that pass a rank's slowest link. A ring enters and leaves a node once, and NCCL lays one ring through
each network card, so that a node's whole network serves a collective of all its ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    bytes_per_s: float  # one way; of the network: of a whole node
    latency_s: float  # of one hop


@dataclass(frozen=True, kw_only=True, slots=True)
class Fabric:
    """What joins the ranks."""

    in_node: Link
    network: Link


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The ranks of one collective."""

    ranks: int
    nodes: int = 1
    at_once: int = 1  # equal groups that share each node's network at the same time


def all_gather_s(num_bytes: float, group: Group, fabric: Fabric) -> float:
    """Seconds until every rank has all `num_bytes`, of which each had 1/ranks; of a reduce-scatter, too."""
    if group.ranks == 1:
        return 0.0
    return _ring_latency(group, fabric) + num_bytes * _share(group) / _bandwidth(group, fabric)


def all_reduce_s(num_bytes: float, group: Group, fabric: Fabric) -> float:
    """Seconds of the sum of `num_bytes` over the ranks: a ring or a tree, whichever is faster."""
    if group.ranks == 1:
        return 0.0
    chain = (group.ranks // group.nodes - 1) * fabric.in_node.latency_s
    tree = 2 * (math.log2(group.nodes) * fabric.network.latency_s + chain)
    latency = min(2 * _ring_latency(group, fabric), tree)
    return latency + 2 * num_bytes * _share(group) / _bandwidth(group, fabric)


def _share(group: Group) -> float:
    return (group.ranks - 1) / group.ranks


def _ring_latency(group: Group, fabric: Fabric) -> float:
    crossing = min(group.nodes, group.ranks - 1) if group.nodes > 1 else 0
    return (group.ranks - 1 - crossing) * fabric.in_node.latency_s + crossing * fabric.network.latency_s


def _bandwidth(group: Group, fabric: Fabric) -> float:
    inside = fabric.in_node.bytes_per_s
    if group.nodes == 1:
        return inside
    network = fabric.network.bytes_per_s / group.at_once
    return network if group.ranks == group.nodes else min(inside, network)
