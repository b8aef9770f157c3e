"""docs/scoreboard.md and its plot, from benchmarks/results/scoreboard.json and adapters_7b.json.

    python benchmarks/scoreboard_page.py

Every number and every judgement on the page is computed here; cells that are missing are named.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scoreboard_cases import REFERENCE, Case, cases
from scoreboard_cells import FORMATS, SETS, Budget, Cell, Row, Setup, Store, all_cells, read_results

from decompft.adapters.spec import ADAPTER_SPECS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE, PLOT = ROOT / "docs" / "scoreboard.md", ROOT / "docs" / "scoreboard.svg"
TITLES = {"nf4": "nf4 (double quantization)", "none": "bf16"}
OURS = "map"
MIB, GIB = 2**20, 2**30

HEAD = """# Scoreboard

Made by `benchmarks/scoreboard_page.py` from [scoreboard.json](../benchmarks/results/scoreboard.json); the cells are
run by `benchmarks/scoreboard.py`, which skips what is finished, so that the table can grow over several runs.

SmolLM2-135M-Instruct, adapters on all linear layers but the head, one epoch over the 17,754 records of the
commonsense training sets (BoolQ, ARC easy and challenge, OpenBookQA), 16 rows of 512 packed tokens a step, AdamW,
cosine schedule after 10 steps of warm-up. Accuracy is the mean over the four test files of the share of records whose
label has the largest likelihood; label loss is the mean of -log p(answer), p normalised over a record's labels.

Budget, the same for every method: three learning rates (a third of a base rate, the base rate, three times it), one
run each of {search} training records on one seed over nf4, judged by the label loss on {held} training records
that none of them saw; then {seeds} seeds over each format at the best rate, the bf16 runs at nf4's. No test record
decides anything. A rate marked * is at the edge of its three: a wider search might find better. Rank 16 and alpha 32
where not said otherwise ([scoreboard_cases.py](../benchmarks/scoreboard_cases.py) has each base rate and its reason).

"(reading)": the paper's formula could not be read, and what ran is an interpretation of what is known of it
([adapters](adapters/README.md)). Its row says nothing of the paper's own method.
"""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One case over one format."""

    case: Case
    rows: tuple[Row, ...]  # a finished run a seed
    rate: float
    speed: float | None  # steps/s over the reference's

    def values(self, measure: str) -> list[float]:
        return [row[measure]["mean"] for row in self.rows]

    def mean(self, measure: str = "accuracy") -> float:
        return statistics.fmean(self.values(measure))

    def error(self, measure: str = "accuracy") -> float | None:
        """Standard error of the mean; None for one seed."""
        values = self.values(measure)
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def main() -> None:
    text = page()
    PAGE.write_text(text, encoding="ascii")
    store = read()
    drawn = {form: lines(store, form) for form in FORMATS}
    if any(drawn.values()):
        draw(drawn)
    print(f"{PAGE}: {len(text.splitlines())} lines")


def page() -> str:
    """The text of docs/scoreboard.md."""
    store = read()
    budget = store.setup.budget
    search, held = f"{budget.search_records:,}", f"{budget.held_out_records:,}"
    parts = [HEAD.format(search=search, held=held, seeds=len(budget.seeds))]
    drawn = {form: lines(store, form) for form in FORMATS}
    if any(drawn.values()):
        devices = sorted({row["device"] for row in store.rows.values() if "device" in row})
        parts.append(f"Run on: {', '.join(devices)}. Steps/s are of cells that had a GPU to themselves.\n")
        parts.append("![accuracy against trained numbers](scoreboard.svg)\n")
    for form, found in drawn.items():
        parts.append(f"## {TITLES[form]}\n")
        if not found:
            parts.append("No run has been finished yet.\n")
            continue
        parts.append(judgement(found, store, form) + "\n")
        parts.append(table(found, store, form))
    parts += [search_section(store), missing_section(store), speed_section()]
    return "\n".join(part for part in parts if part)


