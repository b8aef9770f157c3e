"""Draw docs/scaling_DEVICE.svg and docs/scaling.md's table of one results file of scaling.py.

    python benchmarks/scaling_page.py cpu        (or cuda)

Points are runs, the line is the simulator. On a GPU it has the constants of launcher/rates.py; on a CPU one constant is
fitted, the rate, to the cells of one rank (the median of theirs), and the link between two ranks is the measured one.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from scaling import SETTINGS

from decompft.launcher.collectives import Fabric, Link
from decompft.launcher.fitting import fit_to_model
from decompft.launcher.machine import Machine
from decompft.launcher.plan import Plan
from decompft.launcher.planner import make
from decompft.launcher.rates import H200, Rates, fabric
from decompft.launcher.simulator import simulate
from decompft.launcher.source import load
from decompft.launcher.workload import Layout

ROOT = Path(__file__).resolve().parent.parent
FILES = {"cpu": "scaling_cpu", "cuda": "scaling_h200"}
AXES = {
    "ranks": ("ranks", "ranks"),
    "length": ("sequence_length", "sequence length"),
    "adapter": ("adapter_rank", "adapter rank"),
    "depth": ("layers", "layers"),
}
WIDTH, HEIGHT, LEFT, TOP = 300, 200, 52, 30
GIB = 1 << 30


def main() -> None:
    device = sys.argv[1]
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{FILES[device]}.json").read_text())
    cells = [row for row in rows if "tokens_per_s" in row]
    if device == "cpu":  # a shared machine's median is of what the others left; its fastest step, less so
        cells = [row | {"tokens_per_s": row["fastest_tokens_per_s"]} for row in cells]
    links = next((row for row in rows if row["name"] == "links" and "bytes_per_s" in row), None)
    rates, joined = constants(device, cells, links)
    for row in cells:
        row["simulated"] = simulated(row, device, rates, joined)
    (ROOT / "docs" / f"scaling_{device}.svg").write_text(draw(cells))
    page = ROOT / "docs" / "scaling.md"
    begin, end = f"<!-- {device} -->\n", f"<!-- /{device} -->\n"
    before, rest = page.read_text().split(begin)
    page.write_text(before + begin + table(cells) + end + rest.split(end)[1])


def constants(device: str, cells: list[dict[str, Any]], links: dict[str, Any] | None) -> tuple[Rates, Fabric]:
    """A GPU's are known; a CPU's rate is the median of what its cells of one rank reached."""
    if device == "cuda":
        return H200, fabric()
    one = Rates(name="CPU", flops=1.0, tail_s={}, overlaps=False)
    link = Link(bytes_per_s=1e9, latency_s=1e-4)
    if links is not None:
        link = Link(bytes_per_s=links["bytes_per_s"], latency_s=links["latency_s"])
    joined = Fabric(in_node=link, network=link)
    single = [row for row in cells if row["ranks"] == 1]
    rate = statistics.median(row["tokens_per_s"] / simulated(row, device, one, joined) for row in single)
    return Rates(name="CPU", flops=rate, tail_s={}, overlaps=False), joined


def simulated(row: dict[str, Any], device: str, rates: Rates, joined: Fabric) -> float:
    """Tokens/s of all ranks."""
    plan = plan_of(row, device)
    layout = Layout(
        device=plan.world.device, strategy=plan.strategy, world_size=plan.world.size, micro_size=plan.batch.micro_size,
        recompute=plan.recompute,
    )  # fmt: skip
    work = fit_to_model(plan.recipe).work
    time = simulate(work, layout, rates, joined, nodes=1, accumulation=plan.batch.accumulation)
    return plan.batch.tokens_per_step / time.seconds


def plan_of(row: dict[str, Any], device: str) -> Plan:
    words = [word for word in shlex.split(row["command"]) if "=" in word]
    machine = Machine(num_cores=2, host_memory_bytes=256 * GIB)
    if device == "cuda":
        machine = Machine(
            num_gpus=row["ranks"], gpu_memory_bytes=140 * GIB, gpu_name="NVIDIA H200", num_cores=16
        )
    return make(load(SETTINGS[device].recipe, words), machine=machine)


def table(cells: list[dict[str, Any]]) -> str:
    lines = ["| sweep | cell | tokens/s | simulated | error |", "| --- | --- | --- | --- | --- |"]
    for row in cells:
        key, _ = AXES[row["sweep"]]
        what = f"{row['strategy']} on {row['ranks']}" if row["sweep"] == "ranks" else f"{row[key]:,}"
        error = row["simulated"] / row["tokens_per_s"] - 1
        speeds = f"{row['tokens_per_s']:,.0f} | {row['simulated']:,.0f}"
        lines.append(f"| {AXES[row['sweep']][1]} | {what} | {speeds} | {error:+.0%} |")
    return "\n".join(lines) + "\n"


def draw(cells: list[dict[str, Any]]) -> str:
    """Four panels, tokens/s of all ranks over what is swept, by doublings."""
    panels = [
        _panel(name, [row for row in cells if row["sweep"] == name], at) for at, name in enumerate(AXES)
    ]
    width, height = 2 * (WIDTH + LEFT + 20), 2 * (HEIGHT + TOP + 30)
    style = (
        "text{font:11px sans-serif;fill:#444}.t{font-weight:bold;font-size:12px}.a{stroke:#999;fill:none}"
        ".s{stroke:#c60;fill:none;stroke-width:1.5}circle{fill:#06c}.f{fill:#c0a}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>{style}</style><rect width='100%' height='100%' fill='white'/>{''.join(panels)}</svg>\n"
    )


def _panel(name: str, rows: list[dict[str, Any]], at: int) -> str:
    key, title = AXES[name]
    x0, y0 = LEFT + (at % 2) * (WIDTH + LEFT + 20), TOP + (at // 2) * (HEIGHT + TOP + 30)
    parts = [
        f'<text class="t" x="{x0}" y="{y0 - 10}">tokens/s over {title}</text>',
        f'<path class="a" d="M{x0} {y0}V{y0 + HEIGHT}H{x0 + WIDTH}"/>',
    ]
    if not rows:
        return "".join([*parts, f'<text x="{x0 + 20}" y="{y0 + HEIGHT / 2}">not measured yet</text>'])
    places = sorted({row[key] for row in rows})
    top = 1.1 * max(max(row["tokens_per_s"], row["simulated"]) for row in rows)
    spread = math.log2(places[-1] / places[0]) or 1.0

    def x(value: float) -> float:
        return round(x0 + 15 + (WIDTH - 30) * math.log2(value / places[0]) / spread, 1)

    def y(value: float) -> float:
        return round(y0 + HEIGHT * (1 - value / top), 1)

    parts += [f'<text x="{x(p) - 8}" y="{y0 + HEIGHT + 14}">{p}</text>' for p in places]
    parts += [
        f'<text x="{x0 - 48}" y="{y(top * share) + 4}">{top * share:,.0f}</text>' for share in (0.0, 0.5, 0.9)
    ]
    for strategies in (("single", "ddp"), ("single", "fsdp")):
        line = sorted((row for row in rows if row["strategy"] in strategies), key=lambda row: row[key])
        if len(line) > 1:
            points = " ".join(f"{x(row[key])},{y(row['simulated'])}" for row in line)
            parts.append(f'<polyline class="s" points="{points}"/>')
    for row in rows:
        css = ' class="f"' if row["strategy"] == "fsdp" else ""
        parts.append(
            f'<circle{css} cx="{x(row[key])}" cy="{y(row["tokens_per_s"])}" r="4">'
            f"<title>{row['strategy']}, {row[key]}: {row['tokens_per_s']:,.0f} tokens/s</title></circle>"
        )
    return "".join(parts)


if __name__ == "__main__":
    main()
