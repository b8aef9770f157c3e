"""An adapter over a tiny model, its layers as they would run, and what `inspect` tells as JSON: for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import PLAIN, built, section, single

from decompft.adapters.inject import adapters
from decompft.launcher.recipe import AdapterSection
from decompft.launcher.worker.checkpoint import save_adapter
from decompft.launcher.worker.modelfiles import identity
from decompft.launcher.worker.state import place_adapter
from decompft.launcher.worker.tools import inspect

Capture = pytest.CaptureFixture[str]


def adapter_over(base: Path, folder: Path, **fields: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter's folder, every trained tensor far from its start, and its tensors."""
    given = AdapterSection(**{"method": "lora", "rank": 4, "alpha": 8.0, **fields})
    made = built(section(base), adapter=given)
    torch.manual_seed(7)
    tensors = {n: p.detach() + 0.1 * torch.randn(p.shape) for n, p in made.trained.items()}
    tensors |= {n: b.detach().clone() for n, b in made.buffers.items()}
    description = {
        "adapter": given.model_dump(mode="json", exclude_unset=True),
        "formulas": {"lora": {"title": "a formula", "source": "a paper", "is_reading": False}},
        "model": section(base).model_dump(mode="json"),
        "quantization": PLAIN.model_dump(mode="json"),
        "seed": 0,
        "base": identity(base) | {"id": str(base)},
        "data_formats": ["text"],
        "step": 5,
    }
    save_adapter(folder, tensors, description)
    return folder, tensors


def weights_json(capsys: Capture, *argv: str) -> dict[str, dict[str, Any]]:
    capsys.readouterr()  # what libraries said while a model was saved
    inspect.main(["weights", *argv, "--json"])
    report = json.loads(capsys.readouterr().out)
    return {layer["name"]: layer for layer in report["layers"]}


def adapter_json(capsys: Capture, *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    inspect.main(["adapter", *argv, "--json"])
    return dict(json.loads(capsys.readouterr().out))


def layers_in_place(base: Path, given: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The adapted layers of a whole model with these tensors, as they would run."""
    made = built(
        section(base), adapter=AdapterSection(**{"method": "lora", "rank": 4, "alpha": 8.0, **given})
    )
    place_adapter({**made.trained, **made.buffers}, tensors, single())
    found = dict(adapters(made.model.model))
    for layer in found.values():
        layer.on_step(4)
    return found
