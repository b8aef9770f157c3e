"""How long a step takes: arithmetic, the host's launches and the links, each summed; the slowest is waited for.

A micro batch's forward and backward pass run on the device; the host launches ahead of it, and what is cut over ranks
is gathered ahead of its use (a layer's gather hides behind the layer before). So a micro batch takes as long as the
slowest of the three, and what cannot hide is added: the first layer's gather, ddp's all-reduce (whole: how much of it
hides was not timed), the optimizer. Rows are read ahead and cost nothing. Gradients are not reduced before the last
micro batch. All ranks are equally fast: no straggler is simulated, nor evaluations; saves are the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from decompft.adapters.spec import spec_of
from decompft.launcher.collectives import Fabric, Group, all_gather_s, all_reduce_s
from decompft.launcher.cuda_graph import is_recorded
from decompft.launcher.forecast_recompute import norm_numbers
from decompft.launcher.models import LinearShape
from decompft.launcher.plan import StepTime, TimeTerm
from decompft.launcher.rates import (
    FORWARD_SHARE,
    METHOD_LAYERS,
    METHODS,
    RECOMPUTING_GATHERS,
    UNCOUNTED,
    Rates,
)
from decompft.launcher.recompute import is_left_out, pieces_of, runs_again
from decompft.launcher.workload import Layout, Workload, compute_bytes, storage_bytes, weight_bytes

# a guess: the inputs' copies to the host and back, beside the products
OFFLOAD_DEARER = 1.03
GRADIENT_BYTES = 4
TENSORS_OF_A_BASE = 2  # codes and scales


@dataclass(frozen=True, kw_only=True, slots=True)
class _Micro:
    """Seconds of one micro batch, each resource by itself."""

    forward: float
    backward: float
    again: float  # recomputing
    host: float
    links: float
    exposed: float  # links, whatever else happens

    @property
    def device(self) -> float:
        return self.forward + self.backward + self.again

    def seconds(self, *, overlaps: bool) -> float:
        if not overlaps:
            return self.device + self.host + self.links + self.exposed
        return max(self.device, self.host, self.links) + self.exposed


def simulate(
    work: Workload, layout: Layout, rates: Rates, fabric: Fabric, *, nodes: int, accumulation: int
) -> StepTime:
    """Seconds of an optimizer step of the slowest kind of rank, by what they go to.

    Args:
        nodes: over which the layout's ranks are spread evenly.
        accumulation: micro batches of a rank and step.
    """
    micro, last = (_micro(work, layout, rates, fabric, nodes, reduces=r) for r in (False, True))
    if layout.strategy in ("zero2", "zero3"):
        micro = last  # DeepSpeed cuts gradients as soon as they are there
    first, rest = last.seconds(overlaps=rates.overlaps), micro.seconds(overlaps=rates.overlaps)
    total = first + (accumulation - 1) * rest
    n = accumulation
    device, host = n * micro.device, n * micro.host
    waits_for_host = n * max(0.0, micro.host - micro.device) if rates.overlaps else host
    after = _after(work, layout, fabric, nodes)
    tail = rates.tail_s.get(layout.strategy, 0.0) * _num_trained_tensors(work)
    links = max(0.0, total - device - waits_for_host)
    found = (
        ("forward", n * micro.forward, "products of frozen weights, attention, head"),
        ("backward", n * micro.backward, "the same for the input's gradient; no weight's"),
        ("recomputation", n * micro.again, "forward again"),
        ("waiting for the host", waits_for_host, "it launches kernels more slowly than they run"),
        (
            "waiting for links",
            links + after,
            "gathered weights and reduced gradients that hide behind nothing",
        ),
        ("clipping and optimizer", tail, f"{_num_trained_tensors(work):,} trained tensors"),
    )
    slowest = {"arithmetic": device, "host's launches": host + tail, "links": n * micro.links + links + after}
    terms = tuple(
        TimeTerm(name=name, seconds=seconds, note=note) for name, seconds, note in found if seconds > 0
    )
    return StepTime(device=rates.name, terms=terms, limit=max(slowest, key=slowest.__getitem__))


def flops(work: Workload, tokens: int) -> tuple[float, float]:
    """(forward, backward) FLOPs of so many tokens.

    2 a frozen weight each way; 2 a number of an adapter forward and 4 backward, which is what low-rank factors take;
    causal attention is half of 2 products forward, of 4 backward.
    """
    shape = work.shape
    weights = sum(shape.count(x) * x.num_weights for x in shape.linears) + shape.head.num_weights
    attention = work.recipe.data.sequence_length * shape.num_heads * shape.head_dim * shape.num_layers
    adapters = work.num_adapter_params
    forward = 2.0 * weights + 2.0 * adapters + 2.0 * attention
    return tokens * forward, tokens * (2.0 * weights + 4.0 * adapters + 4.0 * attention)


def _again(work: Workload, layout: Layout, rates: Rates, forward_s: float) -> float:
    """The part of a forward pass that is run again in the backward pass; `none` and `full` were measured."""
    if layout.recompute == "norms":  # by time, which goes into reading and writing
        tokens = layout.micro_size * work.recipe.data.sequence_length
        numbers = 2 * norm_numbers(work.shape) * work.shape.num_layers * tokens
        return numbers * compute_bytes(work.recipe) / rates.norm_bytes_per_s / forward_s
    if layout.recompute == "none":
        return 0.0
    pieces, linears = pieces_of(work.shape.model_type), work.shape.linears
    if layout.recompute == "selective":
        assert pieces is not None, f"the planner takes full for {work.shape.model_type}"
        chosen = [x for x in linears if runs_again(x.name, pieces)]
    else:
        chosen = [x for x in linears if not is_left_out(x.name, pieces)]
    layers = work.shape.num_layers
    blocks = layers if layout.recompute_blocks is None else layout.recompute_blocks
    share = _weights(work, chosen) / _weights(work, linears) * blocks / layers
    return share * (OFFLOAD_DEARER if layout.recompute == "offloaded" else 1.0)


def _weights(work: Workload, linears: Iterable[LinearShape]) -> int:
    return sum(x.num_weights * work.shape.count(x) for x in linears)


def _micro(
    work: Workload, layout: Layout, rates: Rates, fabric: Fabric, nodes: int, *, reduces: bool
) -> _Micro:
    launches, dearer = _method(work)
    forward, backward = flops(work, layout.micro_size * work.recipe.data.sequence_length)
    scale = dearer / (rates.fp8_flops if _is_fp8(work) and rates.fp8_flops else rates.flops)
    again = _again(work, layout, rates, forward * scale)
    host = 0.0  # one launch
    if not is_recorded(work.recipe, layout):
        host = launches * work.shape.num_layers * rates.launch_s * (1 + again * FORWARD_SHARE)
    host += _engine_host_s(work, layout, rates, again)
    links, exposed = _gather_s(work, layout, fabric, nodes)
    if reduces:
        links += _reduce_s(work, layout, fabric, nodes)
    return _Micro(
        forward=forward * scale, backward=backward * scale, again=again * forward * scale, host=host, links=links,
        exposed=exposed,
    )  # fmt: skip


def _is_fp8(work: Workload) -> bool:
    return work.recipe.quantization.compute == "fp8"


def _method(work: Workload) -> tuple[float, float]:
    """Launches a layer, and GPU time over LoRA's: the mean over adapted linears."""
    found = [METHODS.get(config.method, METHODS[UNCOUNTED]) for *_, config in work.adapted]
    launches = sum(n for n, _ in found) / len(found) / METHOD_LAYERS
    return launches, sum(share for _, share in found) / len(found)


