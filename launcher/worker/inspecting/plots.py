"""Which pictures show the statistics over depth? PNG and SVG, through matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from decompft.launcher.errors import UserError
from decompft.launcher.worker.inspecting.adapter import AdapterRow
from decompft.launcher.worker.inspecting.by_kind import Row, by_kind, profile
from decompft.launcher.worker.inspecting.weights import WeightRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL_INCHES = (5.5, 3.2)
Panels = Mapping[str, Callable[[Row], float | None]]  # title -> what is drawn

_WEIGHTS: Panels[WeightRow] = {
    "standard deviation": lambda row: row.distribution.std,
    "excess kurtosis": lambda row: row.distribution.kurtosis,
    "singular values above the edge of noise": lambda row: row.spectrum.num_above_edge,
    "stable rank": lambda row: row.spectrum.stable_rank,
}
_CHANGE: Panels[WeightRow] = {
    "std(dW)": lambda row: row.comparison.delta_std if row.comparison else None,
    "growth of the largest singular value": lambda row: (
        row.comparison.growth[0] - 1 if row.comparison and row.comparison.growth else None
    ),
}
_ADAPTER: Panels[AdapterRow] = {
    "std of the low-rank part": lambda row: row.product.std if row.product else None,
    "norm of the low-rank part": lambda row: row.product.norm if row.product else None,
    "effective rank of the low-rank part": lambda row: row.product.effective_rank if row.product else None,
    "mean scale of W's rows": lambda row: row.row_scale.mean if row.row_scale else None,
    "mean scale of W's columns": lambda row: row.column_scale.mean if row.column_scale else None,
}


def require_matplotlib() -> None:
    """Say so before the work, not after it.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401  0.3 s, and an extra of the package
    except ImportError as error:
        raise UserError(
            "--out: plots need matplotlib, which is not installed",
            "pip install 'decompft[plot]'; without --out, --json prints the numbers",
        ) from error


def plot_weights(rows: Sequence[WeightRow], stem: Path) -> None:
    """Write stem.png and stem.svg."""
    is_compared = any(row.comparison is not None for row in rows)
    _draw({**_WEIGHTS, **_CHANGE} if is_compared else _WEIGHTS, rows, stem)


def plot_adapter(rows: Sequence[AdapterRow], stem: Path) -> None:
    """Write stem.png and stem.svg; panels that no layer has a number for are left out."""
    _draw({t: f for t, f in _ADAPTER.items() if any(f(row) is not None for row in rows)}, rows, stem)


def _draw(panels: Panels[Row], rows: Sequence[Row], stem: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # no pyplot: no window system, no state

    height = -(-len(panels) // 2)
    figure = Figure(figsize=(2 * _PANEL_INCHES[0], height * _PANEL_INCHES[1]), layout="constrained")
    grid = figure.subplots(height, 2, squeeze=False).flat
    for (title, number), axes in zip(panels.items(), grid, strict=False):
        _panel(axes, title, number, rows)
    for axes in list(grid)[len(panels) :]:
        axes.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(stem.with_suffix(".png"), dpi=120)
    with rc_context({"svg.hashsalt": "decompft"}):  # same numbers, same bytes
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def _panel(axes: Axes, title: str, number: Callable[[Row], float | None], rows: Sequence[Row]) -> None:
    from matplotlib.ticker import MaxNLocator

    for kind, group in by_kind(rows).items():
        line = profile(group, number)
        axes.plot(line.depths, line.values, marker=".", linewidth=1, label=kind)
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
