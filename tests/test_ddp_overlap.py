"""What ddp sums, and when: in two stretches, the upper while the backward pass still runs, to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from tiny import fork
from torch import Tensor, nn

from decompft.launcher.worker.engines.ddp import DdpEngine

pytestmark = pytest.mark.dist

NUM_BLOCKS, WIDTH, MICRO_BATCHES = 6, 8, 3


class Blocks(nn.Module):
    """Blocks that are used in an order of one's own; those that are left out get no gradient."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.order = order
        self.blocks = nn.ParameterList(
            nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator)) for _ in range(NUM_BLOCKS)
        )

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = torch.tanh(x @ self.blocks[index])
        return x.square().sum()


@dataclass
class Rank:
    """A model under ddp in a forked rank, and its twin, whose gradients one all-reduce sums."""

    rank: int
    order: tuple[int, ...]
    keeps: bool = False
    events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = DdpEngine(torch.device("cpu"), timeout_s=60)
        self.engine.start()
        self.model, self.twin = Blocks(self.order), Blocks(self.order)
        parameters = list(self.model.parameters())
        self.engine.prepare_training(self.model, torch.optim.SGD(parameters), parameters)
        if self.keeps:
            self.engine.keep_gradients(parameters)
        self.model.blocks[0].register_post_accumulate_grad_hook(lambda _: self.events.append("first block"))
        all_reduce = dist.all_reduce

        def watched(tensor: Tensor, *args: object, **kwargs: object) -> dist.Work | None:
            self.events.append(f"sum of {tensor.numel()}")
            return all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = watched

    def step(self, seed: int) -> tuple[list[str], Tensor, Tensor]:
        """What happened in a step, its summed gradients and the twin's."""
        self.events.clear()
        generator = torch.Generator().manual_seed(100 * seed + self.rank)
        batches = torch.randn(MICRO_BATCHES, 4, WIDTH, generator=generator)
        for index, batch in enumerate(batches):
            with self.engine.accumulate(last=index == MICRO_BATCHES - 1):
                self.engine.backward(self.model(batch))
        self.engine.reduce_gradients()
        events, mine = list(self.events), self.engine.gradients().clone()
        self.engine.zero_gradients(list(self.model.parameters()))
        self.twin.zero_grad()
        for batch in batches:
            self.twin(batch).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.twin.parameters()]
        whole = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(whole)
        return events, mine, whole


def on_two_ranks(
    order: Callable[[int], tuple[int, ...]], expected: list[str], *, keeps: bool = False
) -> None:
    """Two steps of two ranks, each with its own order of blocks and the same bits as one all-reduce."""

    def work(rank: int) -> None:
        this = Rank(rank, order(rank), keeps)
        for seed in (1, 2):
            events, mine, whole = this.step(seed)
            assert torch.equal(mine, whole)
            assert mine.count_nonzero() > 0
            assert [e for e in events if rank == 0 or e != "first block"] == [
                e for e in expected if rank == 0 or e != "first block"
            ]
        this.engine.stop()

    fork(work, 2)


BLOCK = WIDTH * WIDTH
UPPER, LOWER = (
    f"sum of {(NUM_BLOCKS - 1) * BLOCK}",
    f"sum of {BLOCK}",
)  # an eighth of six blocks is within the first
FORWARD = tuple(range(NUM_BLOCKS))
AT_THE_END = ["first block"] * MICRO_BATCHES + [UPPER, LOWER]


def test_the_upper_stretch_is_summed_before_the_last_backward_pass_has_ended() -> None:
    expected = ["first block"] * (MICRO_BATCHES - 1) + [UPPER, "first block", LOWER]
    on_two_ranks(lambda rank: FORWARD, expected)


def test_parameters_used_in_another_order_than_they_lie_are_summed_when_all_are_there() -> None:
    on_two_ranks(lambda rank: FORWARD[::-1], AT_THE_END)


def test_a_parameter_without_gradient_leaves_its_stretch_to_the_end() -> None:
    on_two_ranks(lambda rank: FORWARD[:-2], AT_THE_END)


def test_a_parameter_without_gradient_on_one_rank_keeps_the_order_of_both() -> None:
    on_two_ranks(lambda rank: FORWARD if rank else FORWARD[:-2], AT_THE_END)


def test_a_parameter_used_twice_is_summed_with_both_uses() -> None:
    expected = ["first block"] * (MICRO_BATCHES - 1) + [UPPER, "first block", LOWER]
    on_two_ranks(lambda rank: (0, *FORWARD[1:], NUM_BLOCKS - 1, 1), expected)


def test_gradients_of_recorded_passes_are_summed_at_the_end() -> None:
    on_two_ranks(lambda rank: FORWARD, AT_THE_END, keeps=True)


def test_a_single_tensor_is_one_sum() -> None:
    def work(rank: int) -> None:
        engine = DdpEngine(torch.device("cpu"), timeout_s=60)
        engine.start()
        parameter = nn.Parameter(torch.ones(3))
        engine.prepare_training(nn.Module(), torch.optim.SGD([parameter]), [parameter])
        with engine.accumulate(last=True):
            engine.backward((parameter * (rank + 1)).sum())
        engine.reduce_gradients()
        assert engine.gradients().tolist() == [3.0, 3.0, 3.0]
        engine.stop()

    fork(work, 2)


def test_one_rank_sums_nothing() -> None:
    def work(rank: int) -> None:
        this = Rank(rank, FORWARD)
        for index in range(MICRO_BATCHES):
            with this.engine.accumulate(last=index == MICRO_BATCHES - 1):
                this.engine.backward(this.model(torch.ones(1, WIDTH)))
        this.engine.reduce_gradients()
        assert this.events == ["first block"] * MICRO_BATCHES

    fork(work, 1)