def _engine_host_s(work: Workload, layout: Layout, rates: Rates, again: float) -> float:
    """What the engine's own Python takes of a micro batch."""
    passes = 2 + (again if layout.strategy in RECOMPUTING_GATHERS else 0)
    if layout.strategy == "zero3":
        return passes * rates.zero3_gather_s * len(work.adapted)
    if layout.spec.shards_base:
        return passes * rates.gather_s * (_num_base_tensors(work) + _num_matrices(work))
    if layout.spec.is_deepspeed:
        return rates.zero_hook_s * _num_trained_tensors(work)
    return 0.0


def _gather_s(work: Workload, layout: Layout, fabric: Fabric, nodes: int) -> tuple[float, float]:
    """Seconds of links for gathering in a micro batch: what can hide, and what cannot."""
    if layout.shard_size == 1:
        return 0.0, 0.0
    group, num_layers = _shard_group(layout, nodes), work.shape.num_layers
    base = sum(sum(weight_bytes(x, work.recipe)) for x in work.shape.linears if x.per_layer)
    layer = all_gather_s(base + work.num_adapter_params * GRADIENT_BYTES / num_layers, group, fabric)
    root = all_gather_s(work.shape.head.num_weights * storage_bytes(work.recipe), group, fabric)
    # forward and backward; nothing runs beside the root's and the first layer's, nor the last layer's backward
    return (2 * num_layers - 2) * layer, 2 * layer + root


def _reduce_s(work: Workload, layout: Layout, fabric: Fabric, nodes: int) -> float:
    """Seconds of links for the gradients that are reduced beside the backward pass."""
    if layout.gradient_shards == 1:
        return 0.0
    num_bytes = work.num_trained * GRADIENT_BYTES
    group, num_layers = _shard_group(layout, nodes), work.shape.num_layers
    seconds = num_layers * all_gather_s(num_bytes / num_layers, group, fabric)
    copies = layout.world_size // group.ranks
    if copies > 1:
        across = Group(ranks=copies, nodes=min(copies, nodes), at_once=group.ranks)
        seconds += num_layers * all_reduce_s(num_bytes / num_layers / group.ranks, across, fabric)
    return seconds


def _after(work: Workload, layout: Layout, fabric: Fabric, nodes: int) -> float:
    """Seconds of links after the last backward pass."""
    everyone = Group(ranks=layout.world_size, nodes=nodes)
    num_bytes = work.num_trained * GRADIENT_BYTES
    if layout.gradient_shards == 1 and layout.strategy != "single":
        seconds = all_reduce_s(num_bytes, everyone, fabric)
    else:
        seconds = 0.0
    if layout.strategy in ("zero1", "zero2"):  # each rank has stepped its part
        seconds += all_gather_s(num_bytes, everyone, fabric)
    return seconds


def _shard_group(layout: Layout, nodes: int) -> Group:
    ranks = max(layout.shard_size, layout.gradient_shards)
    in_node = layout.world_size // nodes
    return Group(ranks=ranks, nodes=max(1, ranks // in_node), at_once=max(1, in_node // ranks))


def _num_base_tensors(work: Workload) -> int:
    return TENSORS_OF_A_BASE * sum(work.shape.count(x) for x in work.shape.linears)


def _num_matrices(work: Workload) -> int:
    """Trained matrices, which fsdp cuts; vectors stay whole."""
    shapes = (spec_of(c).tensors(out, in_, c).values() for _, out, in_, c in work.adapted)
    return sum(len(shape) > 1 for found in shapes for shape in found)


def _num_trained_tensors(work: Workload) -> int:
    return sum(len(spec_of(c).tensors(out, in_, c)) for _, out, in_, c in work.adapted)
