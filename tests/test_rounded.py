"""Copies of thin factors in the compute dtype: the bits of a cast, and never those of yesterday."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from test_adapter_contract import IN, OUT, OWN_FORWARD, VARIANTS
from test_joint import Holder, holder, member, results
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from decompft.adapters.copies import round_factors
from decompft.adapters.frozen.rounded import copy_of, stacked_copy_of
from decompft.adapters.spec import spec_of

BF16 = torch.bfloat16


def inputs():
    return torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(9)).to(BF16)


class Casts(TorchDispatchMode):
    """Counts casts of matrices to bfloat16, and concatenations."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_cast = name == "_to_copy" and (kwargs or {}).get("dtype") == BF16 and args[0].dim() == 2
        self.count["cast"] += is_cast
        self.count["cat"] += name == "cat" and args[0][0].dim() == 2
        return func(*args, **(kwargs or {}))


def casts(model):
    with Casts() as found:
        results(model, inputs())
    model.zero_grad()
    return found.count["cast"], found.count["cat"]


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in OWN_FORWARD])
def test_a_step_over_copies_has_the_bits_of_a_step_that_casts(variant):
    model = holder(variant, variant, variant)
    expected = results(model, inputs())
    model.zero_grad()
    rounded = round_factors(model, BF16)
    rounded.refresh()
    assert_same_bits(results(model, inputs()), expected)


@pytest.mark.parametrize("variant", ["lora", "map"])
def test_no_factor_is_cast_or_stacked_again(variant):
    model = holder(variant, variant, variant, base_name="dense-bf16")
    before = casts(model)
    rounded = round_factors(model, BF16)
    rounded.refresh()
    alone = before[0] - 8, 0  # what the base does
    assert casts(model) == alone
    rounded.drop()
    assert casts(model) == before
    assert before[0] >= 8 and before[1] == 2  # three ups and the stacked downs, forward and backward


def test_recomputation_reads_the_copies_too():
    model = holder("lora", "lora", "lora", base_name="dense-bf16")
    rounded = round_factors(model, BF16)
    rounded.refresh()
    x = inputs().requires_grad_(True)
    with Casts() as found:
        checkpoint(model, x, use_reentrant=False).sum().backward()
    assert found.count["cast"] == found.count["cat"] == 0


def change_in_place(p):
    with torch.no_grad():
        p += 1


def take_other_memory(p):
    p.data = p.detach() + 1


@pytest.mark.parametrize("change", [change_in_place, take_other_memory])
def test_a_tensor_that_has_changed_has_no_copy(change):
    model = holder("lora", "lora", "lora")
    rounded = round_factors(model, BF16)
    rounded.refresh()
    change(model.k.A)
    assert copy_of(model.k.A, BF16) is None
    assert stacked_copy_of([model.q.A, model.k.A], BF16) is None
    assert copy_of(model.q.A, BF16) is not None
    found = results(model, inputs())
    rounded.drop()
    model.zero_grad()
    assert_same_bits(found, results(model, inputs()))
    rounded.refresh()
    assert torch.equal(copy_of(model.k.A, BF16), model.k.A.to(BF16))


def test_there_is_none_after_the_last_micro_batch():
    """Fused AdamW writes without counting a version: whoever writes between two steps finds no copy."""
    model = holder("lora", "lora", "lora")
    rounded = round_factors(model, BF16)
    assert copy_of(model.q.A, BF16) is None
    rounded.refresh()
    assert copy_of(model.q.A, BF16) is not None and copy_of(model.q.A, torch.float16) is None
    rounded.drop()
    model.q.A.grad = torch.ones_like(model.q.A)
    torch.optim.AdamW([model.q.A], lr=1.0, fused=True).step()
    assert copy_of(model.q.A, BF16) is None
    rounded.refresh()
    assert torch.equal(copy_of(model.q.A, BF16), model.q.A.to(BF16))


def test_a_backward_pass_after_the_next_refresh_is_refused():
    model = holder("lora", "lora", "lora")
    rounded = round_factors(model, BF16)
    rounded.refresh()
    y = model(inputs().requires_grad_(True))
    rounded.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in OWN_FORWARD])
def test_a_spec_says_what_has_copies(variant):
    model = Holder(member("lora"), member(variant), member(None))
    found = round_factors(model, BF16)
    own = model.k
    count = sum(p.numel() for p in own.parameters(recurse=False) if hasattr(p, "rounded"))
    assert count == spec_of(own.config).num_rounded(OUT, IN, own.config)
    others = sum(p.numel() for p in model.q.parameters(recurse=False))
    assert found.flat.numel() == count + others


def test_a_method_with_a_forward_of_its_own_has_none():
    model = Holder(member("lora"), member("liera"), member(None))
    assert round_factors(model, BF16).flat.numel() == sum(
        p.numel() for p in model.q.parameters(recurse=False)
    )


def test_a_float32_model_has_none():
    assert round_factors(holder("lora", "lora", "lora"), torch.float32).flat.numel() == 0
