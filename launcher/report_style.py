"""The frame of a report's page: one file, no scripts, nothing fetched, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from decompft.launcher.report_text import text


def page(title: str, body: Iterable[str]) -> str:
    """The whole document; well formed as XML, too, so that a plain parser can check it."""
    return (
        '<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en">\n<head>\n'
        '<meta charset="utf-8"/>\n'
        # whatever the text of a run tries: nothing is fetched, nothing is executed
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\"/>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{text(title)}</title>\n<style>{_css()}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def figure(
    title: str, what: str, svg: str, *, legend: Sequence[tuple[str, int]] = (), is_wide: bool = False
) -> str:
    """A plot under its title.

    Args:
        what: a line that says what is shown; "" for none.
        legend: (name, colour) of each curve, where there are several.
    """
    keys = "".join(
        f'<span class="key"><i class="c{colour % 8}"></i>{text(name)}</span>' for name, colour in legend
    )
    line = f'<span class="what">{text(what)}</span>' if what else ""
    kind = ' class="across"' if is_wide else ""
    return f"<figure{kind}><figcaption><b>{text(title)}</b>{line}{keys}</figcaption>{svg}</figure>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[int] = ()) -> str:
    """A table; the columns in `numbers` are set to the right."""
    kinds = [' class="num"' if index in numbers else "" for index in range(len(head))]
    top = "".join(f"<th{kind}>{text(cell)}</th>" for kind, cell in zip(kinds, head, strict=True))
    lines = [
        "<tr>"
        + "".join(f"<td{kind}>{text(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    ]
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and values, one pair a line."""
    lines = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in pairs)
    return f'<div class="scroll"><table class="facts"><tbody>{lines}</tbody></table></div>'


def folded(title: str, content: str) -> str:
    """What is there for those who ask."""
    return f"<details><summary>{text(title)}</summary>{content}</details>"


_COLOURS = {
    # light and dark: curves c0 to c7
    "c0": ("#1d63d8", "#6aa5ff"),
    "c1": ("#d0660a", "#ff9f4a"),
    "c2": ("#11805a", "#3ccf98"),
    "c3": ("#7a3fd1", "#b791ff"),
    "c4": ("#0e7c95", "#45c8e6"),
    "c5": ("#b8327f", "#ff7fc0"),
    "c6": ("#7d6608", "#dcc04a"),
    "c7": ("#5b6776", "#a3afbf"),
    "paper": ("#ffffff", "#14171c"),
    "card": ("#f6f7f9", "#1d2129"),
    "ink": ("#1b2028", "#e6e9ee"),
    "dim": ("#5d6673", "#9aa5b4"),
    "line": ("#dfe3e8", "#343b46"),
    "good": ("#0c7a43", "#43c983"),
    "wait": ("#9a6200", "#e8ae3a"),
    "bad": ("#c2212e", "#ff6b70"),
    "plain": ("#76808e", "#8e99a8"),
}


def _css() -> str:
    light = ";".join(f"--{name}:{pair[0]}" for name, pair in _COLOURS.items())
    dark = ";".join(f"--{name}:{pair[1]}" for name, pair in _COLOURS.items())
    curves = "".join(f".c{i}{{color:var(--c{i})}}" for i in range(8))
    tones = "".join(f".{tone}{{color:var(--{tone})}}" for tone in ("good", "wait", "bad", "plain"))
    return (
        f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
        f"{curves}{tones}{_RULES}"
    )


_RULES = """
body{margin:0 auto;padding:20px 22px 60px;max-width:1120px;background:var(--paper);color:var(--ink);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:24px;margin:0 0 2px;overflow-wrap:anywhere}h2{font-size:18px;margin:30px 0 8px}
p{margin:4px 0}.sub{color:var(--dim);overflow-wrap:anywhere}
.verdict{margin:14px 0;padding:10px 14px;border-left:6px solid currentColor;background:var(--card);
border-radius:4px;font-weight:600;overflow-wrap:anywhere}.verdict span{color:var(--ink);font-weight:400}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(135px,1fr));gap:10px;margin:14px 0}
.cards div{background:var(--card);border-radius:6px;padding:9px 12px}
.cards small{display:block;color:var(--dim);font-size:12.5px}.cards b{font-size:18px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:14px}
figure{margin:0;padding:10px 12px 6px;background:var(--card);border-radius:6px;min-width:0;overflow-x:auto}
.across{grid-column:1/-1}figcaption{font-size:13.5px;margin-bottom:2px}
.what{color:var(--dim);margin-left:8px}.key{margin-left:12px;white-space:nowrap}
.key i{display:inline-block;width:11px;height:11px;border-radius:2px;background:currentColor;margin-right:5px}
svg{display:block;width:100%;height:auto;font-size:12px}svg.half{min-width:400px}svg.wide{min-width:680px}

svg text{fill:var(--dim);paint-order:stroke;stroke:var(--card);stroke-width:3px}
svg text.title{fill:var(--ink)}svg .end{text-anchor:end}svg .mid{text-anchor:middle}
svg text.bad,svg text.good,svg text.wait{fill:currentColor}
svg text.on{fill:var(--paper);font-weight:600;stroke:none}
.grid{stroke:var(--line);fill:none}.axis{stroke:var(--dim);fill:none}
.line,.faint{stroke:currentColor;fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.faint{stroke-width:1;opacity:.42}.dash{stroke-dasharray:6 4}.above{fill:currentColor}
.many{stroke:currentColor;stroke-width:5;stroke-linecap:round;fill:none}
.dot{fill:currentColor;stroke:var(--card);stroke-width:1.5}.bar{fill:currentColor;stroke:var(--card)}
.span,.instants{fill:currentColor}.hole{fill:var(--plain);opacity:.18}
.mark{stroke:currentColor;stroke-dasharray:3 3;fill:none}.mark.bad{stroke-dasharray:none;stroke-width:2}
.level{stroke:currentColor;stroke-dasharray:8 4;stroke-width:1.5;fill:none}
table{border-collapse:collapse;font-size:13.5px}.scroll{overflow-x:auto}
th{text-align:left;font-weight:600;color:var(--dim)}th,td{padding:4px 14px 4px 0;vertical-align:top;
border-bottom:1px solid var(--line)}td{overflow-wrap:break-word;max-width:60em;white-space:pre-wrap}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}.facts th{white-space:nowrap;width:1%}
.failure{border:2px solid var(--bad);border-radius:6px;padding:4px 14px 12px;margin:14px 0}
.failure h2{margin:8px 0;color:var(--bad)}
pre{background:var(--card);padding:10px;border-radius:6px;overflow-x:auto;font-size:12.5px;white-space:pre-wrap;
overflow-wrap:anywhere;margin:8px 0}details{margin:10px 0}summary{cursor:pointer;color:var(--dim)}
footer{margin-top:34px;color:var(--dim);font-size:12.5px}
"""