def read() -> Store:
    """The committed cells that were made with the settings of now."""
    budget, rows = read_results(RESULTS / "scoreboard.json")
    setup = Setup(
        recipe=ROOT / "benchmarks" / "scoreboard.yaml", model=None, data=ROOT, work=ROOT / "absent",
        budget=Budget(**{**vars_of(budget), "seeds": tuple(budget.seeds)}),
    )  # fmt: skip
    store = Store(setup)
    store.rows = {row["cell"]: row for row in rows}
    return store


def lines(store: Store, form: str) -> list[Line]:
    """The cases that have a finished run, best first."""
    timed = {c.name: _time(store, c) for c in cases()}
    found = []
    for case in cases():
        seeds = store.setup.budget.seeds
        rows = [store.row(Cell(kind="train", case=case, form=form, seed=s, rate=None)) for s in seeds]
        good = tuple(row for row in rows if row is not None and row["ended"] == "ok")
        if good:
            mine, reference = timed[case.name], timed.get(REFERENCE)
            speed = None if mine is None or reference is None else reference / mine
            found.append(Line(case=case, rows=good, rate=good[0]["learning_rate"], speed=speed))
    return sorted(found, key=lambda line: (-line.mean(), line.case.name))


def judgement(found: list[Line], store: Store, form: str) -> str:
    """Where MAP stands, and how much of the order is noise; from the numbers alone."""
    by_name = {line.case.name: line for line in found}
    best = found[0]
    text = []
    base = store.row(Cell(kind="base", case=None, form=form, seed=0, rate=None))
    if base is not None and base["ended"] == "ok":
        bar = base["most_frequent"]["mean"]
        above = sum(line.mean() > bar for line in found)
        text.append(
            f"The untouched model scores {_percent(base['accuracy']['mean'])} (label loss "
            f"{base['label_loss']['mean']:.4f}); always giving each file's most frequent answer would score "
            f"{_percent(bar)}, which {above} of {len(found)} methods pass."
        )
    noise = [line for line in found[1:] if not _differ(best, line)]
    text.append(
        f"The best accuracy is {_labelled(best.case)}'s, {_percent(best.mean())}; {len(noise)} of the other "
        f"{len(found) - 1} are not told from it by these seeds (less than two standard errors of the difference)."
    )
    if OURS not in by_name:
        return " ".join([*text, "MAP has no finished run here."])
    ours = by_name[OURS]
    place, by_loss = (
        found.index(ours) + 1,
        sorted(found, key=lambda line: line.mean("label_loss")).index(ours) + 1,
    )
    verdict = "MAP wins here" if place == 1 else "**MAP does not win here**"
    text.append(
        f"{verdict}: it is number {place} of {len(found)} by accuracy with {_percent(ours.mean())}, "
        f"and number {by_loss} by label loss."
    )
    if REFERENCE in by_name:
        lora = by_name[REFERENCE]
        gap = 100 * (ours.mean() - lora.mean())
        told = "more" if _differ(ours, lora) else "no more"
        text.append(
            f"Against LoRA's {_percent(lora.mean())} that is {gap:+.2f} points, {told} than two standard errors "
            "of the difference."
        )
    return " ".join(text)


def table(found: list[Line], store: Store, form: str) -> str:
    names = {"boolq": "BoolQ", "arc_easy": "ARC-e", "arc_challenge": "ARC-c", "openbookqa": "OBQA"}
    head = ["method", "seeds", "accuracy %", "label loss", *(names[n] for n in SETS), "rate", "steps/s over LoRA",
            "peak GiB", "trained numbers", "file MiB"]  # fmt: skip
    body = []
    for line in found:
        row, case = line.rows[0], line.case
        peaks = [r["peak_bytes"] for r in line.rows if r["peak_bytes"]]
        edge = "" if line.rate == case.rates()[1] else "*"
        body.append([
            _labelled(case), str(len(line.rows)), _spread([100 * v for v in line.values("accuracy")], 2),
            _spread(line.values("label_loss"), 4),
            *(f"{100 * statistics.fmean(r['accuracy'][n] for r in line.rows):.1f}" for n in SETS),
            f"{line.rate:g}{edge}", "-" if line.speed is None else f"{line.speed:.2f}",
            f"{max(peaks) / GIB:.2f}" if peaks else "-", f"{row['num_params']:,}", f"{row['file_bytes'] / MIB:.2f}",
        ])  # fmt: skip
    return markdown(head, body)


