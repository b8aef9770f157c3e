"""The page of one run: what it is, how it stands, its plots, its failure, and the tables behind them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from decompft.launcher.report_bars import Lane, Span, draw_timeline
from decompft.launcher.report_curves import loss_figure, memory_figures, save_figure, speed_figures
from decompft.launcher.report_data import Event, Incarnation, Seen
from decompft.launcher.report_plots import Tone
from decompft.launcher.report_style import facts, figure, folded, page, table
from decompft.launcher.report_text import counted, duration, moment, number, size, text
from decompft.launcher.report_verdict import Failure, Verdict, Word, explain_failure, judge

TONES: dict[Word, Tone] = {
    "finished": "good", "checkpointed": "wait", "failed": "bad", "running": "plain", "silent": "bad",
    "not started": "plain",
}  # fmt: skip
_RESULTS: dict[str, Tone] = {"finished": "good", "checkpointed": "wait", "failed": "bad", "user_error": "bad"}
_MAX_ROWS = 60  # of a table


def render(seen: Seen) -> str:
    """The HTML of one run."""
    return page(f"{seen.plan.name}: run report", _body(seen))


def headline(seen: Seen) -> str:
    """What the run is, in a line."""
    plan = seen.plan
    recipe, world = plan.recipe, plan.world
    config = recipe.model.config or {}
    model = recipe.model.id or f"{config.get('model_type', 'a model')} from its config"
    base = "dense" if recipe.quantization.format == "none" else recipe.quantization.format
    rank = "" if recipe.adapter.rank is None else f", rank {recipe.adapter.rank}"
    kind = "CPU process" if world.device == "cpu" else "GPU"
    ranks = (
        f"{world.size} {kind}{'s' if world.size > 1 and kind == 'GPU' else 'es' if world.size > 1 else ''}"
    )
    nodes = f" on {world.nodes} nodes" if world.nodes > 1 else ""
    trained = plan.num_adapter_params + plan.num_module_params
    return (
        f"{model} ({_count(plan.num_base_params)} parameters), {base} base, "
        f"{recipe.adapter.method}{rank} ({_count(trained)} trained), {plan.strategy} on {ranks}{nodes}"
    )


def median_speed(seen: Seen) -> float | None:
    """Median tokens/s of the logged steps."""
    speeds = [value for value in seen.rows.columns["tokens_per_s"] if math.isfinite(value)]
    return statistics.median(speeds) if speeds else None


def peak_memory(seen: Seen) -> tuple[float | None, str]:
    """Bytes of the fullest rank, and where the number is from; without a `memory` event, of the rows so far."""
    told = [event.number("measured") for event in seen.events_of("memory")]
    measured = [value for value in told if value is not None]
    if measured:
        return max(measured), "measured"
    rows = [value for value in seen.rows.columns["peak_mem_bytes"] if math.isfinite(value)]
    return (max(rows), "of rank 0, so far") if rows else (None, "not measured yet")


def last_loss(seen: Seen) -> float | None:
    """The loss of the last logged step; None without one, or when it is not finite."""
    return seen.rows.columns["loss"][-1] if seen.rows.steps else None


def best_eval(seen: Seen) -> tuple[int, float] | None:
    """(step, loss) of the lowest evaluation that the run kept."""
    return min(seen.evals, key=lambda pair: pair[1], default=None)


def _body(seen: Seen) -> Iterator[str]:
    verdict = judge(seen)
    failure = explain_failure(seen) if verdict.word == "failed" else None
    yield f"<header><h1>{text(seen.plan.name)}</h1>"
    yield f'<p class="sub">{text(headline(seen))}</p>'
    yield f'<p class="sub">{text(seen.run.path.absolute())}</p></header>'
    yield f'<div class="verdict {TONES[verdict.word]}">{text(verdict.word)} <span>{text(verdict.line)}</span></div>'
    if failure is not None:
        yield _failure(failure)
    yield _cards(seen, verdict)
    yield '<section class="plots">'
    if seen.rows.steps or seen.evals:
        yield loss_figure(seen)
    else:
        yield figure("Loss", "no step was logged yet", "", is_wide=True)
    yield _timeline(seen)
    yield from speed_figures(seen)
    yield from memory_figures(seen)
    yield save_figure(seen)
    yield "</section>"
    yield from _tables(seen)
    skipped = seen.rows.num_unreadable
    note = f"; {skipped:,} lines of metrics.jsonl could not be read" if skipped else ""
    yield f"<footer>made by decompft report, {moment(seen.now_s)}{note}</footer>"


def _failure(failure: Failure) -> str:
    texts = "".join(folded(title, f"<pre>{text(content)}</pre>") for title, content in failure.texts)
    return f'<section class="failure"><h2>Failure</h2>{facts(failure.facts)}{texts}</section>'


def _cards(seen: Seen, verdict: Verdict) -> str:
    best, speed = best_eval(seen), median_speed(seen)
    peak, origin = peak_memory(seen)
    forecast = seen.plan.forecast.total_bytes
    off = f", {100 * (forecast / peak - 1):+.0f} %" if peak and origin == "measured" else ""
    stalls = [value for event in seen.events_of("save") if (value := event.number("stall_s")) is not None]
    first = next((loss for step, loss in seen.evals if step == 0), None)
    cards = [
        ("steps", verdict.total.beside(seen.step).removeprefix("step "), ""),
        ("loss of the last step", number(last_loss(seen), 5), ""),
        ("best evaluation", *(("-", "") if best is None else (number(best[1], 5), _eval_words(best, first)))),
        ("speed, median", "-" if speed is None else f"{number(speed)} tok/s", ""),
        (f"peak memory, {origin}", size(peak), f"forecast {size(forecast)}{off}"),
        ("time running", duration(_busy_s(seen)), _starts(seen)),
        ("pause of a save, median", duration(statistics.median(stalls) if stalls else None), ""),
        ("to the first step", *_startup(seen)),
    ]
    cells = (
        f"<div><small>{text(a)}</small><b>{text(b)}</b><small>{text(c)}</small></div>" for a, b, c in cards
    )
    return f'<section class="cards">{"".join(cells)}</section>'


def _startup(seen: Seen) -> tuple[str, str]:
    """How long the newest start took to its first step, and its three longest phases."""
    events = seen.events_of("startup")
    if not events:
        return "-", ""
    told = events[-1].details.get("phases")
    phases = told.items() if isinstance(told, dict) else ()
    known = [(name, s) for name, s in phases if isinstance(s, int | float) and math.isfinite(s) and s > 0]
    longest = sorted(known, key=lambda pair: -pair[1])[:3]
    return duration(events[-1].number("seconds")), ", ".join(f"{name} {duration(s)}" for name, s in longest)


def _eval_words(best: tuple[int, float], first: float | None) -> str:
    return f"at step {best[0]:,}" + ("" if first is None else f", {number(first, 5)} before training")


def _starts(seen: Seen) -> str:
    num = len(seen.incarnations)
    return counted(num, "start") if num > 1 else ""


def _end_s(seen: Seen, this: Incarnation) -> float | None:
    """When an incarnation ended, or was last heard of."""
    if this.ended or this is not seen.incarnations[-1]:
        return this.last_s
    alive = judge(seen).word == "running" and this.outcome is None
    return (
        seen.now_s
        if alive
        else max((t for t in (this.last_s, seen.written_s) if t is not None), default=None)
    )


def _busy_s(seen: Seen) -> float | None:
    spans = [
        end - this.began_s
        for this in seen.incarnations
        if this.began_s is not None and (end := _end_s(seen, this)) is not None
    ]
    return sum(max(span, 0.0) for span in spans) if spans else None


def _timeline(seen: Seen) -> str:
    lanes = [Lane(name="running", spans=[span for this in seen.incarnations for span in _span(seen, this)])]
    if not lanes[0].spans:
        return ""
    wanted: tuple[tuple[str, str, Tone], ...] = (
        ("load", "loading", "plain"), ("save", "saves", "good"), ("eval", "evaluations", "plain"),
        ("signal", "signals", "wait"), ("hang", "hangs", "bad"), ("failure", "failures", "bad"),
    )  # fmt: skip
    for name, lane, tone in wanted:
        events = seen.events_of(name)
        if events:
            lanes.append(Lane(name=lane, spans=[_moment(event, tone) for event in events]))
    began = lanes[0].spans[0].begin_s
    return figure("What happened when", f"first start {moment(began)}", draw_timeline(lanes), is_wide=True)


def _span(seen: Seen, this: Incarnation) -> Iterator[Span]:
    end = _end_s(seen, this)
    if this.began_s is None or end is None:
        return
    result = _result(this, seen)
    words = f"start {this.number}: from step {this.from_step:,}, {result}, {duration(end - this.began_s)}"
    tone = _RESULTS.get(this.outcome.result if this.outcome else "", "plain")
    yield Span(begin_s=this.began_s, end_s=max(end, this.began_s), words=words, tone=tone,
               label=f"{this.number}: {result}")  # fmt: skip


def _moment(event: Event, tone: Tone) -> Span:
    """An event's line comes when it is over; those that say how long they took are drawn as long."""
    took = event.number("save_s") if event.name == "save" else event.number("seconds")
    at = "" if event.step is None else f" at step {event.step:,}"
    words = f"{event.name}{at}: {_details(event)}"
    if event.name == "save" and event.details.get("reason") not in (None, "interval", "end", "stop"):
        tone = "bad"  # because something went wrong
    return Span(
        begin_s=event.time_s - min(took or 0.0, 1e6), end_s=event.time_s, words=words[:300], tone=tone
    )


