"""Steps of recorded passes beside the same steps without: CUDA graphs on a GPU, a stand-in for them on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from recording import FakeRecorder
from tiny import LLAMA
from tiny_models import built, row

from decompft.adapters.base import Adapter
from decompft.adapters.inject import adapters
from decompft.adapters.launched import LaunchedAdapter
from decompft.launcher.recipe import AdapterSection, ModelSection, QuantizationSection
from decompft.launcher.recompute import Recompute
from decompft.launcher.worker.build import Built
from decompft.launcher.worker.data.batches import Batch, collate
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.graph_recorder import CudaRecorder, Work
from decompft.launcher.worker.optimizer import clip_gradients
from decompft.launcher.worker.pulse import Pulse
from decompft.launcher.worker.recorded import RecordedPasses
from decompft.launcher.worker.train import seed_step

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
# switches after step 2, rises until step 4
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "map": ("map", {"b_warmup_steps": 4}),
    "dora": ("dora", {}),
    "lora_dash": ("lora_dash", {"start_step": 2}),
    "liera": ("liera", {}),
    "svft-banded": ("svft", {"pattern": "banded", "k": 6}),
    "adalora": ("adalora", {}),
}
STEPS = 6


class Plainly:
    """The form of a recorded pass, on the recorder's stream, but never recorded."""

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder

    def plain(self, work: Work) -> torch.Tensor:
        found: torch.Tensor = self._recorder.plain(work)
        return found

    def record(self, work: Work) -> tuple[Callable[[], None], torch.Tensor]:
        raise RuntimeError("never")

    def forget(self) -> None:
        pass


@dataclass(frozen=True)
class Steps:
    losses: list[float]
    tensors: dict[str, torch.Tensor]
    said: list[str]


def batches() -> list[Batch]:
    """Two micro batches of packed rows, and two of a shape of their own; other tokens for each step."""
    made = []
    for i in range(4):
        lengths = ((9, 1, 13), (20,)) if i % 2 else ((30,), (17,))
        made.append(collate([row(n, seed=i, vocab=260) for n in lengths], pad_id=0, pad_multiple=32))
    return made


def model(device: torch.device, name: str, compute: str, dropout: float, recompute: Recompute) -> Built:
    method, options = METHODS[name]
    adapter = AdapterSection(method=method, rank=4, alpha=8.0, dropout=dropout, options=options)
    quantization = QuantizationSection.model_validate({"format": "nf4", "compute": compute})
    source = ModelSection(config=LLAMA, weights="random")
    return built(source, quantization, adapter, engine=Engine(device, timeout_s=60), recompute=recompute)


def steps(
    device: torch.device,
    name: str,
    *,
    is_recorded: bool,
    compute: str = "float32",
    dropout: float = 0.0,
    recompute: Recompute = "none",
    alone: bool = False,
) -> Steps:
    """
    Args:
        alone: one micro batch a step, of both shapes by turns, instead of four.
    """
    found = model(device, name, compute, dropout, recompute)
    engine, layers = Engine(device, timeout_s=60), list(adapters(found.model.model))
    found.model.train()
    own = [a for _, a in layers]
    recorder: Any = FakeRecorder(found.model) if device.type == "cpu" else CudaRecorder(device)
    said: list[str] = []
    parameters = list(found.trained.values())
    optimizer = torch.optim.AdamW(parameters, lr=0.01, fused=True)
    passes = RecordedPasses(
        found.model, engine, parameters, recorder if is_recorded else Plainly(recorder), pulse=Pulse(),
        say=said.append, is_demanded=False, pad_multiple=32,
        adds=not alone,
    )  # fmt: skip
    losses = []
    for step in range(STEPS):
        for _, adapter in layers:
            adapter.on_step(step)
        passes.begin_step()
        total = torch.zeros((), device=device)
        for index, batch in enumerate(batches()[step % 2 : step % 2 + 1] if alone else batches()):
            seed_step(0, step, index, 0)
            total += passes.run(batch, 100)
        clip_gradients(layers, found.trained, engine, 1.0)
        optimizer.step()
        engine.zero_gradients(parameters)
        losses.append(total.item())
        if step == 1:
            switch(own)
    return Steps(losses, {n: p.detach().cpu() for n, p in found.trained.items()}, said)