def search_section(store: Store) -> str:
    """What each rate of each case came to."""
    body = []
    for case in cases():
        cells = [store.row(c) for c in all_cells((case,), store.setup.budget, ("search",))]
        rows = {row["learning_rate"]: row for row in cells if row is not None}
        if rows:
            said = [_searched(rows.get(rate)) for rate in case.rates()]
            best = store.best_rate(case)
            chosen = "-" if best is None else "none worked" if math.isnan(best) else f"{best:g}"
            body.append([_labelled(case), f"{case.base_rate:g}", *said, chosen, case.why])
    if not body:
        return ""
    head = [
        "method",
        "base rate",
        "a third of it",
        "itself",
        "three times it",
        "chosen",
        "why this base rate",
    ]
    return "## The search\n\nLabel loss on the held-out training records.\n\n" + markdown(head, body)


def missing_section(store: Store) -> str:
    """What has not been run, and what ended without a number."""
    text = ["## What is missing\n"]
    counts: dict[str, list[str]] = {}
    failed = []
    for cell in all_cells(cases(), store.setup.budget):
        row = store.row(cell)
        if row is None:
            left = store.rows.get(cell.name, {})
            if left.get("ended") == "error":
                failed.append([cell.name, "broke: " + left["message"].strip().splitlines()[-1][:200]])
            elif not (cell.kind == "train" and math.isnan(store.best_rate(cell.case) or 0.0)):
                what = f"{cell.kind}, {TITLES[cell.form].split()[0]}, seed {cell.seed}"
                name = "the untouched model" if cell.case is None else cell.case.name
                counts.setdefault(what, []).append(name)
        elif row["ended"] == "failed":
            failed.append([cell.name, row["message"]])
    if counts:
        text.append("Not run yet:\n")
        every = {case.name for case in cases()}
        text += [
            f"- {what}: {'every method' if set(names) >= every else _few(sorted(set(names)))}"
            for what, names in counts.items()
        ]
        text.append("")
    if failed:
        text.append("Ended without a number:\n")
        text.append(markdown(["cell", "why"], [[name, _plain(why)] for name, why in failed]))
    if not counts and not failed:
        text.append("Nothing: every cell was run.\n")
    return "\n".join(text)


