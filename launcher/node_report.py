"""What did the nodes say before training, who is bad, and why? Read from incarnations/N/nodes/."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from decompft.launcher.errors import UserError
from decompft.launcher.node_compare import LATE, Said, compare
from decompft.launcher.node_file import NodeFile, file_name

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"bad": "bold red", "user": "bold red", "warn": "yellow", "ok": "green"}


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """The verdict over all nodes of an incarnation."""

    files: tuple[NodeFile, ...]
    expected: tuple[str, ...]
    said: tuple[Said, ...]

    @property
    def bad(self) -> list[tuple[str, str]]:
        """(node, why) of each node that should be left out, in the order of the job's list."""
        found: dict[str, list[str]] = {}
        for said in self.said:
            if said.problem.severity == "bad" and said.problem.text not in found.get(said.node, ()):
                found.setdefault(said.node, []).append(said.problem.text)
        order = {node: number for number, node in enumerate(self.expected)}
        nodes = sorted(found, key=lambda node: (order.get(node, len(order)), node))
        return [(node, "; ".join(found[node])) for node in nodes]

    @property
    def unsure(self) -> list[str]:
        """Those of the bad nodes that were late or out of reach, and nothing else: it may pass."""
        kinds = {
            node: {
                said.problem.kind
                for said in self.said
                if said.node == node and said.problem.severity == "bad"
            }
            for node, _ in self.bad
        }
        return [node for node in kinds if kinds[node] <= {LATE, "head"}]

    @property
    def user_error(self) -> UserError | None:
        """What is wrong with the job itself, on whatever nodes it runs; None when nothing is."""
        found = [said.problem for said in self.said if said.problem.severity == "user"]
        if not found:
            return None
        hints = dict.fromkeys(problem.hint for problem in found if problem.hint)
        return UserError("\n".join(problem.text for problem in found), "; ".join(hints))

    @property
    def warnings(self) -> list[str]:
        found = [said for said in self.said if said.problem.severity == "warn"]
        return [f"{said.node}: {said.problem.text}" if said.node else said.problem.text for said in found]

    def lines(self) -> list[str]:
        """The report as plain text: a line a node, its problems and their hints under it."""
        lines = []
        for node, state, facts in self._rows():
            lines.append(f"{node}: {state}" + (f" ({facts})" if facts else ""))
            lines += [f"  {text}" for text in self._words(node)]
        return lines + self._words("")

    def show(self, console: Console) -> None:
        """A table on a terminal, else the plain lines."""
        if not console.is_terminal:
            for line in self.lines():
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for name in ("node", "state", "found"):
            table.add_column(name, no_wrap=name != "found", overflow="fold")
        for node, state, facts in self._rows():
            found = Text("\n".join([facts, *self._words(node)] if facts else self._words(node)))
            table.add_row(Text(node), Text(state, style=_STYLES[state]), found)
        console.print(table)
        for line in self._words(""):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _rows(self) -> list[tuple[str, str, str]]:
        files = {file.node: file for file in self.files}
        rows = []
        for node in (*self.expected, *sorted(set(files) - set(self.expected))):
            kinds = {said.problem.severity for said in self.said if said.node == node}
            state = next((kind for kind in ("bad", "user", "warn") if kind in kinds), "ok")
            rows.append((node, state, _facts(files[node]) if node in files else ""))
        return rows

    def _words(self, node: str) -> list[str]:
        lines: dict[str, None] = {}
        for said in self.said:
            if said.node == node:
                lines[f"{said.problem.severity}: {said.problem.text}"] = None
                if said.problem.hint:
                    lines[f"  hint: {said.problem.hint}"] = None
        return list(lines)


def read(folder: Path, expected_nodes: Sequence[str]) -> NodeReport:
    """The verdict over the files in incarnations/N/nodes/.

    Args:
        expected_nodes: names as Slurm has them, the head first; a node without a file is bad.
    """
    names = {file_name(node) for node in expected_nodes}
    files = []
    for path in sorted(folder.glob("*.json")):
        try:
            files.append(NodeFile.from_json(path.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged, or another version's: as good as none
    files = [file for file in files if not names or file_name(file.node) in names]
    files.sort(key=lambda file: file.node_id)
    return NodeReport(
        files=tuple(files),
        expected=tuple(expected_nodes),
        said=tuple(compare(files, expected_nodes)),
    )


def _facts(file: NodeFile) -> str:
    parts = []
    if file.gpus:
        parts += [f"{file.gpus.count(name)} x {name}" for name in dict.fromkeys(file.gpus)]
    if file.memory_free_bytes is not None:
        parts.append(f"{file.memory_free_bytes / 2**30:.0f} GiB of memory free")
    if file.clock_ahead_s is not None and file.node_id:
        parts.append(f"clock {file.clock_ahead_s:+.2f} s")
    if file.links:
        speeds = [link.mb_per_s for link in file.links]
        parts.append(f"{min(speeds):.0f} to {max(speeds):.0f} MB/s with {len(speeds)} node(s)")
    return ", ".join([*parts, f"{file.took_s:.1f} s"])
