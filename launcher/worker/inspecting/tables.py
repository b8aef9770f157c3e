"""How are statistics shown on a terminal: one line a kind of layer, or one a layer?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeVar

from rich.box import SIMPLE_HEAD
from rich.table import Table

from decompft.launcher.worker.inspecting.adapter import AdapterRow, Values, std_profile
from decompft.launcher.worker.inspecting.by_kind import Profile, by_kind, extreme, profile, typical
from decompft.launcher.worker.inspecting.weights import WeightRow

Row = TypeVar("Row", WeightRow, AdapterRow)
Columns = dict[str, Callable[[list[Row]], str]]  # heading -> cell of a group of rows

_ENTRIES: Columns[WeightRow] = {
    "n": lambda rows: str(len(rows)),
    "std": lambda rows: _text(typical(r.distribution.std for r in rows)),
    "over depth": lambda rows: _percent(profile(rows, lambda r: r.distribution.std).slope_share),
    "kurtosis": lambda rows: _text(typical(r.distribution.kurtosis for r in rows)),
    "> 6 sigma": lambda rows: _text(typical(r.distribution.beyond_6_sigma for r in rows)),
    "zeros": lambda rows: _text(typical(r.distribution.zeros for r in rows)),
    "KS": lambda rows: _text(typical(r.distribution.ks for r in rows)),
    "QQ": lambda rows: _text(typical(r.distribution.qq_slope_center for r in rows)),
    "shape": lambda rows: _labels(rows),
}
_SPECTRA: Columns[WeightRow] = {
    "lag-1 row": lambda rows: _text(extreme(r.whiteness.row_autocorrelation for r in rows if r.whiteness)),
    "lag-1 col": lambda rows: _text(extreme(r.whiteness.column_autocorrelation for r in rows if r.whiteness)),
    "blocks": lambda rows: _text(typical(r.whiteness.block_variance for r in rows if r.whiteness)),
    "above edge": lambda rows: _range([r.spectrum.num_above_edge for r in rows]),
    "S1/edge": lambda rows: _text(typical(_over_edge(r) for r in rows)),
    "stable rank": lambda rows: _text(typical(r.spectrum.stable_rank for r in rows)),
    "eff. rank": lambda rows: _text(typical(r.spectrum.effective_rank for r in rows)),
}
_CHANGE: Columns[WeightRow] = {
    "std(dW)": lambda rows: _text(typical(r.comparison.delta_std for r in rows if r.comparison)),
    "/ std(W)": lambda rows: _text(typical(r.comparison.delta_std_ratio for r in rows if r.comparison)),
    "variance": lambda rows: _text(typical(r.comparison.variance_growth for r in rows if r.comparison)),
    "corr(dW,W)": lambda rows: _text(typical(r.comparison.correlation for r in rows if r.comparison)),
    "S1": lambda rows: _percent(typical(_growth(r, 1) for r in rows)),
    "S1..S16": lambda rows: _percent(typical(_growth(r, None) for r in rows)),
    "cos u1": lambda rows: _text(typical(_cosine(r, "u", first=True) for r in rows)),
    "lowest u": lambda rows: _text(typical(_cosine(r, "u", first=False) for r in rows)),
    "lowest v": lambda rows: _text(typical(_cosine(r, "v", first=False) for r in rows)),
}
_PRODUCT: Columns[AdapterRow] = {
    "n": lambda rows: str(len(rows)),
    "norm": lambda rows: _text(typical(r.product.norm for r in rows if r.product)),
    "std": lambda rows: _text(typical(r.product.std for r in rows if r.product)),
    "over depth": lambda rows: _percent(std_profile(rows).slope_share),
    "layer 0": lambda rows: _first(std_profile(rows)),
    "eff. rank": lambda rows: _text(typical(r.product.effective_rank for r in rows if r.product)),
    "stable rank": lambda rows: _text(typical(r.product.stable_rank for r in rows if r.product)),
    "row scale": lambda rows: _span([r.row_scale for r in rows]),
    "column scale": lambda rows: _span([r.column_scale for r in rows]),
}


def weight_tables(rows: Sequence[WeightRow], *, each: bool) -> list[Table]:
    """Entries; noise and spectrum; and the change, where something was compared.

    Args:
        each: a line a layer instead of a line a kind.
    """
    tables = [
        _table(
            "entries", _ENTRIES, rows, each,
            "over depth: growth of std from the first to the last layer, by a line; "
            "QQ: slope of the middle half, 1 for a gaussian",
        ),
        _table(
            "noise and spectrum", _SPECTRA, rows, each,
            "lag-1: correlation of neighbours, the largest in size; blocks: variance of block means, 1 for noise; "
            "above edge: singular values above those of noise",
        ),
    ]  # fmt: skip
    if any(row.comparison is not None for row in rows):
        caption = (
            "variance: std(W + dW)^2 - std(W)^2; S1, S1..S16: growth of the leading singular values; "
            "cos u1: |cos| of the leading output direction, before and after; lowest: of the first 16, by index"
        )
        tables.append(_table("change", _CHANGE, rows, each, caption))
    return tables


def adapter_tables(rows: Sequence[AdapterRow], *, each: bool) -> list[Table]:
    """The low-rank change and the scales of the base, then every trained tensor and buffer."""
    meanings = " or ".join(dict.fromkeys(row.meaning for row in rows if row.meaning is not None))
    about = f"the low-rank part is {meanings}; " if meanings else "no low-rank part; "
    product = _table(
        "change", _PRODUCT, rows, each,
        about + "over depth: growth of std from the first to the last layer, by a line; "
        "layer 0: its std over the median of the others; scale: smallest .. largest factor on W",
    )  # fmt: skip
    columns: Columns[AdapterRow] = {}
    for row in rows:
        for name, found in row.tensors.items():
            columns[f"N({name})" if len(found.shape) > 1 else name] = partial(_of_tensor, name, "tensors")
        for name in row.buffers:
            columns[f"{name}, kept"] = partial(_of_tensor, name, "buffers")
    return [
        product,
        _table(
            "tensors",
            columns,
            rows,
            each,
            "N: Frobenius norm; of a scalar or a vector the mean; kept: in the file, not trained",
        ),
    ]


def _table(title: str, columns: Columns[Row], rows: Sequence[Row], each: bool, caption: str) -> Table:
    table = Table(
        title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False
    )
    table.caption = caption if each else f"medians over the layers of a kind; {caption}"
    groups = {row.name: [row] for row in rows} if each else by_kind(rows)
    cells = {heading: [cell(group) for group in groups.values()] for heading, cell in columns.items()}
    known = {heading: column for heading, column in cells.items() if any(cell != "-" for cell in column)}
    table.add_column("layer" if each else "kind", overflow="fold", no_wrap=not each)
    for heading in known:  # folded: a number that is cut off would be another number
        table.add_column(heading, justify="right", overflow="fold")
    names = list(groups) if each else _short_names(list(groups))
    for name, *row in zip(names, *known.values(), strict=True):
        table.add_row(name, *row)
    return table


def _short_names(kinds: list[str]) -> list[str]:
    """The last components, where they tell the kinds apart."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    return last if len(set(last)) == len(last) else kinds


