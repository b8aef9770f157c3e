"""The figures of one run over its steps: loss, learning rate, speed, gradients, memory, saves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from decompft.launcher.report_bars import Bar, draw_memory
from decompft.launcher.report_data import Seen
from decompft.launcher.report_plots import Curve, Level, Mark, Plot, draw
from decompft.launcher.report_scale import Axis, Point, fit_axis, pieces, smooth, without_spikes
from decompft.launcher.report_style import figure
from decompft.launcher.report_text import counted, duration, size

STEP = "optimizer step"
_SMOOTH_FROM = 100  # rows; a shorter curve is read as it is
_NUM_TERMS = 6  # of the forecast that get a colour of their own


def loss_figure(seen: Seen) -> str:
    """Training loss, its running median, and the evaluations."""
    losses = [loss for _, loss in seen.evals]
    shown = without_spikes(seen.rows.columns["loss"]) + losses
    axis = fit_axis(shown)
    curves, words = curves_of(seen, "loss", "training loss", 0)
    legend = [("training", 0)] if curves else []
    if losses:
        curves.append(Curve(pieces=[seen.evals], name="evaluation", kind="dots", colour=1))
        legend.append(("held-out evaluation", 1))
    left_out = [loss for loss in seen.rows.columns["loss"] if loss > axis.high]
    if left_out:
        words += f"; arrows: {counted(len(left_out), 'step')} above the plot, up to {max(left_out):.4g}"
    not_finite = sum(not math.isfinite(loss) for loss in seen.rows.columns["loss"])
    if not_finite:
        words += f"; {counted(not_finite, 'step')} without a finite loss"
    plot = Plot(
        label="loss by step", x_axis=step_axis([seen]), y_axis=axis, x_title=STEP, y_title="loss per trained token",
        curves=curves, marks=_marks(seen), holes=seen.rows.holes, width=1060, height=340,
    )  # fmt: skip
    return figure("Loss", words, draw(plot), legend=legend, is_wide=True)


def curves_of(
    seen: Seen, column: str, name: str, colour: int, *, is_dashed: bool = False
) -> tuple[list[Curve], str]:
    """A column as a line, or as a faint line under its running median; and a line that says which."""
    steps, values = seen.rows.steps, seen.rows.columns[column]
    lines = pieces(zip(steps, values, strict=True), seen.rows.holes)
    if not lines:
        return [], "nothing was logged yet"
    if len(steps) < _SMOOTH_FROM:
        every = "of each logged step"
        return [Curve(pieces=lines, name=name, colour=colour, is_dashed=is_dashed)], every
    window = max(5, len(steps) // 60) | 1
    middles = [smooth(line, window) for line in lines]
    middle = f"{name}, median of {window} rows"
    return [
        Curve(pieces=lines, name=name, colour=colour, kind="faint"),
        Curve(pieces=middles, name=middle, colour=colour, is_dashed=is_dashed),
    ], f"thin: each logged step; bold: median of {window} rows"


def step_axis(several: Sequence[Seen]) -> Axis:
    """From the first step to the last of all; from 0 unless they begin far from it."""
    steps = [step for seen in several for step in (*seen.rows.steps[:1], *seen.rows.steps[-1:])]
    steps += [step for seen in several for step, _ in seen.evals]
    first, last = min(steps, default=0), max(steps, default=1)
    low = 0 if first <= 0.5 * last else first
    return Axis(low=low, high=max(last + 0.01 * (last - low), low + 1))


def speed_figures(seen: Seen) -> Iterator[str]:
    """Tokens per second, learning rate and gradient norm."""
    if not seen.rows.steps:
        return
    speeds = [value for value in seen.rows.columns["tokens_per_s"] if math.isfinite(value)]
    median = (
        [Level(y=statistics.median(speeds), words=f"median {statistics.median(speeds):,.0f}")]
        if speeds
        else []
    )
    yield _column(seen, "tokens_per_s", "Speed", "tokens/s, all ranks", 2, from_zero=True, levels=median)
    yield _column(seen, "learning_rate", "Learning rate", "learning rate", 3, from_zero=True)
    norms = [value for value in seen.rows.columns["grad_norm"] if math.isfinite(value) and value > 0]
    is_log = bool(norms) and max(norms) > 30 * min(norms)
    clip = seen.plan.recipe.train.max_grad_norm
    levels = [Level(y=clip, words=f"clipped above {clip:g}")] if norms and clip and max(norms) > clip else []
    yield _column(seen, "grad_norm", "Gradient norm", "norm before clipping", 4, is_log=is_log, levels=levels)


def _column(
    seen: Seen, column: str, title: str, y_title: str, colour: int,
    *, from_zero: bool = False, is_log: bool = False, levels: Sequence[Level] = (),
) -> str:  # fmt: skip
    values = seen.rows.columns[column]
    curves, words = curves_of(seen, column, title.lower(), colour)
    kept = without_spikes(values) if not is_log else list(values)
    plot = Plot(
        label=f"{title} by step", x_axis=step_axis([seen]), y_axis=fit_axis(kept, from_zero=from_zero, is_log=is_log),
        x_title=STEP, y_title=y_title + (" (by decades)" if is_log else ""), curves=curves, marks=_marks(seen),
        levels=levels, holes=seen.rows.holes,
    )  # fmt: skip
    return figure(title, words, draw(plot))


def memory_figures(seen: Seen) -> Iterator[str]:
    """The forecast in its terms beside what was measured; and the peak as it grew."""
    forecast = seen.plan.forecast
    yield figure("Memory: forecast and measured", "of the fullest rank", _memory_bars(seen))
    values = seen.rows.columns["peak_mem_bytes"]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return
    capacity = forecast.capacity_bytes
    levels = [Level(y=float(forecast.total_bytes), words=f"forecast {size(forecast.total_bytes)}")]
    if capacity is not None and capacity < 4 * max(*finite, forecast.total_bytes):
        levels.append(Level(y=float(capacity), words=f"full at {size(capacity)}", tone="bad"))
    axis = fit_axis([*finite, *(level.y for level in levels)], from_zero=True)
    unit, unit_name = (2.0**30, "GiB") if axis.high >= 2**28 else (2.0**20, "MiB")
    plot = Plot(
        label="peak memory by step", x_axis=step_axis([seen]), y_axis=Axis(low=0.0, high=axis.high / unit),
        x_title=STEP, y_title=f"{unit_name}, highest so far in this start",
        curves=[
            Curve(
                pieces=[[(x, y / unit) for x, y in line] for line in _lines(seen, "peak_mem_bytes")],
                name="peak memory", colour=5,
            )
        ],
        levels=[Level(y=level.y / unit, words=level.words, tone=level.tone) for level in levels],
        marks=_marks(seen), holes=seen.rows.holes,
    )  # fmt: skip
    where = "resident" if seen.plan.world.device == "cpu" else "reserved on the GPU"
    yield figure("Memory by step", f"{where}, of rank 0", draw(plot))


def _memory_bars(seen: Seen) -> str:
    forecast = seen.plan.forecast
    terms = sorted(forecast.terms, key=lambda term: -term.num_bytes)
    parts = [(term.name, float(term.num_bytes), i) for i, term in enumerate(terms[:_NUM_TERMS])]
    rest = sum(term.num_bytes for term in terms[_NUM_TERMS:])
    if rest:
        parts.append((f"{len(terms) - _NUM_TERMS} smaller terms", float(rest), 7))
    largest = ", ".join(f"{term.name} {size(term.num_bytes)}" for term in terms[:2])
    bars = [Bar(name="forecast", parts=parts, words=f"{size(forecast.total_bytes)}: {largest}")]
    events = seen.events_of("memory")
    measured = events[-1].number("measured") if events else None
    if measured is not None:
        told = events[-1].number("forecast")
        off = (
            "" if not told or not measured else f" (the forecast is {100 * (told / measured - 1):+.1f} % off)"
        )
        bars.append(Bar(name="measured", parts=[("measured", measured, 5)], words=f"{size(measured)}{off}"))
        for key, name in (("allocated", "in tensors"), ("host", "on the host")):
            value, planned = events[-1].number(key), events[-1].number(f"{key}_forecast")
            if value is not None:
                words = f"{size(value)} measured, {size(planned)} forecast"
                bars.append(Bar(name=name, parts=[(name, value, 5)], words=words))
    else:
        rows = [value for value in seen.rows.columns["peak_mem_bytes"] if math.isfinite(value)]
        if rows:
            last = seen.incarnations[-1].outcome if seen.incarnations else None
            missing = (
                "the run has not measured its peak yet"
                if last is None
                else "the run ended before it told its peak"
            )
            words = f"{size(max(rows))}, of rank 0's rows: {missing}"
            bars.append(Bar(name="so far", parts=[("so far", max(rows), 5)], words=words))
    return draw_memory(bars, forecast.capacity_bytes)


def save_figure(seen: Seen) -> str:
    """How long each save took, and how long training stood still for it."""
    saves = [event for event in seen.events_of("save") if event.step is not None]
    took = [(float(e.step or 0), value) for e in saves if (value := e.number("save_s")) is not None]
    paused = [(float(e.step or 0), value) for e in saves if (value := e.number("stall_s")) is not None]
    if not took and not paused:
        return ""
    times = [value for value in seen.rows.columns["step_s"] if math.isfinite(value)]
    levels = []
    if times:
        median = statistics.median(times)
        levels.append(Level(y=median, words=f"a step, median {duration(median)}"))
    values = [y for _, y in (*took, *paused)] + [level.y for level in levels]
    positive = [value for value in values if value > 0]
    is_log = bool(positive) and max(positive) > 8 * min(positive)
    curves = [Curve(pieces=[took], name="save, begin to rename", kind="dots", colour=6)]
    legend = [("save, begin to rename", 6)]
    if paused:
        curves.append(Curve(pieces=[paused], name="pause of training", kind="dots", colour=1))
        legend.append(("pause of training", 1))
    x_axis = step_axis([seen])
    last = max(x for x, _ in (*took, *paused))
    plot = Plot(
        label="seconds of each save", x_axis=Axis(low=min(x_axis.low, last), high=max(x_axis.high, last + 1)),
        y_axis=fit_axis(values, from_zero=not is_log, is_log=is_log), x_title=STEP,
        y_title="time" + (" (by decades)" if is_log else ""), curves=curves, marks=_marks(seen), levels=levels,
        y_words=_durations,
    )  # fmt: skip
    sizes = [value for event in saves if (value := event.number("bytes")) is not None]
    words = counted(len(saves), "save") + (f", {size(statistics.median(sizes))} each" if sizes else "")
    return figure("Saves", words, draw(plot), legend=legend)


def _durations(ticks: Sequence[float]) -> list[str]:
    """Of round values: `50 ms`, `2 s`, `5 min`."""
    long = [
        duration(tick) if tick >= 120 else f"{tick:g} s" if tick >= 1 else f"{1000 * tick:g} ms"
        for tick in ticks
    ]
    return [word if tick else "0" for word, tick in zip(long, ticks, strict=True)]


def _lines(seen: Seen, column: str) -> list[list[Point]]:
    steps = seen.rows.steps
    return pieces(zip(steps, seen.rows.columns[column], strict=True), seen.rows.holes)


def _marks(seen: Seen) -> list[Mark]:
    """Restarts where they took up again, failures where they struck."""
    marks: list[Mark] = []
    begun: dict[int, list[int]] = {}
    for this in seen.incarnations[1:]:
        begun.setdefault(this.from_step, []).append(this.number)
    for step, numbers in begun.items():
        which = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        marks.append(Mark(x=step, words=f"start {which}", tone="wait"))
    for this in seen.incarnations:
        if this.outcome is not None and this.outcome.result in ("failed", "user_error"):
            step = max(this.outcome.step, this.from_step)
            marks.append(Mark(x=step, words="failed", tone="bad"))
    return marks
