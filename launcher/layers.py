"""Which layer carries which adapter: `adapter.targets` and `adapter.overrides` against layer names, torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from decompft.adapters.spec import ADAPTER_SPECS, AdapterConfig
from decompft.adapters.targets import TargetMismatch, select
from decompft.launcher.errors import AdapterError
from decompft.launcher.recipe import AdapterSection


def layer_configs(
    section: AdapterSection, names: Sequence[str], head_names: Sequence[str], *, hint: str = ""
) -> dict[str, AdapterConfig]:
    """The adapted layers in the order of `names`, each with its method, rank and options.

    Args:
        names: of all linear layers.
        head_names: of the output head, which takes no adapter.
        hint: for a target that matches nothing.

    Raises:
        AdapterError: a target matches nothing, or overrides skip every layer.
    """
    chosen = dict.fromkeys(
        _select(names, section.targets, head_names, "adapter.targets", hint), section.config()
    )
    for number, override in enumerate(section.overrides):
        key = f"adapter.overrides[{number}].targets"
        # among the adapted ones: an override of a layer that has no adapter is a mistake
        for name in _select(list(chosen), override.targets, head_names, key, hint):
            if override.skip:
                del chosen[name]
            else:
                chosen[name] = section.config(override)
    if not chosen:
        raise AdapterError("adapter.overrides: skip every layer that adapter.targets names", "leave one")
    return chosen


def forbidden_engines(section: AdapterSection) -> dict[str, str]:
    """Strategy that a method of the recipe does not run under -> that method."""
    methods = [section.method, *(o.method for o in section.overrides if o.method)]
    return {engine: method for method in methods for engine in ADAPTER_SPECS[method].forbids_engines}


def _select(
    names: Sequence[str], targets: str | list[str], head_names: Sequence[str], key: str, hint: str
) -> list[str]:
    try:
        return select(names, targets, head_names)
    except TargetMismatch as error:
        last = error.target in [head.rpartition(".")[2] for head in head_names]
        head = (
            f"the output head takes no adapter; train it whole with adapter.train_modules: [{error.target}]"
        )
        raise AdapterError(f"{key}: {error}", head if last else hint) from error
