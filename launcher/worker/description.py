"""adapter.json: what someone needs to use an adapter without its recipe."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from decompft.adapters.spec import ADAPTER_SPECS, AdapterSpec
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
    methods = dict.fromkeys([section.method, *(o.method for o in section.overrides if o.method)])
    return {
        "adapter": {**section.model_dump(mode="json"), "options": asdict(section.typed_options())},
        "formulas": {name: _formula(ADAPTER_SPECS[name]) for name in methods},
        "versions": {name: _version(name) for name in ("decompft", "torch", "transformers", "bitsandbytes")},
    }


def _formula(spec: AdapterSpec) -> dict[str, Any]:
    return {"title": spec.title, "source": spec.source, "is_reading": spec.is_reading}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
