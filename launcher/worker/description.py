"""adapter.json: what someone needs to use an adapter without its recipe."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from decompft.adapters.spec import spec_of, stack_of
from decompft.launcher.plan import Plan
from decompft.launcher.recipe import AdapterSection
from decompft.launcher.worker.prepared import Prepared


def describe(plan: Plan, prepared: Prepared) -> dict[str, Any]:
    """Method, options, targets, the base's identity and the versions; JSON."""
    recipe = plan.recipe
    return {
        **describe_adapter(recipe.adapter),
        "name": plan.name,
        "model": recipe.model.model_dump(mode="json"),
        "quantization": recipe.quantization.model_dump(mode="json"),
        "seed": recipe.train.seed,
        "base": prepared.identity,
        "tokens": [asdict(token) for token in prepared.tokens],
        "data_formats": sorted({s.format for s in recipe.data.train}),
    }


def describe_adapter(section: AdapterSection) -> dict[str, Any]:
    """What depends on no run: method, options, formulas and the versions."""
    return {
        "adapter": {**section.model_dump(mode="json"), "options": asdict(section.typed_options())},
        "formulas": _formulas(section),
        "versions": {name: _version(name) for name in ("decompft", "torch", "transformers", "bitsandbytes")},
    }


def _formulas(section: AdapterSection) -> dict[str, dict[str, Any]]:
    """Method -> its formula, of the methods under others, too. What stands over a reading is one.

    A method whose options choose another formula for some layers has all their titles.
    """
    found: dict[str, dict[str, Any]] = {}
    for config in (section.config(), *(section.config(o) for o in section.overrides if not o.skip)):
        stack = stack_of(config)
        for depth, each in enumerate(stack):
            spec = spec_of(each)
            title = spec.chosen_title(each) or spec.title
            entry = found.setdefault(
                each.method, {"title": title, "source": spec.source, "is_reading": False}
            )
            if title not in entry["title"].split("; "):
                entry["title"] += f"; {title}"
            entry["is_reading"] |= any(spec_of(c).is_reading for c in stack[depth:])
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