@torch.no_grad()
def switch(layers: list[Adapter]) -> None:
    """The second phase of those that have one, in place, as Launch begins it."""
    for layer in layers:
        if isinstance(layer, LaunchedAdapter):
            dense = layer.base.dense(torch.float32)
            found = layer.directions(dense, layer.A, layer.B, lambda kind, k, make: make())
            for name, value in layer.launched(found).items():
                getattr(layer, name).copy_(value)


def fixed_order(device: torch.device) -> AbstractContextManager[None]:
    """Attention that adds its gradients in one order."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernel: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return kernel if device.type == "cuda" else nullcontext()


def compare(found: Steps, expected: Steps, rel: float) -> None:
    assert any("as a CUDA graph" in line for line in found.said), found.said
    assert not any("plainly" in line for line in found.said), found.said
    if rel == 0:
        assert found.losses == expected.losses
        assert all(torch.equal(t, expected.tensors[n]) for n, t in found.tensors.items())
    else:
        assert found.losses == pytest.approx(expected.losses, rel=rel)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", METHODS)
def test_steps_of_two_shapes_equal_the_plain_ones(device: str, name: str) -> None:
    """On a GPU the kernels are the same ones; what libraries choose by workspace may still differ in a last bit."""
    where = torch.device(device)
    with fixed_order(where):
        found, expected = steps(where, name, is_recorded=True), steps(where, name, is_recorded=False)
    # AdamW turns a gradient's last bit into a part of a step of 1 %, and six of them into 1e-4 of a loss of 20
    compare(found, expected, rel=0 if device == "cpu" else 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_a_lone_micro_batch_are_written_over(device: str, name: str) -> None:
    where = torch.device(device)
    with fixed_order(where):
        found, expected = (steps(where, name, is_recorded=r, alone=True) for r in (True, False))
    compare(found, expected, rel=0 if device == "cpu" else 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dropout", "recompute"), [(0.2, "none"), (0.2, "norms"), (0.0, "full")])
def test_dropout_draws_the_same_and_recomputation_is_recorded(
    device: str, dropout: float, recompute: Recompute
) -> None:
    """A graph reads the generator's seed and offset when it is replayed, not when it was recorded."""
    where = torch.device(device)
    kind: dict[str, Any] = {"dropout": dropout, "recompute": recompute}
    with fixed_order(where):
        found, expected = (steps(where, "lora", is_recorded=r, **kind) for r in (True, False))
    compare(found, expected, rel=0 if device == "cpu" else 1e-4)
    if dropout:
        assert found.losses != steps(where, "lora", is_recorded=True).losses


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_with_the_librarys_attention(name: str) -> None:
    where = torch.device("cuda")
    found, expected = (steps(where, name, is_recorded=r, compute="bfloat16") for r in (True, False))
    compare(found, expected, rel=1e-2)  # two bfloat16 runs whose attention adds in any order


@pytest.mark.gpu
def test_a_pass_that_waits_for_the_device_is_told_before_a_capture_is_spoiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Adapter.forward

    def reads(self: Adapter, x: torch.Tensor) -> torch.Tensor:
        assert x.abs().sum().item() >= 0
        return whole(self, x)

    monkeypatch.setattr(Adapter, "forward", reads)
    found = steps(torch.device("cuda"), "lora", is_recorded=True)
    assert "synchroniz" in found.said[0] and "plainly" in found.said[0]
    assert found.losses[-1] < found.losses[0]


@pytest.mark.gpu
def test_a_run_goes_on_after_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a capture refuses: the allocator must not believe afterwards that it lasts."""
    whole = Adapter.forward

    def reads(self: Adapter, x: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            x.sum().item()
        return whole(self, x)

    monkeypatch.setattr(Adapter, "forward", reads)
    found, expected = (steps(torch.device("cuda"), "lora", is_recorded=r) for r in (True, False))
    assert "plainly" in found.said[0]
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)
    torch.cuda.empty_cache()
    with pytest.raises(torch.OutOfMemoryError):  # and no failed assertion of the allocator's own
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
