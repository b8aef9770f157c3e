"""MPC_o and MPC_d over every method with A and B: the term against its formula, and added once a step."""

import copy
import json
import typing
from pathlib import Path

import pytest
import torch
from test_adapter_contract import IN, OUT, make_base, start, trained_away_from_start
from tiny import WORLDS, losses, make_run, run_ranks

from decompft.adapters.base import Adapter
from decompft.adapters.inject import make_adapter as adapter_of
from decompft.adapters.spec import ADAPTER_SPECS, AdapterConfig
from decompft.adapters.specs.base import WrapperOptions
from decompft.adapters.specs.mpc import MpcOptions, Over
from decompft.launcher.errors import RecipeError
from decompft.launcher.source import parse

RANK = 4
OVER = typing.get_args(Over)
# low rank, but no method to regularise so: why
NOT_OVER = {
    "adalora": "has the term itself",
    "liera": "its change of the weight is of no low rank",
    "hira": "its change of the weight is of no low rank",
    "mpc_n": "is the third of the constraints, instead of these",
    "mpc_o": "one such term",
    "mpc_d": "one such term",
}


@pytest.fixture
def weight() -> torch.Tensor:
    return 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, IN, generator=torch.Generator().manual_seed(3))


def make(method: str, full: torch.Tensor, /, **options: object) -> Adapter:
    config = AdapterConfig(
        method=method, rank=RANK, alpha=8.0, dropout=0.0, options=ADAPTER_SPECS[method].options(**options)
    )
    return start(adapter_of(make_base("dense-fp32", full), config))


def term(
    method: str, A: torch.Tensor, B: torch.Tensor, power: int, live: torch.Tensor | None = None
) -> torch.Tensor:
    """METHODS 2.3, in float64; `live` is 1 for FlexLoRA's directions that exist."""
    one = torch.eye(A.shape[0], dtype=torch.float64)
    one = one if live is None else one * live.double()
    BtB = B.T @ B
    rest = BtB - one if method == "mpc_o" else BtB - torch.diag(torch.diag(BtB))
    return sum(torch.sqrt(torch.sum(r * r)) ** power for r in (A @ A.T - one, rest))


def test_every_low_rank_method_is_offered():
    def has_factors(name: str) -> bool:
        config = AdapterConfig(
            method=name, rank=3, alpha=1.0, dropout=0.0, options=ADAPTER_SPECS[name].options()
        )
        shapes = ADAPTER_SPECS[name].tensors(5, 7, config)
        return {"A", "B"} <= shapes.keys() and (shapes["A"][1], shapes["B"][0]) == (7, 5)

    assert set(OVER) == {name for name in ADAPTER_SPECS if has_factors(name)} - set(NOT_OVER)
    for name in OVER:  # what the term's own description says of all of them
        assert ADAPTER_SPECS[name].mergeable and not ADAPTER_SPECS[name].forbids_engines


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("method", ["mpc_o", "mpc_d"])
def test_term_is_the_formula(method, power, weight):
    adapter = trained_away_from_start(make(method, weight, power=power, weight=0.25))
    adapter.num_siblings = 5
    expected = 0.25 / 5 * term(method, adapter.A.double(), adapter.B.double(), power)
    assert torch.allclose(adapter.constraint(adapter.trained()).double(), expected, rtol=1e-5)
    summed = make(method, weight, power=power, weight=0.25, reduction="sum")
    summed.load_state_dict(adapter.state_dict())
    summed.num_siblings = 5
    assert torch.allclose(summed.constraint(summed.trained()).double(), 5 * expected, rtol=1e-5)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("method", ["mpc_o", "mpc_d"])
def test_gradients_are_the_methods_own_and_the_terms(method, over, weight, x):
    """Over two layers; the terms by central differences in float64. Whatever `pull_back` the method below has."""
    layers = [trained_away_from_start(make(method, weight * k, over=over, weight=0.5)) for k in (1, 2)]
    plain = [trained_away_from_start(make_plain(over, weight * k)) for k in (1, 2)]
    for layer in layers:
        layer.num_siblings, layer.penalty_share = 2, 0.25
    for layer in (*layers, *plain):
        layer(x).sin().sum().backward()

    def terms() -> torch.Tensor:
        return (
            0.5 * sum(term(method, la.A.double(), la.B.double(), 2, la.live(la.fixed())) for la in layers) / 2
        )

    for layer, other in zip(layers, plain, strict=True):
        for name, parameter in layer.named_parameters(recurse=False):
            added = parameter.grad - getattr(other, name).grad
            if name not in ("A", "B"):
                assert not added.any(), name
                continue
            largest = added.abs().argmax()
            for index in {0, int(largest), parameter.numel() - 1}:
                slope = 0.25 * difference(terms, parameter.data.view(-1), index)
                # the sum of both gradients was rounded to float32
                size = parameter.grad.abs().max().item()
                assert added.view(-1)[index].item() == pytest.approx(
                    slope, rel=2e-3, abs=1e-5 * (1 + size)
                ), name


