"""LoRA's start by LoftQ: peft's alternation over our quantizers, and where there is nothing to start from."""

import pytest
import torch
from planning import CPU, TINY
from planning import make as plan
from test_adapter_contract import IN, OUT, RANK, config_of, make_base, start

from decompft.adapters.inject import make_adapter
from decompft.adapters.lora import LoraLinear
from decompft.launcher.errors import PlanError

S = 8.0 / RANK


@pytest.fixture
def weight() -> torch.Tensor:
    return 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))


def make(base_name: str, weight: torch.Tensor, iterations: int):
    config = config_of("lora", init="loftq", loftq_iterations=iterations)
    return start(make_adapter(make_base(base_name, weight), config), weight)


def quantized(base_name: str, weight: torch.Tensor) -> torch.Tensor:
    return make_base(base_name, weight).dense(torch.float32)


@pytest.mark.parametrize("iterations", [1, 2, 4])
@pytest.mark.parametrize("base_name", ["nf4", "nf4-dq", "fp4", "int8", "fp8"])
def test_start_is_pefts_with_our_quantizer(base_name, iterations, weight):
    loftq = pytest.importorskip("peft.utils.loftq_utils")
    rest = weight
    for i in range(iterations):
        used = quantized(base_name, rest)
        found = loftq._low_rank_decomposition(weight - used, reduced_rank=RANK)
        product = found["L"] @ found["R"]
        if i + 1 < iterations:
            rest = weight - product
    adapter = make(base_name, weight, iterations)
    # a last bit may move a number to the next code of the quantizer
    differ = (adapter.base.dense(torch.float32) - used).abs() > 1e-6
    assert differ.float().mean() < 1e-3
    ours = (S * adapter.B @ adapter.A).detach()
    assert torch.linalg.norm(ours - product) < 1e-4 * torch.linalg.norm(product)


@pytest.mark.parametrize("base_name", ["nf4", "fp4"])
def test_start_is_nearer_to_the_weight_than_its_quantization(base_name, weight):
    plain = torch.linalg.norm(quantized(base_name, weight) - weight)
    errors = []
    for iterations in (1, 5):
        adapter = make(base_name, weight, iterations)
        errors.append(torch.linalg.norm(adapter.merged(adapter.base.dense(torch.float32)) - weight).item())
    # the best rank-r answer to the error takes its r largest of 24 singular values
    lost = torch.linalg.svdvals((quantized(base_name, weight) - weight).double())[RANK:]
    assert errors[0] == pytest.approx(torch.linalg.norm(lost).item(), rel=1e-4)
    assert errors[1] < errors[0] < 0.9 * plain


def test_one_iteration_leaves_the_base_alone_and_more_say_what_it_is_made_of(weight):
    one, three = make("nf4", weight, 1), make("nf4", weight, 3)
    assert not one.rewrites_base and dict(one.named_buffers(recurse=False)) == {}
    assert torch.equal(one.base.dense(torch.float32), quantized("nf4", weight))
    assert three.rewrites_base and three.delta() is None
    values = {"A0": three.A0, "B0": three.B0}
    rest = (weight.double() - S * three.B0.double() @ three.A0.double()).float()
    assert torch.equal(three.base_rows(weight, 0, values), rest)
    assert torch.equal(three.base.dense(torch.float32), quantized("nf4", rest))


def test_a_base_that_loses_nothing_is_refused(weight):
    with pytest.raises(ValueError, match="init: loftq approximates what quantization loses"):
        make("dense-fp32", weight, 1)


def test_the_default_start_is_plain_lora(weight):
    adapter = start(make_adapter(make_base("nf4", weight), config_of("lora")))
    assert type(adapter) is LoraLinear
    assert not adapter.rewrites_base and not adapter.B.any()
    assert list(adapter.named_buffers(recurse=False)) == []


def test_a_plan_refuses_it_already():
    dense = {"quantization": {"format": "none"}}
    with pytest.raises(PlanError, match=r"adapter.options.init: loftq .* loses nothing \(model.layers.0"):
        plan(CPU, TINY, adapter={"method": "lora", "options": {"init": "loftq"}}, **dense)
    assert plan(CPU, TINY, adapter={"method": "lora"}, **dense)


def test_iterations_without_loftq_are_refused():
    with pytest.raises(ValueError, match="loftq_iterations has no effect without init: loftq"):
        config_of("lora", loftq_iterations=2)
