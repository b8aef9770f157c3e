"""`decompft report` believes nothing that a run folder says: markup, odd values, a hundred thousand rows."""

from __future__ import annotations

import json
import random
import time
from html.parser import HTMLParser
from pathlib import Path

from reporting import (
    SVG,
    event,
    finish,
    make_run,
    report,
    row,
    start,
    write_lines,
)
from test_runs import RECIPE, make_plan

from decompft.launcher.outcome import Outcome, write_rank
from decompft.launcher.report_data import COLUMNS
from decompft.launcher.runs import RunDir

HOSTILE = (
    '</title></svg><script>alert(1)</script><img src=x onerror=alert(1)>"\' onload="x\u202e\ud800\x00&amp;'
)


class _Tags(HTMLParser):
    """What a browser would see, which forgives more than XML."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)


def test_everything_from_the_run_is_escaped(tmp_path: Path) -> None:
    plan = make_plan(model={"id": HOSTILE.replace("\ud800", ""), "config": None, "weights": "checkpoint"})
    plan = plan.model_copy(update={"name": HOSTILE.replace("\ud800", ""), "strategy_reason": "<b>x</b>",
                                   "warnings": ("<script>x</script>",)})  # fmt: skip
    run = RunDir.create(tmp_path / "r<script>", recipe_text=RECIPE, plan=plan)
    (run.path / "env.json").write_text(json.dumps({"packages": {HOSTILE: HOSTILE}}))
    write_lines(run.metrics_path, [row(step) for step in range(1, 4)])
    names = ("start", "load", "save", "eval", "signal", "hang", "failure", "memory", "end", HOSTILE)
    hostile = {
        key: HOSTILE for key in ("rank", "node", "cause", "next", "reason", "path", "checkpoint", "signal")
    }
    events = [event(name, n, step=n, stack=[HOSTILE], **hostile) for n, name in enumerate(names)]
    write_lines(run.path / "events.jsonl", events)
    finish(run, Outcome(result="failed", step=3, message=HOSTILE.replace("\ud800", ""), hint="<img/>", node="<i>",
                        cause="<i>", meaning="<i>", evidence="<i>", rank=0))  # fmt: skip
    write_rank(run.incarnation_dir(1), 0, Outcome(result="failed", traceback="</pre><script>"))
    run.rank_log(1, 0).write_bytes(b"\xff\x1b[31m</pre><script>alert(1)</script>\n")
    other = make_run(tmp_path / "other", [row(1)])
    for html, _ in (report(run), report(run, other)):
        seen = _Tags()
        seen.feed(html)
        assert seen.tags & {"script", "img", "b", "title"} == {"b", "title"}
        assert not any(name.startswith("on") for name in seen.attributes)
        assert "\u202e" not in html and "\x1b" not in html
        assert "&lt;script&gt;" in html


def test_the_page_fetches_nothing_and_runs_nothing(tmp_path: Path) -> None:
    html, tree = report(make_run(tmp_path / "r", [row(step) for step in range(1, 11)]))
    seen = _Tags()
    seen.feed(html)
    assert seen.tags & {"script", "link", "img", "iframe", "object", "use", "image"} == set()
    assert seen.attributes & {"src", "href", "xlink:href", "action", "srcset"} == set()
    assert "url(" not in html and "@import" not in html
    policy = [e.get("content") for e in tree.iter(f"{SVG}meta") if e.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "prefers-color-scheme:dark" in html


def test_no_value_breaks_the_page(tmp_path: Path) -> None:
    rng = random.Random(5)
    values = [
        None, True, "x", [], {}, 0, -1, 1, 3, 7, 10**400, 1e308, -1e308, 5e-324, float("nan"), float("inf"), 2.5,
    ]  # fmt: skip
    numbers = ("save_s", "stall_s", "bytes", "measured", "forecast", "allocated", "host", "seconds", "loss")
    keys = (*numbers, "checkpoint", "world_size", "rank", "stack")
    names = ("start", "save", "eval", "memory", "failure", "hang", "load", "end", "signal")
    for number in range(60):
        run = make_run(tmp_path / str(number))
        rows = [{key: rng.choice(values) for key in ("step", *COLUMNS)} for _ in range(30)]
        events = [
            {
                "event": rng.choice(names),
                **{key: rng.choice(values) for key in ("time_s", "step", "incarnation", *keys)},
            }
            for _ in range(30)
        ]
        times = [
            event(rng.choice(names), rng.random(), **{k: rng.choice(values) for k in keys}) for _ in range(30)
        ]
        write_lines(run.metrics_path, rows)
        write_lines(run.path / "events.jsonl", events + times)
        finish(run, Outcome(result="failed"))
        told = {"result": "failed"} | {
            key: rng.choice(values) for key in ("step", "message", "rank", "hint", "cause")
        }
        (run.incarnation_dir(1) / "outcome.json").write_text(rng.choice(("", "[]", json.dumps(told))))
        _, tree = report(run)
        drawn = [e for svg in tree.iter(f"{SVG}svg") for e in svg.iter()]
        assert len(drawn) > 20
        places = [e.get(name, "0") for e in drawn for name in ("d", "x", "y", "cx", "cy", "width", "height")]
        assert [place for place in places if "n" in place] == []  # nan, inf
        assert min(float(e.get("width", 0)) for e in drawn) >= 0


def test_a_hundred_thousand_rows_are_a_small_page(tmp_path: Path) -> None:
    rng = random.Random(0)
    run = make_run(tmp_path / "r")
    line = (
        json.dumps(row(1, loss=0.5)).replace('"step": 1', '"step": %d').replace('"loss": 0.5', '"loss": %f')
    )
    run.metrics_path.write_text("".join(f"{line}\n" % (step, rng.random()) for step in range(1, 100_001)))
    saves = (
        event("save", s, step=s, save_s=rng.random(), stall_s=1e-3, bytes=1) for s in range(50, 100_001, 50)
    )
    write_lines(run.path / "events.jsonl", [start(0, 1), *saves])
    began = time.process_time()
    html, _ = report(run)
    assert len(html.encode()) < 400_000
    assert time.process_time() - began < 20  # 3 s on one core