def make_plain(over: str, weight: torch.Tensor) -> Adapter:
    config = AdapterConfig(
        method=over, rank=RANK, alpha=8.0, dropout=0.0, options=ADAPTER_SPECS[over].options()
    )
    return start(adapter_of(make_base("dense-fp32", weight), config))


def difference(value, flat: torch.Tensor, index: int) -> float:
    before, step = flat[index].item(), 2.0**-10
    ends = []
    for at in (before + step, before - step):
        flat[index] = at
        ends.append((value().item(), flat[index].item()))
    flat[index] = before
    return (ends[0][0] - ends[1][0]) / (ends[0][1] - ends[1][1])


@pytest.mark.parametrize("power", [1, 2])
def test_written_out_slopes_are_autograds(power, weight):
    for method in ("mpc_o", "mpc_d"):
        adapter = trained_away_from_start(make(method, weight, power=power)).double()
        A, B = adapter.trained()
        grads = torch.autograd.grad(adapter.constraint((A, B)), (A, B))
        for mine, expected in zip(adapter._slopes(A, B), grads, strict=True):
            assert torch.allclose(0.1 * mine, expected, rtol=1e-10)


@pytest.mark.parametrize("power", [1, 2])
def test_directions_that_flexlora_only_has_room_for_do_not_count(power, weight, x):
    """Value and slopes are those of the live ones alone: a row of zeros would add 1 to the norm."""
    for method in ("mpc_o", "mpc_d"):
        adapter = trained_away_from_start(make(method, weight, over="flexlora", power=power, weight=1.0))
        live = adapter.mask.bool()
        assert live.tolist() == [True] * RANK + [False] * RANK
        with torch.no_grad():
            adapter.A.mul_(adapter.mask[:, None]), adapter.B.mul_(adapter.mask)
        plain = copy.deepcopy(adapter)
        adapter.penalty_share = 1.0
        for layer in (adapter, plain):
            layer(x).sin().sum().backward()
        A, B = (t.detach().double().requires_grad_(True) for t in (adapter.A[live], adapter.B[:, live]))
        expected = term(method, A, B, power)
        assert torch.allclose(adapter.constraint(adapter.trained()).double(), expected, rtol=1e-5)
        dA, dB = torch.autograd.grad(expected, (A, B))
        of_A, of_B = (getattr(adapter, n).grad - getattr(plain, n).grad for n in "AB")
        torch.testing.assert_close(of_A[live].double(), dA, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(of_B[:, live].double(), dB, rtol=1e-3, atol=1e-4)
        assert not of_A[~live].any() and not of_B[:, ~live].any()


@pytest.mark.parametrize("power", [1, 2])
def test_at_B_zero_the_term_leaves_B_alone(power, weight, x):
    """METHODS 2.3: a saddle of value r, where only the loss moves B; of MPC_d with power 1 a corner of value 0."""
    for method, value in (("mpc_o", RANK), ("mpc_d", 0)):
        adapter = make(method, weight, power=power, weight=1.0)
        A, B = (t.double() for t in adapter.trained())
        expected = value ** (power / 2) + torch.linalg.norm(A @ A.T - torch.eye(RANK)) ** power
        assert torch.allclose(adapter.constraint((A, B)), expected)
        adapter.penalty_share = 1.0
        adapter(x).sum().backward()
        plain = make_plain("lora", weight)
        plain(x).sum().backward()
        assert torch.equal(adapter.B.grad, plain.B.grad)
        assert adapter.A.grad.any() and not plain.A.grad.any()


def test_layer_is_the_method_below(weight, x):
    over = make("mpc_o", weight, over="flora", inner={"scaling": "rslora", "init": "normal"})
    config = AdapterConfig(
        method="flora", rank=RANK, alpha=8.0, dropout=0.0,
        options=ADAPTER_SPECS["flora"].options(scaling="rslora", init="normal"),
    )  # fmt: skip
    plain = start(adapter_of(make_base("dense-fp32", weight), config))
    assert over.state_dict().keys() == plain.state_dict().keys()
    for layer in (over, plain):
        trained_away_from_start(layer)
    assert torch.equal(over(x), plain(x))
    assert torch.equal(over.merged(weight), plain.merged(weight))
    assert make("mpc_o", weight, over="lora", inner={"lr_ratio": 16.0}).lr_scales() == {"B": 16.0}


# -- the recipe --


def options_in(folder: Path, **options: object) -> MpcOptions:
    recipe = {
        "model": {"config": {"model_type": "llama"}, "weights": "random"},
        "adapter": {"method": "mpc_d", "options": options},
        "data": {"train": [{"path": "x"}]},
        "train": {"max_steps": 1},
    }
    made = parse(json.dumps(recipe), where="test", base_dir=folder).adapter.typed_options()
    assert isinstance(made, MpcOptions)
    return made


def test_inner_options_are_filled_in(tmp_path):
    made = options_in(tmp_path, over="flora", inner={"init": "normal"}, reduction="sum")
    assert isinstance(made, WrapperOptions)
    assert (made.over, made.inner, made.reduction) == (
        "flora",
        {"scaling": "alpha/r", "init": "normal"},
        "sum",
    )


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"over": "trilra"}, r"options\.over: found the text 'trilra', expected one of lora", "did you mean trilora?"),
        ({"over": "vera"}, r"options\.over: found the text 'vera', expected one of lora", ""),
        ({"inner": {"scalin": "rslora"}}, r"options\.inner\.scalin: unknown key", "did you mean scaling?"),
        ({"inner": {"lambda_init": 1.0}}, r"options\.inner\.lambda_init: unknown key", "option of delora, not of lora"),
        ({"inner": {"scaling": "rslra"}}, r"inner\.scaling: .* expected one of alpha/r, rslora", "mean rslora?"),
        ({"inner": {"lr_ratio": "much"}}, r"inner\.lr_ratio: found the text 'much', expected a number", ""),
        ({"inner": [1]}, r"options\.inner: found a list of 1, expected a section", ""),
        ({"over": "map", "inner": {"over": "flora", "inner": {"ini": 1}}}, r"inner\.inner\.ini: unknown key", "init?"),
    ],
)  # fmt: skip
def test_inner_options_are_checked(options, message, hint, tmp_path):
    with pytest.raises(RecipeError, match=message) as caught:
        options_in(tmp_path, **options)
    assert hint in str(caught.value)


