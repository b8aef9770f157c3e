"""What does the head node do for the others during the check? Pairs them up, and keeps what they cannot write."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from decompft.launcher.node_compare import Pair, speed_limit
from decompft.launcher.node_file import NodeFile, file_name
from decompft.launcher.worker.node_links import PAIR_TIMEOUT_S, rounds
from decompft.launcher.worker.node_meeting import Head, Message

_MARGIN_S = 5.0  # of a round, for nodes that begin it late


class Lead(threading.Thread):
    """Answers the nodes' steps: hello, ready, a few links, result.

    Args:
        folder: incarnations/N/nodes of this node.
        token: name of a file in it that the others look for; "" when it could not be written.
        hello_end_s, end_s: monotonic times after which nobody is waited for.

    Raises:
        OSError: the port is taken.
    """

    def __init__(
        self,
        port: int,
        num_nodes: int,
        *,
        folder: Path,
        token: str,
        device: str,
        hello_end_s: float,
        end_s: float,
    ) -> None:
        super().__init__(daemon=True)
        self._head = Head(port, num_nodes)
        self._folder, self._token, self._device = folder, token, device
        self._hello_end, self._end = hello_end_s, end_s
        self._names: dict[int, str] = {}
        self._speeds: dict[Pair, float] = {}
        self._todo: list[list[tuple[int, int]]] = []
        self._store_port: int | None = None
        self._num_rounds, self._has_confirmed = 0, False

    def run(self) -> None:
        try:
            self._head.step(self._hello, end_s=self._hello_end)
            self._head.step(self._ready, end_s=self._end)
            while self._num_rounds:
                number = self._num_rounds
                end = min(self._end, time.monotonic() + PAIR_TIMEOUT_S + _MARGIN_S)
                self._head.step(self._link, end_s=end)
                if self._num_rounds == number:
                    break
            self._head.step(self._result, end_s=self._end)
        finally:
            self._head.close()

    def _hello(self, said: dict[int, Message]) -> dict[int, Message]:
        self._names = {node_id: str(message["node"]) for node_id, message in said.items()}
        return {node_id: {"token": self._token} for node_id in said}

    def _ready(self, said: dict[int, Message]) -> dict[int, Message]:
        self._store_port = said.get(0, {}).get("port")
        able = [node_id for node_id, message in said.items() if message["can_reduce"]]
        self._todo = rounds(able) if self._store_port is not None else []
        return self._next(said)

    def _link(self, said: dict[int, Message]) -> dict[int, Message]:
        for node_id, message in said.items():
            if message.get("peer"):
                pair = _pair(self._names[node_id], message["peer"])
                self._speeds[pair] = max(self._speeds.get(pair, 0.0), message["mb_per_s"])
        if not self._todo and not self._has_confirmed:
            self._has_confirmed = True
            self._todo = self._doubtful(set(said))
        return self._next(said)

    def _next(self, said: dict[int, Message]) -> dict[int, Message]:
        """Partners of the next round; nothing for anybody when there is none."""
        if not self._todo:
            return {}
        pairs = [pair for pair in self._todo.pop(0) if set(pair) <= set(said)]
        self._num_rounds += 1
        answers: dict[int, Message] = {node_id: {"peer": None} for node_id in said}  # a pause
        for a, b in pairs:
            key = f"{self._num_rounds}/{a}-{b}"
            for node_id, other, rank in ((a, b, 0), (b, a, 1)):
                answers[node_id] = {
                    "peer": self._names[other], "key": key, "rank": rank, "port": self._store_port
                }  # fmt: skip
        return answers

    def _doubtful(self, there: set[int]) -> list[list[tuple[int, int]]]:
        """Slow pairs once more, alone this time: a moment of other traffic must not cost a node its place."""
        limit = speed_limit(self._speeds, self._device)
        ids = {name: node_id for node_id, name in self._names.items()}
        taken: set[int] = set()
        pairs = []
        for pair, _ in sorted(self._speeds.items(), key=lambda item: item[1], reverse=True):
            a, b = sorted(ids[name] for name in pair)
            if self._speeds[pair] < limit and {a, b} <= there - taken:
                taken |= {a, b}
                pairs.append((a, b))
        return [pairs] if pairs else []

    def _result(self, said: dict[int, Message]) -> dict[int, Message]:
        """Nodes whose folder is another one, or cannot be written, are heard all the same."""
        for message in said.values():
            file = NodeFile.from_json(message["file"])
            with suppress(OSError):
                if file_name(file.node) not in os.listdir(self._folder):
                    file.write(self._folder)
        return {}


def _pair(a: str, b: str) -> Pair:
    return (min(a, b), max(a, b))