# -- cells --


def _text(number: float | None) -> str:
    """Three digits that matter."""
    if number is None:
        return "-"
    size = abs(number)
    if number == 0 or 1e-2 <= size < 1e5:
        return f"{number:.3g}" if size < 1e3 else f"{number:.0f}"
    return f"{number:.0e}" if size < 1e-5 else f"{number:.1e}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:+.1%}"


def _range(numbers: Sequence[float]) -> str:
    low, high = _text(min(numbers)), _text(max(numbers))
    return low if low == high else f"{low}..{high}"


def _labels(rows: Sequence[WeightRow]) -> str:
    counts = Counter(row.distribution.label or "constant" for row in rows)
    if len(rows) == 1 or len(counts) == 1:
        return next(iter(counts))
    return "\n".join(f"{label} {count}" for label, count in counts.most_common())


def _over_edge(row: WeightRow) -> float | None:
    """The largest singular value over noise's."""
    return row.spectrum.top[0] / row.spectrum.edge if row.spectrum.edge else None


def _growth(row: WeightRow, num: int | None) -> float | None:
    """Mean growth of the first `num` singular values, all that are kept for None."""
    values = row.comparison.growth[:num] if row.comparison else ()
    return sum(values) / len(values) - 1 if values else None


def _cosine(row: WeightRow, side: Literal["u", "v"], *, first: bool) -> float | None:
    if row.comparison is None or not row.comparison.left_cosines:
        return None
    cosines = row.comparison.left_cosines if side == "u" else row.comparison.right_cosines
    return cosines[0] if first else min(cosines)


def _first(found: Profile) -> str:
    if found.first_over_median is None:
        return "-"
    return f"{found.first_over_median:.2f} x" + (" spike" if found.spike_at_first else "")


def _span(found: Sequence[Values | None]) -> str:
    known = [values for values in found if values is not None]
    if not known:
        return "-"
    low, high = f"{min(v.min for v in known):.4g}", f"{max(v.max for v in known):.4g}"
    return low if low == high else f"{low}..{high}"


def _of_tensor(name: str, group: Literal["tensors", "buffers"], rows: Sequence[AdapterRow]) -> str:
    found = [v for row in rows if (v := getattr(row, group).get(name)) is not None]
    return _text(typical(v.norm if len(v.shape) > 1 else v.mean for v in found))
