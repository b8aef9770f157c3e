"""Recomputation changes no number, and keeps what its mode says."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, NF4, PLAIN, built, row, saved, section

from decompft.launcher.recipe import AdapterSection, ModelSection, QuantizationSection
from decompft.launcher.recompute import MODES
from decompft.launcher.worker.data.batches import collate

AGAIN = [mode for mode in MODES if mode != "none"]
LORA = AdapterSection(method="lora", rank=4, alpha=8.0)
BF16 = QuantizationSection(format="nf4", compute="bfloat16")
METHODS = {
    "lora": LORA,
    "map": AdapterSection(method="map", rank=4, alpha=8.0),
    "dora": AdapterSection(method="dora", rank=4, alpha=8.0),
    "liera": AdapterSection(method="liera", rank=4, alpha=8.0),
    "ia3": AdapterSection(method="ia3"),
    "lora-dropout": AdapterSection(method="lora", rank=4, alpha=8.0, dropout=0.3),
    "norms-too": AdapterSection(method="lora", rank=4, alpha=8.0, train_modules=["*norm*"]),
}


def batch():
    return collate([row((9, 1, 13)), row((20,), seed=1)], pad_id=0)


def gradients(model: ModelSection, quantization, adapter, mode, *, passes: int = 2):
    """Losses and summed gradients of two micro batches, from a start that has slopes everywhere."""
    found = built(model, quantization, adapter, recompute=mode)
    moved = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.trained.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=moved)
    found.model.train()
    torch.manual_seed(5)
    losses = []
    for _ in range(passes):
        loss = found.model(batch())
        loss.backward()
        losses.append(loss.item())
    # the numbers drawn after it are the same, too
    losses.append(torch.rand(()).item())
    return losses, {n: p.grad for n, p in found.trained.items()}


def assert_equal(one, other) -> None:
    assert one[0] == other[0]
    for name, grad in one[1].items():
        assert torch.equal(grad, other[1][name]), name


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return section(saved(tmp_path_factory.mktemp("llama"), FAMILIES["llama"])[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_has_other_numbers(tmp_path, family) -> None:
    model = section(saved(tmp_path, FAMILIES[family])[0])
    plain = gradients(model, PLAIN, LORA, "none")
    for mode in AGAIN:
        assert_equal(plain, gradients(model, PLAIN, LORA, mode))


@pytest.mark.parametrize("compute", [NF4, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_no_method_has_other_numbers(llama, method, compute) -> None:
    plain = gradients(llama, compute, METHODS[method], "none")
    for mode in AGAIN:
        assert_equal(plain, gradients(llama, compute, METHODS[method], mode))
