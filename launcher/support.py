"""What combines with what, as a table made from the code, so that the README cannot be wrong."""

from __future__ import annotations

from typing import get_args

from decompft.adapters.spec import ADAPTER_SPECS
from decompft.launcher.plan import Strategy
from decompft.launcher.recipe import QuantizationSection, Task


def support_table() -> str:
    """Markdown: a row an adapter, a column each base format, strategy and task."""
    formats = get_args(QuantizationSection.model_fields["format"].annotation)
    strategies, tasks = get_args(Strategy), get_args(Task)
    head = ["adapter", *(f"base: {f}" for f in formats), *strategies, *tasks]
    rows = [head, ["---"] * len(head)]
    for spec in ADAPTER_SPECS.values():
        # an adapter sees its base through one protocol: every format and task works with each
        engines = ["no" if strategy in spec.forbids_engines else "yes" for strategy in strategies]
        rows.append([f"`{spec.name}`", *(["yes"] * len(formats)), *engines, *(["yes"] * len(tasks))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
