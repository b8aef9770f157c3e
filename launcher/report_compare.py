"""The page of several runs: their losses in one plot, and a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from decompft.launcher.report_curves import STEP, curves_of, step_axis
from decompft.launcher.report_data import Seen
from decompft.launcher.report_page import best_eval, headline, last_loss, median_speed, peak_memory
from decompft.launcher.report_plots import NUM_COLOURS, Curve, Plot, draw
from decompft.launcher.report_scale import fit_axis, without_spikes
from decompft.launcher.report_style import figure, folded, page, table
from decompft.launcher.report_text import moment, number, size
from decompft.launcher.report_verdict import judge

_MAX_KEYS = 40


def render(several: Sequence[Seen]) -> str:
    """The HTML of two or more runs."""
    return page(f"{len(several)} runs compared", _body(several))


def _body(several: Sequence[Seen]) -> Iterator[str]:
    names = _names(several)
    yield f"<header><h1>{len(several)} runs compared</h1></header>"
    yield '<section class="plots">'
    yield _losses(several, names)
    yield "</section>"
    yield "<h2>Runs</h2>"
    head = (
        "run", "outcome", "steps", "final loss", "best eval", "at step", "tokens/s", "peak memory", "what it is",
    )  # fmt: skip
    rows = [_row(seen, name) for seen, name in zip(several, names, strict=True)]
    yield table(head, rows, numbers=(2, 3, 4, 5, 6, 7))
    differing = list(_differing(several))
    if differing:
        yield "<h2>What differs between their recipes</h2>"
        yield table(("key", *names), differing[:_MAX_KEYS])
    if len(differing) > _MAX_KEYS:
        yield f'<p class="sub">and {len(differing) - _MAX_KEYS:,} more keys</p>'
    lines = [
        (name, f"{judge(seen).word} {judge(seen).line}", seen.run.path.absolute())
        for seen, name in zip(several, names, strict=True)
    ]
    yield folded("how each of them stands, and where it lies", table(("run", "state", "folder"), lines))
    note = "final loss: of the last logged step; tokens/s: median of the logged steps"
    yield f"<footer>{note}; made by decompft report, {moment(several[0].now_s)}</footer>"


def _losses(several: Sequence[Seen], names: Sequence[str]) -> str:
    curves: list[Curve] = []
    values: list[float] = []
    for index, (seen, name) in enumerate(zip(several, names, strict=True)):
        # colours come again after eight runs, then dashed
        lines, _ = curves_of(seen, "loss", name, index, is_dashed=index >= NUM_COLOURS)
        curves += lines
        if seen.evals:
            curves.append(Curve(pieces=[seen.evals], name=f"{name}, evaluation", kind="dots", colour=index))
        values += without_spikes(seen.rows.columns["loss"]) + [loss for _, loss in seen.evals]
    plot = Plot(
        label="losses by step", x_axis=step_axis(several), y_axis=fit_axis(values), x_title=STEP,
        y_title="loss per trained token", curves=curves, width=1060, height=400,
    )  # fmt: skip
    # each run has a window of its own: their lengths differ
    words = "thin: each logged step; bold: running median; dots: held-out evaluations; arrows: above the plot"
    legend = [(name, index) for index, name in enumerate(names)]
    return figure("Losses", words, draw(plot), legend=legend, is_wide=True)


def _row(seen: Seen, name: str) -> Sequence[str]:
    verdict, best, speed = judge(seen), best_eval(seen), median_speed(seen)
    return (
        name, verdict.word, verdict.total.beside(seen.step).removeprefix("step "), number(last_loss(seen), 5),
        "-" if best is None else number(best[1], 5), "-" if best is None else f"{best[0]:,}", number(speed),
        size(peak_memory(seen)[0]), headline(seen),
    )  # fmt: skip


def _names(several: Sequence[Seen]) -> list[str]:
    """Folder names where they tell the runs apart, else paths."""
    short = [seen.run.path.absolute().name for seen in several]
    return short if len(set(short)) == len(short) else [str(seen.run.path) for seen in several]


def _differing(several: Sequence[Seen]) -> Iterator[Sequence[str]]:
    recipes = [_flat(seen.plan.recipe.model_dump(mode="json"), "") for seen in several]
    for key in sorted({key for recipe in recipes for key in recipe}):
        values = [json.dumps(recipe[key]) if key in recipe else "-" for recipe in recipes]
        if len(set(values)) > 1:
            yield key, *(value[:120] for value in values)


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    """Nested sections as {dotted key: value}; a list is a value."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: leaf
        for name, item in value.items()
        for key, leaf in _flat(item, f"{prefix}.{name}".lstrip(".")).items()
    }
