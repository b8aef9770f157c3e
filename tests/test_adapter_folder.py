"""The adapter's own folder: whole, replaced as a whole, and damage told in words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from test_checkpoint import ADAPTER_JSON, flip, make_whole

from decompft.launcher.checkpoints import FORMAT_VERSION
from decompft.launcher.errors import AdapterError
from decompft.launcher.worker.checkpoint import load_adapter, save_adapter


def test_an_adapter_folder_round_trips_and_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "run/adapter"
    tensors = {name: t for (name, kind), t in make_whole().items() if kind == "param"}
    save_adapter(folder, {"other": torch.zeros(3)}, ADAPTER_JSON)
    save_adapter(folder, tensors, ADAPTER_JSON)
    found, description = load_adapter(folder)
    assert set(found) == set(tensors) and all(torch.equal(found[n], t) for n, t in tensors.items())
    assert description.items() >= {**ADAPTER_JSON, "format_version": FORMAT_VERSION}.items()
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]


def test_a_damaged_adapter_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(folder, {"A": torch.ones(64)}, ADAPTER_JSON)
    flip(folder / "adapter.safetensors", -1)
    with pytest.raises(AdapterError, match="adapter.safetensors: altered"):
        load_adapter(folder)
    os.truncate(folder / "adapter.safetensors", 100)
    with pytest.raises(AdapterError, match="100 bytes instead of"):
        load_adapter(folder)
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(AdapterError, match="adapter.safetensors is missing"):
        load_adapter(folder)
    (folder / "adapter.json").write_text('{"method": "map"}')
    (folder / "adapter.safetensors").touch()
    with pytest.raises(AdapterError, match="decompft did not write it"):
        load_adapter(folder)
