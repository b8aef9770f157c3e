"""Models whose frozen norms are ours, and make the residual's sum of slopes: the numbers of those that were there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_kernel_rms_norm import Twins
from test_recompute import BF16, LORA, METHODS, assert_equal, batch, gradients
from tiny_models import FAMILIES, PLAIN, built, row, saved, section
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from decompft.adapters.kernels import rms_norm as kernel
from decompft.launcher.recipe import AdapterSection, ModelSection, QuantizationSection
from decompft.launcher.recompute import MODES, Recompute
from decompft.launcher.worker import chosen_kernels, norms
from decompft.launcher.worker.data.batches import collate
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.norms import use_norms

OURS = [name for name, fields in FAMILIES.items() if fields["model_type"] in kernel.FAMILIES]


class Ours(Twins):
    """Twins in the kernels' place, and norms put in place as on a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.norms = 0
        monkeypatch.setattr(chosen_kernels, "_prove_kernels", self._put)

    def _put(self, hf: Any, engine: Any, format: str, dtype: torch.dtype, recompute: Recompute) -> str:
        self.norms = use_norms(hf, recompute)
        return ""


def assert_close(plain, ours, rtol: float) -> None:
    assert plain[0] == ours[0], "losses, bit for bit"
    assert plain[1].keys() == ours[1].keys()
    # MAP's scalars have slopes of one number, sums over all tokens that cancel: together
    alone = [name for name, slope in plain[1].items() if slope.numel() == 1]
    groups = [*([name] for name in plain[1] if name not in alone), *([alone] if alone else [])]
    for group in groups:
        found, expected = (torch.cat([of[1][n].flatten() for n in group]) for of in (ours, plain))
        apart = (found - expected).norm()
        assert apart <= rtol * expected.norm(), f"{group}: {float(apart / expected.norm())}"


def assert_near(ours: Sequence[Tensor], plain: Sequence[Tensor]) -> None:
    for found, expected in zip(ours, plain, strict=True):
        # float32, added in another order
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("family", OURS)
def test_every_family_has_the_losses_and_slopes_of_its_own_norms(tmp_path, family, monkeypatch) -> None:
    """Of two micro batches, in every mode."""
    model = section(saved(tmp_path, FAMILIES[family])[0])
    plain = gradients(model, PLAIN, LORA, "none")
    ours = Ours(monkeypatch)
    layers = FAMILIES[family]["num_hidden_layers"]
    sums = {"none": 2 * layers - 1, "full": layers, "offloaded": layers}  # the first of all has no slope
    found = {}
    for mode in MODES:
        ours.sums.clear()
        found[mode] = gradients(model, PLAIN, LORA, mode)
        assert_close(plain, found[mode], 1e-6)
        assert_equal(found["none"], found[mode])
        assert ours.norms == layers * (4 if family == "qwen3" else 2) + 1
        assert sum(ours.sums) == 2 * sums.get(mode, 0), mode


@pytest.mark.parametrize("method", [name for name in METHODS if name != "norms-too"])
def test_modes_have_equal_numbers_in_bfloat16(tiny_llama, method, monkeypatch) -> None:
    """A sum that the kernel makes is rounded as autograd's addition is."""
    ours = Ours(monkeypatch)
    plain = gradients(tiny_llama, BF16, METHODS[method], "none")
    assert any(ours.sums)
    for mode in MODES[1:]:
        assert_equal(plain, gradients(tiny_llama, BF16, METHODS[method], mode))


@pytest.mark.parametrize("method", METHODS)
def test_methods_have_the_slopes_of_the_norms_that_were_there(tiny_llama, method, monkeypatch) -> None:
    plain = gradients(tiny_llama, PLAIN, METHODS[method], "none")
    ours = Ours(monkeypatch)
    assert_close(plain, gradients(tiny_llama, PLAIN, METHODS[method], "none"), 1e-6)
    assert any(ours.sums) == (method != "norms-too"), "norms that train are left alone"