@pytest.mark.parametrize("method", ["mpc_o", "mpc_d"])
def test_adalora_under_map_has_the_term_already(method, tmp_path):
    with pytest.raises(RecipeError, match="adalora has MPC_o in it"):
        options_in(tmp_path, over="map", inner={"over": "adalora"})
    with pytest.raises(ValueError, match="adalora has MPC_o in it"):
        ADAPTER_SPECS[method].options(over="map", inner={"over": "adalora"})


def test_options_of_two_methods_below_are_filled_in_without_a_recipe():
    """The inner one's defaults are those of the method that it names, not of map's own default."""
    made = MpcOptions(over="map", inner={"over": "flora"})
    assert made.inner["inner"] == {"scaling": "alpha/r", "init": "kaiming"}
    with pytest.raises(TypeError, match="scalin"):
        MpcOptions(over="lora", inner={"scalin": "rslora"})


def test_options_under_an_override_are_checked(tmp_path):
    override = {"targets": "q_proj", "method": "mpc_o", "options": {"inner": {"scalin": "rslora"}}}
    recipe = {
        "model": {"config": {"model_type": "llama"}, "weights": "random"},
        "adapter": {"method": "lora", "overrides": [override]},
        "data": {"train": [{"path": "x"}]},
        "train": {"max_steps": 1},
    }
    with pytest.raises(RecipeError, match=r"overrides\[0\]\.options\.inner\.scalin: unknown key") as caught:
        parse(json.dumps(recipe), where="test", base_dir=tmp_path)
    assert "did you mean scaling?" in str(caught.value)


# -- a run --


@pytest.mark.dist
def test_term_is_added_once_a_step_whatever_the_split(tmp_path):
    """Ranks and micro batches; of the same weight the same curve, of twice the weight another."""

    def curve(name: str, micro: int, parallel: dict[str, object], weight: float = 2.0) -> list[float]:
        run = make_run(
            tmp_path,
            name,
            adapter={"method": "mpc_o", "options": {"weight": weight, "reduction": "sum"}},
            train={"max_steps": 4, "learning_rate": 0.02, "global_batch_size": 4, "micro_batch_size": micro},
            parallel=parallel,
        )
        run_ranks(run)
        return losses(run)

    whole = curve("whole", 4, {})
    tolerance = 1e-4  # float32, as in test_matrix
    assert curve("parts", 1, {}) == pytest.approx(whole, rel=tolerance)
    for name in ("ddp", "fsdp"):
        assert curve(name, 1, WORLDS[name]) == pytest.approx(whole, rel=tolerance)
    other = curve("twice", 4, {}, weight=4.0)
    assert max(abs(a - b) / a for a, b in zip(whole, other, strict=True)) > 10 * tolerance
