"""Linears of one x in one autograd node: the numbers of each alone, and nothing that outlives the forward pass."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from test_adapter_contract import (
    IN,
    OUT,
    OWN_FORWARD,
    VARIANTS,
    config_of,
    make_adapter,
    make_base,
    trained_away_from_start,
)
from tiny_models import FAMILIES, NF4, PLAIN, built, row, saved, section
from torch import nn
from torch.utils.checkpoint import checkpoint

from decompft.adapters.inject import make_adapter as adapter_of
from decompft.adapters.joint import join, joints, part
from decompft.launcher.recipe import AdapterSection
from decompft.launcher.worker.data.batches import collate
from decompft.launcher.worker.joining import GROUPS

NAMES = ("q", "k", "v")
WIDE = ("svdiff", "svft")  # of all directions: their factors are no thinner than the weight
JOINABLE = [v for v in VARIANTS if v not in OWN_FORWARD and v not in WIDE]


class Holder(nn.Module):
    """Three linears of one x, their outputs used unequally."""

    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        for name, member in zip(NAMES, members, strict=True):
            self.add_module(name, member)

    def forward(self, x):
        return self.q(x).sin() * self.k(x) + self.v(x).square()


def member(variant, base_name="dense-fp32", seed=0, **kwargs):
    """An adapter away from its start; the bare base for None."""
    weight = 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))
    base = make_base(base_name, weight)
    return base if variant is None else trained_away_from_start(make_adapter(variant, base, **kwargs))


def holder(*variants, base_name="dense-fp32", joined=True, **kwargs):
    made = Holder(*(member(v, base_name, seed, **kwargs) for seed, v in enumerate(variants)))
    assert join(made, [NAMES]) == (0 if any(v in WIDE for v in variants) else 1)
    return made


def inputs(dtype=torch.float64):
    return torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(9), dtype=dtype)


def results(model, x):
    """y, dx and the gradient of all that trains."""
    x = x.clone().requires_grad_(True)
    y = model(x)
    y.sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def apart(model):
    alone = copy.deepcopy(model)
    part(alone)
    return alone


def nodes(y):
    """How many autograd nodes hold frozen linears."""
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
    return sum("FrozenLinears" in type(n).__name__ for n in seen)


def assert_same(model, x, **tolerance):
    found, expected = results(model, x), results(apart(model), x)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


MIXED = {
    "lora-bare-map": ("lora", None, "map"),
    "bare-ia3-dora": (None, "ia3", "dora"),
    "map-map-dora-mpc": ("map", "map-dora", "mpc_o"),
    "lora-flora-vera": ("lora", "flora", "vera"),
    "parallel-lora-bitfit": ("parallel", "lora", "bitfit"),
}


@pytest.mark.parametrize("variants", [*[(v,) * 3 for v in JOINABLE]], ids=JOINABLE)
def test_a_method_computes_what_its_linears_compute_alone(variants):
    model = holder(*variants).double()
    assert nodes(model(inputs())) == 1
    assert_same(model, inputs(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variants", MIXED.values(), ids=MIXED)
def test_members_of_different_methods(variants):
    variants = [v if v is None or v in VARIANTS else "mpc_n" for v in variants]
    model = holder(*variants).double()
    assert nodes(model(inputs())) == 1
    assert_same(model, inputs(), rtol=1e-12, atol=1e-12)


def test_members_of_different_ranks():
    model = holder("lora", "map", "lora")
    for name, rank in (("q", 2), ("v", 7)):
        config = config_of("lora")
        other = adapter_of(getattr(model, name).base, type(config)(**{**as_dict(config), "rank": rank}))
        with torch.no_grad():
            for parameter in other.parameters(recurse=False):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(rank))
        model.set_submodule(name, other)
    join(model, [NAMES])
    assert len(model._forward_hooks) == 1  # those of the first joint are gone
    model = model.double()
    assert nodes(model(inputs())) == 1
    assert_same(model, inputs(), rtol=1e-12, atol=1e-12)


def as_dict(config):
    return {name: getattr(config, name) for name in ("method", "rank", "alpha", "dropout", "options")}


@pytest.mark.parametrize("base_name", ["nf4-dq", "int8-outliers", "fp8"])
@pytest.mark.parametrize("variant", ["lora", "map", "dora"])
def test_over_a_quantized_base(variant, base_name):
    # float32 sums of 128 products in another order
    assert_same(holder(*(variant,) * 3, base_name=base_name), inputs(torch.float32), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["lora", "map", "dora"])
def test_bfloat16_is_as_near_to_float64_as_each_alone(variant):
    """Both round; what is compared is how far from the same formula without rounding."""
    model = holder(*(variant,) * 3)
    exact = results(apart(model).double(), inputs())
    one, alone = results(model, inputs().bfloat16()), results(apart(model), inputs().bfloat16())

    def error(found):
        return {n: (found[n].double() - t).norm() / t.norm() for n, t in exact.items()}

    near, far = error(one), error(alone)
    assert all(near[n] <= 1.2 * far[n] + 2**-9 for n in exact), (near, far)


def test_dropout_computes_alone_in_training():
    model = holder("lora", "lora", "lora", dropout=0.5).train()
    assert nodes(model(inputs(torch.float32))) == 3
    assert nodes(model.eval()(inputs(torch.float32))) == 1


def test_an_adapter_with_a_forward_of_its_own_stays_alone():
    model = Holder(member("lora"), member("liera"), member("lora"))
    assert join(model, [NAMES]) == 1
    assert model.k.joint is None
    assert_same(model.double(), inputs(), rtol=1e-12, atol=1e-12)


class Odd(Holder):
    """q of one x, k and v of another."""

    def forward(self, x):
        other = x * 2
        return self.q(x) * self.k(other) + self.v(other)


class Changing(Holder):
    """x is written over between two of its linears."""

    def forward(self, x):
        x = x * 1
        with torch.no_grad():
            first = self.q(x)
            x += 1
            return first * self.k(x) + self.v(x)


class Partly(Holder):
    """v is never called."""

    def forward(self, x):
        return self.q(x) * self.k(x)


class Mixed(Holder):
    """One of them computes without a gradient."""

    def forward(self, x):
        y = self.q(x)
        with torch.no_grad():
            z = self.k(x)
        return y * z + self.v(x)


class Twice(Holder):
    """In pieces, one after the other."""

    def forward(self, x):
        return torch.cat([self.q(p) * self.k(p) + self.v(p) for p in x.split(1)])


@pytest.mark.parametrize("kind", [Odd, Partly, Mixed, Twice])
@pytest.mark.parametrize("variant", ["lora", "map"])
def test_whoever_is_not_called_with_the_same_x_computes_alone(kind, variant):
    model = kind(*(member(variant, seed=s) for s in range(3)))
    join(model, [NAMES])
    assert_same(model.double(), inputs(), rtol=1e-12, atol=1e-12)
    assert_nothing_is_held(model)


def test_an_x_that_was_written_over_is_another():
    model = Changing(*(member("lora", seed=s) for s in range(3))).double()
    join(model, [NAMES])
    torch.testing.assert_close(model(inputs()), apart(model)(inputs()), rtol=1e-12, atol=1e-12)


def test_a_linear_called_by_itself_computes_alone():
    model = holder("lora", "lora", "lora")
    assert nodes(model.k(inputs(torch.float32))) == 1
    torch.testing.assert_close(model.k(inputs(torch.float32)), apart(model).k(inputs(torch.float32)))
    assert_nothing_is_held(model)


def assert_nothing_is_held(model):
    for joint in joints(model):
        assert not joint._outputs and joint._x is None and not joint.is_running


class Failing(Holder):
    def forward(self, x):
        self.q(x)
        raise ValueError("between")


def test_a_forward_pass_that_raises_leaves_nothing():
    model = Failing(*(member("lora", seed=s) for s in range(3)))
    join(model, [NAMES])
    x = inputs(torch.float32).requires_grad_(True)
    with pytest.raises(ValueError, match="between"):
        model(x)
    assert_nothing_is_held(model)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("variants", [("lora",) * 3, ("map",) * 3, ("map", None, "dora")])
def test_recomputation(variants, early_stop):
    model = holder(*variants).double()
    x = inputs().requires_grad_(True)
    for _ in range(2):  # the second pass finds what the first has left
        model.zero_grad()
        x.grad = None
        with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
            checkpoint(model, x, use_reentrant=False).sum().backward()
        assert_nothing_is_held(model)
    expected = results(apart(model), inputs())
    found = {"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)


def test_joining_again_and_parting():
    model = holder("lora", "lora", "lora")
    assert join(model, [NAMES]) == 1 and len(model._forward_hooks) == 1
    part(model)
    assert not list(joints(model)) and not model._forward_hooks and not model._forward_pre_hooks
    assert nodes(model(inputs(torch.float32))) == 3


def test_no_dense_weight_is_saved_and_x_is_saved_once():
    model = holder("map", "lora", "dora", base_name="nf4")
    x = inputs(torch.float32).requires_grad_(True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model.q(x)  # outside of the holder: alone
        kept.clear()
        y = model(x)
    assert nodes(y) == 1
    assert not [t for t in kept if t.shape == (OUT, IN)]
    assert sum(t.data_ptr() == x.data_ptr() for t in kept) == 1


# -- whole models ---------------------------------------------------------------------------------


def test_every_family_is_joined_or_has_nothing_to_join():
    types = {f["model_type"] for f in FAMILIES.values()} | {"bert"}
    assert types - set(GROUPS) == {"gpt2", "phi3"}
    assert set(GROUPS) <= types


BERT = {
    "model_type": "bert", "vocab_size": 120, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("name", [*(n for n in FAMILIES if FAMILIES[n]["model_type"] in GROUPS), "bert"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_models_own_forward_uses_every_member(name, recompute, tmp_path):
    """Each group computes once a pass, all its outputs are asked for, and the loss is that of linears alone."""
    is_bert = name == "bert"
    task = {"task": "sequence-classification"} if is_bert else {}
    folder, _ = saved(tmp_path, BERT if is_bert else FAMILIES[name], **task)
    adapter = AdapterSection(method="map", rank=4, alpha=8.0)
    base = NF4 if recompute == "full" else PLAIN
    made = built(section(folder, **task), base, adapter, recompute=recompute)
    model = made.model.train()
    joined = list(joints(model))
    assert len(joined) == model.config.num_hidden_layers * len(GROUPS[model.config.model_type])
    left = []
    for joint in joined:
        holder_of = next(m for m in model.modules() if joint._begin in m._forward_pre_hooks.values())
        holder_of.register_forward_hook(lambda *_, j=joint: left.append(len(j._outputs)), prepend=True)
    rows = [row((11,)), row((17,), seed=1)]
    if is_bert:
        rows = [
            type(r)(**{**{f: getattr(r, f) for f in r.__dataclass_fields__}, "label": i})
            for i, r in enumerate(rows)
        ]
    batch = collate(rows, pad_id=0)
    loss = model(batch)
    loss.backward()
    assert left and not any(left)
    grads = {n: p.grad.clone() for n, p in made.trained.items()}
    model.zero_grad()
    for joint in joined:
        assert not joint._outputs
    part(model)
    alone = model(batch)
    alone.backward()
    # float32 sums in another order, through two layers; a scalar's are of terms that nearly cancel, so that its error
    # is measured by the largest of its kind
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-5)
    largest: dict[str, float] = {}
    for n, p in made.trained.items():
        kind = n.rpartition(".")[2]
        largest[kind] = max(largest.get(kind, 0.0), p.grad.abs().max().item())
    for n, p in made.trained.items():
        near = 1e-4 * largest[n.rpartition(".")[2]]
        torch.testing.assert_close(grads[n], p.grad, rtol=1e-3, atol=near, msg=lambda m, n=n: f"{n}: {m}")
