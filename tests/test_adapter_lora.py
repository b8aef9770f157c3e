"""LoRA against its equation and against the installed peft package."""

import math

import pytest
import torch
from test_adapter_contract import IN, OUT, RANK, make_adapter, make_base, trained_away_from_start


def test_rslora_divides_by_the_root_of_the_rank():
    weight, x = torch.zeros(OUT, IN), torch.randn(4, IN, generator=torch.Generator().manual_seed(0))
    plain = trained_away_from_start(make_adapter("lora", make_base("dense-bf16", weight)))
    rooted = trained_away_from_start(make_adapter("lora", make_base("dense-bf16", weight), scaling="rslora"))
    assert torch.allclose(rooted(x), plain(x) * (RANK / math.sqrt(RANK)), rtol=1e-5)


def test_lora_plus_ratio_is_Bs():
    adapter = make_adapter("lora", make_base("dense-bf16", torch.zeros(OUT, IN)), lr_ratio=16.0)
    assert adapter.lr_scales() == {"B": 16.0}


def test_output_and_gradients_equal_pefts():
    peft = pytest.importorskip("peft")
    weight = 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    x = torch.randn(6, IN, generator=torch.Generator().manual_seed(3))
    ours = trained_away_from_start(make_adapter("lora", make_base("dense-fp32", weight)))
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    with torch.no_grad():
        model[0].weight.copy_(weight)
        model[0].bias.copy_(ours.base.bias)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(ours.A)
        layer.lora_B["default"].weight.copy_(ours.B)
    y, expected = ours(x), theirs(x)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(ours.A.grad, layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(ours.B.grad, layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-5)
