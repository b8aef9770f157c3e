"""adapter.json: what someone needs to use an adapter without its recipe."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from decompft.adapters.spec import ADAPTER_SPECS, AdapterSpec
from decompft.launcher.plan import Plan
from decompft.launcher.worker.prepared import Prepared


def describe(plan: Plan, prepared: Prepared) -> dict[str, Any]:
    """Method, options, targets, the base's identity and the versions; JSON."""
    recipe = plan.recipe
    methods = dict.fromkeys([recipe.adapter.method, *(o.method for o in recipe.adapter.overrides if o.method)])
    return {
        "name": plan.name,
        "adapter": {
            **recipe.adapter.model_dump(mode="json"),
            "options": asdict(recipe.adapter.typed_options()),
        },
        "formulas": {name: _formula(ADAPTER_SPECS[name]) for name in methods},
        "model": recipe.model.model_dump(mode="json"),
        "quantization": recipe.quantization.model_dump(mode="json"),
        "seed": recipe.train.seed,
        "base": prepared.identity,
        "data_formats": sorted({s.format for s in recipe.data.train}),
        "versions": {name: _version(name) for name in ("decompft", "torch", "transformers", "bitsandbytes")},
    }


def _formula(spec: AdapterSpec) -> dict[str, Any]:
    return {"title": spec.title, "source": spec.source, "is_reading": spec.is_reading}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
