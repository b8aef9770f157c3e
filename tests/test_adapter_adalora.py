"""AdaLoRA against its equations in float64, and against the installed peft: forward, regulariser, budget, masks."""

import os

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora.layer import RankAllocator
from planning import CPU, DENSE, TINY, make
from pydantic import ValidationError
from test_adapter_contract import RANK, config_of, make_base, start, trained_away_from_start
from torch import nn

from decompft.adapters.allocation import budget, keep_largest
from decompft.adapters.inject import make_adapter
from decompft.adapters.spec import ADAPTER_SPECS, AdapterConfig
from decompft.adapters.window import window
from decompft.launcher.errors import PlanError
from decompft.launcher.options import options_of
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.phase_budget import Budget
from decompft.launcher.worker.running import Running

S = 8.0 / (RANK + 1e-5)
STEPS = {"init_warmup": 2.0, "final_warmup": 3.0, "interval": 2}  # of 12


@pytest.fixture
def weight() -> torch.Tensor:
    return 0.05 * torch.randn(24, 128, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, 128, generator=torch.Generator().manual_seed(3))


def adapted(weight, **options):
    return start(make_adapter(make_base("dense-fp32", weight), config_of("adalora", **options)))


def penalty_of(A, B):
    """0.1 times the mean of both unsquared norms, float64."""
    I = torch.eye(RANK, dtype=torch.float64)  # noqa: E741
    return 0.1 * (torch.linalg.norm(A @ A.T - I) + torch.linalg.norm(B.T @ B - I)) / 2