def _result(this: Incarnation, seen: Seen) -> str:
    if this.outcome is not None:
        return this.outcome.result.replace("_", " ")
    return judge(seen).word if this is seen.incarnations[-1] else "no outcome"


def _tables(seen: Seen) -> Iterator[str]:
    if seen.incarnations:
        yield "<h2>Starts</h2>"
        head = ("start", "began", "took", "ranks", "from step", "to step", "trained again", "ended")
        rows = list(_start_rows(seen))
        yield _cut(head, rows, numbers=(0, 3, 4, 5, 6))
    saves = seen.events_of("save")
    if saves:
        yield "<h2>Saves</h2>"
        columns = ("step", "reason", "bytes", "took", "training paused", "at")
        yield _cut(columns, [_save_row(event) for event in saves], numbers=(0, 2, 3, 4))
    plan = seen.plan
    asked = [
        ("strategy", plan.strategy_reason),
        ("batch", f"{plan.batch.global_size} rows = {plan.batch.micro_size} x {plan.batch.accumulation} "
                  f"accumulated x {plan.world.size} ranks, up to {plan.batch.tokens_per_step:,} tokens"),
        ("learning rate", f"{number(plan.recipe.train.learning_rate)}, {plan.recipe.train.schedule}"),
        ("checkpoint", f"{size(plan.checkpoint_bytes)} each by the plan"),
        *((f"{name} version", version) for name, version in sorted(seen.packages.items())),
        *(("warning", warning) for warning in plan.warnings),
    ]  # fmt: skip
    yield folded("what was decided, and on which versions", facts(asked))
    events = seen.events[-200:]
    lines = [(moment(e.time_s), e.incarnation, "" if e.step is None else f"{e.step:,}", e.name, _details(e))
             for e in events]  # fmt: skip
    if lines:
        shown = f"events, the last {len(lines)}" if len(seen.events) > len(lines) else "events"
        yield folded(shown, table(("time", "start", "step", "event", "details"), lines, numbers=(1, 2)))