def speed_section() -> str:
    """Step times at 7B, from adapters_7b.json."""
    path = RESULTS / "adapters_7b.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    good = [r for r in found["rows"] if "error" not in r]
    micros = sorted({r["micro_batch"] for r in good})
    by_case: dict[str, dict[int, dict[str, Any]]] = {}
    for row in good:
        by_case.setdefault(row["case"], {})[row["micro_batch"]] = row
    order = sorted(
        by_case, key=lambda n: (statistics.fmean(r["step_over_lora"] for r in by_case[n].values()), n)
    )
    body = []
    for name in order:
        rows = by_case[name]
        first = next(iter(rows.values()))
        weights = first["dense_peak_in_weights"]
        body.append([
            _label(name, first["is_reading"]), *(_ratio(rows.get(m), "step_over_lora") for m in micros),
            *(_ratio(rows.get(m), "peak_over_lora") for m in micros), str(first["dense_alive"]),
            "-" if weights is None else f"{weights:.2f}", f"{first['num_params']:,}",
        ])  # fmt: skip
    slow = [
        n for n in order if n != REFERENCE and any(r["step_over_lora"] > 1.05 for r in by_case[n].values())
    ]
    heavy = [n for n in order if any((r.get("peak_over_lora") or 0) > 1.05 for r in by_case[n].values())]
    head = ["method", *(f"step, {m} rows" for m in micros), *(f"peak, {m} rows" for m in micros), "dense alive",
            "layer's peak", "trained numbers"]  # fmt: skip
    devices = ", ".join(sorted({r["device"] for r in good}))
    parts = [
        "## What a step costs at 7B\n",
        f"Llama-2-7B's shape, nf4, 2048 tokens a row, no recomputation, {devices}; LoRA is 1. Each part of the run",
        f"timed LoRA itself, first and last. {found['note'][0].upper()}{found['note'][1:]}.",
        '"Dense alive" is the most tensors of at least out x in numbers that lived at once in one layer\'s forward and',
        'backward pass, the dequantized weight included; "layer\'s peak" the memory of that pass in such weights.\n',
        f"Above 1.05 x LoRA's step: {_few(slow)}. Above 1.05 x its peak memory: {_few(heavy)}.\n",
        markdown(head, body),
    ]
    broken = [[r["case"], _plain(r["error"])] for r in found["rows"] if "error" in r]
    return "\n".join([*parts, *(["Did not run:\n", markdown(["method", "why"], broken)] if broken else [])])


def draw(drawn: dict[str, list[Line]]) -> None:
    """Accuracy against trained numbers, one panel a format."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "scoreboard"
    figure, panels = pyplot.subplots(1, len(drawn), figsize=(7 * len(drawn), 6), sharey=True, squeeze=False)
    for panel, (form, found) in zip(panels[0], drawn.items(), strict=True):
        panel.set(
            title=TITLES[form],
            xscale="log",
            xlabel="trained numbers",
            ylabel="accuracy, mean of four files, %",
        )
        panel.grid(alpha=0.3)
        for line in found:
            marked = line.case.name in (OURS, REFERENCE)
            x, y = line.rows[0]["num_params"], 100 * line.mean()
            colour = {OURS: "tab:red", REFERENCE: "tab:blue"}.get(line.case.name, "tab:gray")
            panel.errorbar(x, y, yerr=100 * (line.error() or 0.0), fmt="o", color=colour, capsize=2)
            panel.annotate(line.case.name, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=7,
                           weight="bold" if marked else "normal", color=colour)  # fmt: skip
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    right = ["---" if name in ("method", "why", "cell", "why this base rate") else "---:" for name in head]
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, right, *body))


def vars_of(budget: Budget) -> dict[str, Any]:
    return {name: getattr(budget, name) for name in Budget.__dataclass_fields__}


def _labelled(case: Case) -> str:
    methods = (case.method, case.options.get("over", case.method))  # what stands over a reading is one
    return _label(case.name, any(ADAPTER_SPECS[method].is_reading for method in methods))


def _label(name: str, is_reading: bool) -> str:
    return f"{name} (reading)" if is_reading else name


def _time(store: Store, case: Case) -> float | None:
    row = store.row(Cell(kind="time", case=case, form="nf4", seed=0, rate=case.base_rate))
    return None if row is None or row["ended"] != "ok" else float(row["step_s"])


def _differ(one: Line, other: Line) -> bool:
    """Whether two means lie more than two standard errors of their difference apart; without an error, no."""
    a, b = one.error(), other.error()
    return a is not None and b is not None and abs(one.mean() - other.mean()) > 2 * math.hypot(a, b)


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} +- {statistics.stdev(values):.{digits}f}"


def _searched(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row['held_out_loss']:.4f}" if row["ended"] == "ok" else "failed"


def _ratio(row: dict[str, Any] | None, key: str) -> str:
    return "-" if row is None or row.get(key) is None else f"{row[key]:.3f}"


def _plain(text: str) -> str:
    """Any text as the cell of a table."""
    return " ".join(text.split())[:200].replace("|", "/").encode("ascii", "replace").decode()


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


if __name__ == "__main__":
    main()