def test_forward_is_the_equation(weight, x):
    adapter = trained_away_from_start(adapted(weight))
    with torch.no_grad():
        adapter.mask[1] = 0
    A, B, e = (getattr(adapter, n).double() for n in ("A", "B", "e"))
    W = weight.double() + S * B @ torch.diag(e * adapter.mask.double()) @ A
    y = x.double() @ W.T + adapter.base.bias.double()
    torch.testing.assert_close(adapter(x).double(), y, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    expected = {n: getattr(adapter, n).grad.clone() for n in ("A", "B", "e")}
    adapter.zero_grad()
    adapter(x).square().sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(getattr(adapter, name).grad, gradient, rtol=1e-4, atol=1e-3)
    assert adapter.e.grad[1] == 0 and not adapter.A.grad[1].any()


def test_a_step_adds_the_regulariser_once_whatever_the_micro_batches(weight, x):
    """Two micro batches, each with half of the penalty: the gradient is that of loss + penalty."""
    adapter = trained_away_from_start(adapted(weight))
    twin = {n: getattr(adapter, n).detach().double().requires_grad_(True) for n in ("A", "B", "e")}
    y = x.double() @ (weight.double() + S * twin["B"] * twin["e"] @ twin["A"]).T + adapter.base.bias.double()
    (y.square().sum() + penalty_of(twin["A"], twin["B"])).backward()
    adapter.penalty_share = 0.5
    for half in x.split(4):
        adapter(half).square().sum().backward()
    for name, tensor in twin.items():
        torch.testing.assert_close(getattr(adapter, name).grad.double(), tensor.grad, rtol=1e-4, atol=1e-3)
    value = adapter.penalty(tuple(t.detach() for t in twin.values()), adapter.fixed())
    torch.testing.assert_close(value, penalty_of(twin["A"], twin["B"]).detach())


def test_gradients_of_the_penalty_are_the_default_ones(weight, x):
    """The written-out gradient against autograd through `factors` and `penalty`."""
    adapter = trained_away_from_start(adapted(weight))
    adapter.penalty_share, adapter.num_siblings = 1.0, 3
    adapter(x).sum().backward()
    with_penalty = adapter.A.grad.clone(), adapter.B.grad.clone()
    adapter.zero_grad()
    adapter.penalty_share = 0.0
    adapter(x).sum().backward()
    slopes = torch.autograd.grad(adapter.penalty(adapter.trained(), adapter.fixed()), [adapter.A, adapter.B])
    for found, without, slope in zip(with_penalty, (adapter.A.grad, adapter.B.grad), slopes, strict=True):
        torch.testing.assert_close(found - without, slope, rtol=1e-4, atol=1e-5)


# -- against peft ---------------------------------------------------------------------------------


class Two(nn.Module):
    """Two linear layers, so that a budget has something to move between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(128, 24), nn.Linear(24, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def peft_two(total_step=12, **fields):
    """peft's AdaLoRA over two layers, off its start."""
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=RANK, target_r=2, lora_alpha=8, target_modules=["first", "second"],
        tinit=2, tfinal=3, deltaT=2, total_step=total_step, **fields,
    )  # fmt: skip
    model = get_peft_model(Two(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "ranknum" not in name:
                parameter.normal_(std=0.1)
    return model


def ours_of(model, **fields):
    """The same layers and tensors as adapters of ours."""
    layers = {}
    for name in ("first", "second"):
        linear = getattr(model.base_model.model, name)
        out, in_ = linear.base_layer.weight.shape
        options = ADAPTER_SPECS["adalora"].options(target_rank=2, **STEPS, **fields)
        config = AdapterConfig(method="adalora", rank=RANK, alpha=8.0, dropout=0.0, options=options)
        from decompft.adapters.frozen.dense import DenseLinear

        base = DenseLinear(in_, out, dtype=torch.float32, bias_dtype=torch.float32)
        adapter = make_adapter(base, config)
        values = adapter.initial_values(torch.Generator(), {})
        values |= {
            "A": linear.lora_A["default"].detach(), "B": linear.lora_B["default"].detach(),
            "e": linear.lora_E["default"].detach().view(-1),
        }  # fmt: skip
        with torch.no_grad():
            base.weight.copy_(linear.base_layer.weight)
            base.bias.copy_(linear.base_layer.bias)
            for own, value in values.items():
                getattr(adapter, own).copy_(value)
        adapter.num_siblings = 2
        layers[name] = adapter
    return layers


def forward(layers, x):
    return layers["second"](layers["first"](x).relu())


def theirs(model, name):
    linear = getattr(model.base_model.model, name)
    return {
        "A": linear.lora_A["default"], "B": linear.lora_B["default"], "e": linear.lora_E["default"]
    }  # fmt: skip


def test_outputs_gradients_and_merged_weights_are_pefts(x):
    model = peft_two()
    layers = ours_of(model)
    expected, found = model(x), forward(layers, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    expected.square().sum().backward()
    found.square().sum().backward()
    for name, layer in layers.items():
        for own, parameter in theirs(model, name).items():
            gradient = getattr(layer, own).grad
            torch.testing.assert_close(gradient, parameter.grad.view_as(gradient), rtol=1e-4, atol=1e-4)
        linear = getattr(model.base_model.model, name)
        merged = linear.base_layer.weight + linear.get_delta_weight("default")
        torch.testing.assert_close(layer.merged(linear.base_layer.weight), merged.detach())


def test_the_regulariser_is_pefts():
    model = peft_two()
    layers = ours_of(model)
    norms = [
        torch.norm(p @ p.T - torch.eye(RANK)) if own == "A" else torch.norm(p.T @ p - torch.eye(RANK))
        for name in layers for own, p in theirs(model, name).items() if own != "e"
    ]  # fmt: skip
    total = sum(layer.penalty(layer.trained(), layer.fixed()) for layer in layers.values())
    assert model.peft_config["default"].orth_reg_weight == 0.5  # our default is METHODS.md's 0.1
    torch.testing.assert_close(total, 0.1 * sum(norms) / len(norms))


def test_the_budget_is_pefts():
    model = peft_two()
    allocator = RankAllocator(model.base_model.model, model.peft_config["default"], "default")
    at = window(2.0, 3.0, 2, 12)
    assert (at.first, at.last) == (2, 9)
    for step in range(12):
        expected, is_due = allocator.budget_schedule(step)
        if step <= at.last:
            assert budget(8, 4, at, step) == expected
        # peft enforces its last allocation at total_step - tfinal whether deltaT divides it or not
        assert at.is_due(step) == (step == 9 or (is_due and step < 9))


@pytest.mark.parametrize(("beta1", "beta2"), [(0.85, 0.85), (0.3, 0.95), (0.95, 0.3)])
def test_masks_are_pefts_given_the_same_gradients(beta1, beta2):
    """The same noise moves both: peft looks at parameters after the optimizer's step, we before, as the paper does."""
    betas = {"beta1": beta1, "beta2": beta2}
    model = peft_two(**betas)
    layers = ours_of(model, **betas)
    trained = {f"{n}.{t}": p for n, a in layers.items() for t, p in a.named_parameters(recurse=False)}
    buffers = {f"{n}.{b}": t for n, a in layers.items() for b, t in a.named_buffers(recurse=False)}
    os.environ.pop("WORLD_SIZE", None)
    running = Running(
        trained=trained, buffers=buffers, optimizer=torch.optim.AdamW(trained.values()),
        engine=Engine(torch.device("cpu"), timeout_s=1),
    )  # fmt: skip
    ours = Budget(layers, running, total_steps=12)
    generator = torch.Generator().manual_seed(5)
    num_live = []
    for step in range(12):
        for name, layer in layers.items():
            for own, parameter in theirs(model, name).items():
                mine = getattr(layer, own)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                mine.grad = parameter.grad.reshape(mine.shape).clone()
                with torch.no_grad():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
                    mine.copy_(parameter.view_as(mine))
        ours.observe(step)
        ours.advance(step)
        model.base_model.update_and_allocate(step)
        for name, layer in layers.items():
            expected = theirs(model, name)["e"].detach().view(-1)
            torch.testing.assert_close(layer.e.detach() * layer.mask, expected)
        num_live.append(sum(int((a.e * a.mask != 0).sum()) for a in layers.values()))
    # two warm-up steps, allocations after 4, 6, 8 and the last after 9; in between all may come back
    assert num_live == [8, 8, 8, 8, 5, 8, 4, 8, 4, 4, 4, 4]
    assert all(a.phase == 1 for a in layers.values())


def test_as_many_as_the_budget_says_are_kept():
    assert keep_largest(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2).tolist() == [0, 1, 1, 0]
    assert keep_largest(torch.zeros(3), 3).tolist() == [1, 1, 1]


def test_warmups_are_steps_or_shares():
    assert window(0.1, 0.3, 10, 100) == window(10.0, 30.0, 10, 100)
    with pytest.raises(ValueError, match="leave none of the 10 steps"):
        window(5.0, 5.0, 1, 10)


@pytest.mark.parametrize(
    ("rank", "target"), [(1, 1), (2, 1), (3, 2), (4, 3), (7, 5), (8, 5), (12, 8), (16, 11), (64, 43)]
)
def test_the_mean_rank_at_the_end_is_two_thirds_of_the_rank(weight, rank, target):
    """Rounded to the nearest, and never 0."""
    options = ADAPTER_SPECS["adalora"].options()
    assert options.target_rank is None
    config = AdapterConfig(method="adalora", rank=rank, alpha=8.0, dropout=0.0, options=options)
    assert make_adapter(make_base("dense-fp32", weight), config).target_rank == target


def test_a_and_b_start_as_narrow_as_the_authors_have_them(weight):
    values = adapted(weight).initial_values(torch.Generator().manual_seed(0), {})
    for name in ("A", "B"):
        tensor = values[name]
        # five standard errors of the deviation, and of the mean
        assert tensor.std().item() == pytest.approx(0.02, rel=5 / (2 * tensor.numel()) ** 0.5), name
        assert abs(tensor.mean().item()) < 5 * 0.02 / tensor.numel() ** 0.5, name
    assert not values["e"].any() and values["mask"].all()


def test_counts():
    config = config_of("adalora")
    assert ADAPTER_SPECS["adalora"].num_params(24, 128, config) == RANK * (24 + 128) + RANK


def test_a_target_of_no_direction_is_refused():
    """All masks 0: the adapter would be its base."""
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        options_of("adalora", {"target_rank": 0})


def test_a_target_above_the_rank_is_refused_with_ones_that_work():
    def planned(target):
        adapter = {"method": "adalora", "rank": 8, "options": {"target_rank": target}}
        return make(CPU, TINY, **DENSE, adapter=adapter)

    with pytest.raises(
        PlanError, match=r"target_rank: ranks only shrink, and 12 is more than .*rank 8"
    ) as error:
        planned(12)
    assert error.value.hint == "use target_rank <= 8, or adapter.rank >= 12"
    assert planned(8).num_adapter_params