def test_no_slope_is_added_by_itself(tiny_llama, monkeypatch) -> None:
    """Both additions of a block; of the first block the one at its input has no slope to begin with."""

    class Additions(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.found: Counter[tuple[int, ...]] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func._overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
                self.found[tuple(result.shape)] += 1
            return result

    def additions() -> int:
        loss = built(tiny_llama, PLAIN, LORA).model.train()(batch())
        with Additions() as seen:
            loss.backward()
        return sum(n for shape, n in seen.found.items() if len(shape) == 3 and shape[-1] == 64)

    Ours(monkeypatch)
    assert additions() == 0
    monkeypatch.setattr(norms, "_summing", lambda family, recompute: ())
    assert additions() == 2 * FAMILIES["llama"]["num_hidden_layers"] - 1


def test_an_input_that_has_slopes_is_the_first_norms_too(monkeypatch) -> None:
    """Rows of tokens train: the embedding's output is no leaf, and saved by nobody."""
    source = ModelSection(config=FAMILIES["llama"], weights="random")

    def found(mode: Recompute) -> tuple[Tensor, ...]:
        made = built(source, PLAIN, LORA, recompute=mode)
        embedding = made.model.model.get_input_embeddings()
        rows = torch.zeros(FAMILIES["llama"]["hidden_size"], requires_grad=True)
        embedding.register_forward_hook(lambda *given: given[-1] + rows)
        loss = made.model.train()(batch())
        return loss.detach(), *torch.autograd.grad(loss, [rows, *made.trained.values()])

    plain = found("none")
    ours = Ours(monkeypatch)
    for mode in MODES:
        assert_near(found(mode), plain)
    assert ours.sums.count(True) >= 2 * FAMILIES["llama"]["num_hidden_layers"]


def test_hidden_states_that_were_asked_for_have_their_slopes(tiny_llama, monkeypatch) -> None:
    """They are the residual stream, collected before a norm takes its place."""

    def found() -> list[Tensor]:
        hf = built(tiny_llama, PLAIN, LORA).model.model.train()
        states = hf(torch.arange(3, 15).view(2, 6), output_hidden_states=True).hidden_states
        end = sum((n + 1) * (state**2).sum() for n, state in enumerate(states[1:]))
        return [*(s.detach() for s in states), *torch.autograd.grad(end, _down_projections(hf))]

    plain = found()
    ours = Ours(monkeypatch)
    assert_near(found(), plain)
    assert any(ours.sums)


def _down_projections(hf: Any) -> list[Tensor]:
    return [p for n, p in hf.named_parameters() if p.requires_grad and "mlp" in n and "B" in n]


def test_evaluation_and_generation_are_the_same(tiny_llama, monkeypatch) -> None:
    prompt = torch.arange(3, 9).view(1, 6)

    def found() -> tuple[Tensor, Tensor]:
        made = built(tiny_llama, PLAIN, LORA).model.eval()
        with torch.no_grad():
            said = made.model.generate(prompt, max_new_tokens=8, do_sample=False)
            return made(batch()), said

    plain = found()
    ours = Ours(monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(plain, found(), strict=True))
    assert ours.forwards >= 8 * ours.norms and not ours.sums


# --- on a GPU ---


def numbers_on_gpu(
    quantization: QuantizationSection, adapter: AdapterSection, mode: Recompute
) -> tuple[float, dict[str, Tensor], str]:
    """Loss and slopes of a pass, from a start that has slopes everywhere, and which kernels run."""
    model = ModelSection(
        config={**FAMILIES["llama"], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4},
        weights="random",
    )
    engine = Engine(torch.device("cuda"), timeout_s=60)
    made = built(model, quantization, adapter, engine=engine, recompute=mode)
    moved = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.trained.values():
            parameter += (0.02 * torch.randn(parameter.shape, generator=moved)).to(parameter.device)
    loss = made.model.train()(collate([row((40, 24))], pad_id=0).to(torch.device("cuda")))
    loss.backward()
    return loss.item(), {n: p.grad.double() for n, p in made.trained.items()}, made.kernels


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_llama_on_a_gpu_is_close_to_itself_without(mode, monkeypatch) -> None:
    bf16 = QuantizationSection(format="none", compute="bfloat16")
    loss, slopes, kernels = numbers_on_gpu(bf16, LORA, mode)
    assert "rms_norm" in kernels.partition(" (proved")[0]
    monkeypatch.setattr(kernel, "fits", lambda x, weight: False)  # as where DECOMPFT_TRITON is 0
    plain_loss, plain_slopes, _ = numbers_on_gpu(bf16, LORA, mode)
    # bfloat16 norms and sums of slopes, rounded in another order over four blocks
    assert loss == pytest.approx(plain_loss, rel=2**-8)
    for name, expected in plain_slopes.items():
        assert (slopes[name] - expected).norm() <= 0.05 * expected.norm(), name
