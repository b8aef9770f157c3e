"""FlexLoRA as METHODS 3 describes it: entropy of e, directions that end and begin, without the traps of its code."""

import math

import pytest
import torch
from planning import CPU, DENSE, TINY, make
from test_adapter_contract import RANK, config_of, make_base, start, trained_away_from_start

from decompft.adapters.allocation import entropy, exchange, num_exchanged
from decompft.adapters.inject import make_adapter
from decompft.adapters.window import window
from decompft.launcher.errors import PlanError
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.phase_exchange import Exchange
from decompft.launcher.worker.running import Running

S = 8.0 / (RANK + 1e-5)


@pytest.fixture
def weight() -> torch.Tensor:
    return 0.05 * torch.randn(24, 128, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, 128, generator=torch.Generator().manual_seed(3))


def adapted(weight, **options):
    return start(make_adapter(make_base("dense-fp32", weight), config_of("flexlora", **options)))


def test_forward_is_the_equation_over_live_directions(weight, x):
    adapter = trained_away_from_start(adapted(weight))
    live = adapter.mask.bool()
    assert live.sum() == RANK and len(live) == 2 * RANK
    A, B, e = adapter.A.double()[live], adapter.B.double()[:, live], adapter.e.double()[live]
    y = x.double() @ (weight.double() + S * B * e @ A).T + adapter.base.bias.double()
    torch.testing.assert_close(adapter(x).double(), y, rtol=1e-5, atol=1e-5)


def test_what_does_not_live_does_not_train(weight, x):
    adapter = trained_away_from_start(adapted(weight))
    adapter(x).square().sum().backward()
    dead = ~adapter.mask.bool()
    assert (
        not adapter.A.grad[dead].any()
        and not adapter.B.grad[:, dead].any()
        and not adapter.e.grad[dead].any()
    )
    assert adapter.A.grad[~dead].any()


@pytest.mark.parametrize(
    ("e", "expected"),
    [
        ([1.0, 1.0, 1.0, 0.0], 1.0),  # the last does not live
        ([1.0, -1.0, 1.0, 0.0], 1.0),  # signs do not matter
        ([1.0, 0.0, 0.0, 0.0], 0.0),
        ([0.0, 0.0, 0.0, 0.0], 1.0),  # 0/0: nothing is known yet
        ([2.0, 1.0, 1.0, 5.0], -(4 * math.log(4 / 6) + 2 * math.log(1 / 6)) / 6 / math.log(3)),
    ],
)
def test_entropy(e, expected):
    assert entropy(torch.tensor(e), torch.tensor([1.0, 1.0, 1.0, 0.0])) == pytest.approx(expected, abs=1e-12)


def test_a_single_direction_has_the_largest_entropy():
    """log 1 = 0 divides the authors' formula."""
    assert entropy(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])) == 1.0


def test_the_smallest_size_ends_and_not_the_smallest_number():
    """The authors' argmin(e) takes -9, the most important one."""
    e = [torch.tensor([-9.0, 0.1, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])]
    masks = [torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])]
    assert exchange(e, masks, 4) == ([(0, 1)], [(1, 2)])


def test_no_matrix_loses_its_last_or_grows_beyond_the_most():
    one, full = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    assert exchange([torch.tensor([1.0, 0.0])] * 2, [one, one], 4) == ([], [])
    assert exchange([torch.tensor([1.0, 0.1])] * 2, [full, full], 4) == ([], [])


def test_the_number_exchanged_decays_cubically_to_none():
    at = window(0.0, 0.0, 1, 101)
    assert [num_exchanged(4, at, s) for s in (0, 1, 50, 99, 100)] == [4, 4, 1, 1, 0]


def test_an_exchange_between_two_steps(weight, x):
    """What ends and begins, in tensors, masks and moments; the function changes by what ended alone."""
    torch.manual_seed(0)
    layers = {n: adapted(weight, init_warmup=0.0, final_warmup=0.0, interval=1) for n in "ab"}
    with torch.no_grad():
        layers["a"].e[:RANK] = torch.tensor([-9.0, 1e-9, 1.0, 0.5])
        layers["b"].e[:RANK] = 1.0
    trained = {f"{n}.{t}": p for n, a in layers.items() for t, p in a.named_parameters(recurse=False)}
    buffers = {f"{n}.{b}": t for n, a in layers.items() for b, t in a.named_buffers(recurse=False)}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0)
    sum(a(x).square().sum() for a in layers.values()).backward()
    optimizer.step()
    before = {n: a(x).detach() for n, a in layers.items()}
    engine = Engine(torch.device("cpu"), timeout_s=1)
    running = Running(trained=trained, buffers=buffers, optimizer=optimizer, engine=engine)
    Exchange(layers, running, total_steps=100, seed=7).advance(1)
    a, b = layers["a"], layers["b"]
    assert a.mask.tolist() == [1, 0, 1, 1, 0, 0, 0, 0] and b.mask.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert not a.A[1].any() and not a.B[:, 1].any() and a.e[1] == 0 and b.e[4] == 0
    assert b.A[4].std().item() == pytest.approx(0.02, rel=0.3) and b.B[:, 4].std().item() == pytest.approx(
        0.02, rel=0.5
    )
    for name, layer in layers.items():
        torch.testing.assert_close(layer(x), before[name], rtol=1e-5, atol=1e-6)
    for layer, direction, kept in ((a, 1, 0), (b, 4, 0)):
        for kind in ("exp_avg", "exp_avg_sq"):
            moments = {n: optimizer.state[getattr(layer, n)][kind] for n in ("A", "B", "e")}
            assert not moments["A"][direction].any() and moments["A"][kept].any()
            assert not moments["B"][:, direction].any() and moments["B"][:, kept].any()
            assert not moments["e"][direction] and moments["e"][kept]
    layers["b"].zero_grad()
    b(x).square().sum().backward()
    assert b.e.grad[4] != 0, "the new direction learns"


@pytest.mark.parametrize(
    ("rank", "options", "instead"),
    [
        (8, {"spare_rank": 25}, "use spare_rank <= 24, or adapter.rank <= 16 without spare_rank"),
        (24, {}, "use spare_rank <= 8, or adapter.rank <= 16"),
        (32, {}, "use adapter.rank <= 16"),
    ],
)
def test_more_directions_than_a_matrix_has_are_refused(rank, options, instead):
    """k_proj of the tiny model is 32 x 64."""

    def planned(rank, options):
        return make(CPU, TINY, **DENSE, adapter={"method": "flexlora", "rank": rank, "options": options})

    with pytest.raises(PlanError, match=r"spare_rank: .* more than a matrix of 32 x 64 has") as error:
        planned(rank, options)
    assert error.value.hint == instead
    assert planned(8, {"spare_rank": 24}).num_adapter_params and planned(16, {}).num_adapter_params