def _start_rows(seen: Seen) -> Iterator[Sequence[str]]:
    for index, this in enumerate(seen.incarnations):
        following = seen.incarnations[index + 1] if index + 1 < len(seen.incarnations) else None
        reached = max(this.last_step or 0, this.outcome.step if this.outcome else 0, this.from_step)
        if following is None:
            reached = max(reached, seen.step)
        again = 0 if following is None else max(reached - following.from_step, 0)
        end = _end_s(seen, this)
        took = None if end is None or this.began_s is None else end - this.began_s
        ranks = "-" if this.world_size is None else f"{this.world_size:,}"
        said = (
            "" if this.outcome is None or this.outcome.result == "finished" else f": {this.outcome.message}"
        )
        yield (
            str(this.number), moment(this.began_s), duration(took), ranks, f"{this.from_step:,}", f"{reached:,}",
            f"{again:,}" if again else "-", f"{_result(this, seen)}{said}"[:300],
        )  # fmt: skip


def _save_row(event: Event) -> Sequence[str]:
    step = "-" if event.step is None else f"{event.step:,}"
    reason = str(event.details.get("reason", "-"))
    took, stall = duration(event.number("save_s")), duration(event.number("stall_s"))
    return step, reason, size(event.number("bytes")), took, stall, moment(event.time_s)


def _cut(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int]) -> str:
    """The newest rows; older ones are only counted."""
    left = len(rows) - _MAX_ROWS
    note = f'<p class="sub">the last {_MAX_ROWS} of {len(rows):,}</p>' if left > 0 else ""
    return note + table(head, rows[-_MAX_ROWS:], numbers=numbers)


def _details(event: Event) -> str:
    shown = (
        f"{key}={_short(value)}" for key, value in sorted(event.details.items()) if value not in (None, "")
    )
    return " ".join(shown)[:600]


def _short(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)[:300]


def _count(num: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if num >= unit:
            return f"{num / unit:.1f}{name}"
    return str(num)
