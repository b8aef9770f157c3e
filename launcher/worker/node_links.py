"""How fast do two nodes reduce a tensor together? A process group of the two, and a timed all-reduce in it.

Nodes are paired in rounds in which everybody has another partner, so that a slow node is slow in all of its pairs and
a good one in a few of its own at most.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Sequence
from typing import Any

PAIR_TIMEOUT_S = 10.0
_ROUNDS = 3  # each node is seen with so many others; all of them in a job of up to four
_SMALL_BYTES = 1 << 20
_LARGE_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}
_ENOUGH_S = 0.25  # a link on which the small one takes longer is judged by it
_REPEATS = 3


def rounds(ids: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Disjoint pairs, round by round; with an odd number somebody pauses in each.

    A round robin's rounds, few of them, spread evenly: partners are near and far in the list of nodes.
    """
    if len(ids) < 2:
        return []
    players: list[int | None] = [*sorted(ids), *([None] if len(ids) % 2 else [])]
    num_all = len(players) - 1
    found = []
    for number in range(min(_ROUNDS, num_all)):
        turn = number * num_all // min(_ROUNDS, num_all)
        circle = [players[0], *players[1 + turn :], *players[1 : 1 + turn]]
        halves = zip(circle[: len(circle) // 2], reversed(circle[len(circle) // 2 :]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in halves if a is not None and b is not None])
    return found


def host_store(address: str) -> Any:
    """The head's store, through which pairs find each other; its `port` is for the others."""
    return _store_class()(address, 0, is_master=True, wait_for_workers=False, timeout=_patience())


def join_store(address: str, port: int) -> Any:
    """The same store from another node."""
    return _store_class()(address, port, is_master=False, wait_for_workers=False, timeout=_patience())


def measure(store: Any, key: str, rank: int, device: str) -> float:
    """Time all-reduces with the other node of a pair; 10**6 bytes of the buffer a second.

    Args:
        key: equal on both sides, and used once.
        rank: 0 or 1.

    Raises:
        RuntimeError: torch's, when they cannot connect or are not done in time.
    """
    import torch
    import torch.distributed as dist

    # a timeout must come as an exception here, not as the end of the process by NCCL's watchdog
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    place = "cuda:0" if device == "cuda" else "cpu"
    pair = dist.PrefixStore(key, store)  # type: ignore[attr-defined]  # torch exports it without naming it
    try:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo", store=pair, rank=rank, world_size=2, timeout=_patience()
        )
        dist.all_reduce(torch.zeros(1, device=place))  # connects

        def seconds(num_bytes: int) -> float:
            tensor = torch.zeros(num_bytes // 4, device=place)
            # both begin together: what is timed is no waiting for the other
            dist.all_reduce(torch.zeros(1, device=place))
            begin = time.perf_counter()
            dist.all_reduce(tensor)
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begin

        took = min(seconds(_SMALL_BYTES) for _ in range(2))
        slowest = torch.tensor([took], device=place)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)  # both go on, or neither
        if float(slowest) > _ENOUGH_S:
            return _SMALL_BYTES / float(slowest) / 1e6
        large = _LARGE_BYTES[device]
        return large / min(seconds(large) for _ in range(_REPEATS)) / 1e6
    finally:
        if not dist.is_initialized():
            # torch numbers its groups, and counts one that could not connect, too: without this the node and its next
            # partner would wait for each other under two names. Ending a group, here one of this node alone, resets it
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        dist.destroy_process_group()


def _store_class() -> Any:
    import torch.distributed as dist

    return dist.TCPStore  # type: ignore[attr-defined]  # as above


def _patience() -> datetime.timedelta:
    return datetime.timedelta(seconds=PAIR_TIMEOUT_S)
