"""How do the nodes of a job talk before any process group exists? Lines of JSON to the head node, step by step.

Everyone connects to the head and compares clocks with it. Then, step after step, each node says something and gets an
answer once all have spoken or the step's time is up; who is late is out, and the others go on.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]
Decide = Callable[[dict[int, Message]], dict[int, Message]]  # of a step: messages by node id -> answers

_PINGS = 8
_POLL_S = 0.05


class Gone(Exception):
    """The head does not answer, or has gone on without this node."""


class Head:
    """The head node's side: collects what all nodes say in a step, and answers.

    Args:
        port: on which the others reach this node.
        num_nodes: that are expected, the head itself, which connects like everybody, included.
    """

    def __init__(self, port: int, num_nodes: int) -> None:
        self._num_nodes = num_nodes
        self._there = threading.Condition()
        self._has_begun = False  # once the first step has ended, nobody joins any more
        self._said: dict[int, Message] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._server = socket.create_server(("", port), backlog=num_nodes + 8)
        threading.Thread(target=self._accept, daemon=True).start()

    def step(self, decide: Decide, *, end_s: float) -> set[int]:
        """Hear everybody, answer everybody; the ids of those who are still there.

        Args:
            end_s: monotonic time at which who has not spoken is left behind.
        """
        with self._there:
            while len(self._said) < self._num_nodes and time.monotonic() < end_s:
                self._there.wait(_POLL_S)
            said, self._said = self._said, {}
            self._num_nodes, self._has_begun = len(said), True
            for node_id in set(self._sockets) - set(said):
                _close(self._sockets.pop(node_id))
            answers = decide(said)
            for node_id in said:
                try:
                    _send(self._sockets[node_id], answers.get(node_id, {}))
                except OSError:  # it died after it spoke; the next step does without it
                    self._drop(node_id)
            return set(said)

    def close(self) -> None:
        _close(self._server)

    def _drop(self, node_id: int) -> None:
        if node_id in self._sockets:
            _close(self._sockets.pop(node_id))
            self._num_nodes -= 1

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        node_id: int | None = None
        try:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with client.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    if message.get("kind") == "ping":
                        _send(client, {"time_s": time.time()})
                        continue
                    with self._there:
                        node_id = int(message["id"])
                        if self._has_begun and self._sockets.get(node_id) is not client:
                            _close(client)  # too late
                            return
                        self._sockets[node_id] = client
                        self._said[node_id] = message
                        self._there.notify_all()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # a stranger, or a node that died
        with self._there:
            if node_id is None:
                _close(client)
            elif self._sockets.get(node_id) is client and node_id not in self._said:
                self._drop(node_id)
                self._there.notify_all()


class Member:
    """A node's side.

    Raises:
        Gone: the head cannot be reached before `end_s` (monotonic).
    """

    def __init__(self, node_id: int, address: str, port: int, *, end_s: float) -> None:
        self._id = node_id
        while True:
            try:
                self._socket = socket.create_connection((address, port), timeout=_left(end_s))
                break
            except OSError as error:  # refused while the head is still starting
                if time.monotonic() + _POLL_S > end_s:
                    raise Gone(f"{address}:{port}: {error.strerror or error}") from error
                time.sleep(_POLL_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = self._socket.makefile("rb")

    def clock(self, *, end_s: float) -> tuple[float, float]:
        """Seconds by which this node's clock is ahead of the head's, and how far that may be off."""
        best = (0.0, float("inf"))
        for _ in range(_PINGS):
            sent, begin = time.time(), time.perf_counter()
            there = self._ask({"kind": "ping"}, end_s)["time_s"]
            round_trip = time.perf_counter() - begin
            if round_trip / 2 < best[1]:
                best = (sent + round_trip / 2 - there, round_trip / 2)
        return best

    def step(self, message: Message, *, end_s: float) -> Message:
        """Say something, and wait for the head's answer.

        Raises:
            Gone: there is none.
        """
        return self._ask(message | {"id": self._id}, end_s)

    def close(self) -> None:
        self._lines.close()
        _close(self._socket)

    def _ask(self, message: Message, end_s: float) -> Message:
        try:
            self._socket.settimeout(_left(end_s))
            _send(self._socket, message)
            line = self._lines.readline()
            if line:
                answer: Message = json.loads(line)
                return answer
        except (OSError, ValueError) as error:
            raise Gone(f"no answer from the head node: {error}") from error
        raise Gone("the head node has gone on without this one, or has died")


def _left(end_s: float) -> float:
    return max(0.1, end_s - time.monotonic())


def _send(connection: socket.socket, message: Message) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _close(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads it
    except OSError:
        pass
    connection.close()
