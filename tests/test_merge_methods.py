"""Every method that is a change of weights merges: one model whose layers each carry another one."""

from __future__ import annotations

import json

import pytest
import torch
from test_adapter_contract import NOT_MERGEABLE, VARIANTS
from test_every_method import MODULES, SOON
from test_merge import CLOSE, TOKENS, adapter_of, plain_logits, quiet, unmerged_logits
from tiny import LLAMA, make_run, run_ranks
from transformers import AutoModelForCausalLM

from decompft.launcher.errors import AdapterError
from decompft.launcher.worker.inference import load, open_adapter
from decompft.launcher.worker.merging import merge

pytestmark = pytest.mark.dist

MERGEABLE = {name: variant for name, variant in VARIANTS.items() if name not in NOT_MERGEABLE}
NUM_LAYERS = -(-len(MERGEABLE) // len(MODULES))
BIASED = {**LLAMA, "num_hidden_layers": NUM_LAYERS, "attention_bias": True, "mlp_bias": True}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The adapter of a run of some steps; the n-th linear layer carries the n-th variant."""
    places = [f"model.layers.{i}.{module}" for i in range(NUM_LAYERS) for module in MODULES]
    overrides = [
        {"targets": place, "method": method, "options": {**SOON.get(method, {}), **options}}
        for place, (method, options) in zip(places, MERGEABLE.values(), strict=False)
    ]
    run = make_run(
        tmp_path_factory.mktemp("methods"),
        model={"config": BIASED},
        adapter={"method": "lora", "rank": 4, "alpha": 8.0, "overrides": overrides},
        train={"max_steps": 6, "learning_rate": 0.01, "global_batch_size": 2},
    )
    run_ranks(run)
    return run.path / "adapter"


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy, whose description a test may change."""
    import shutil

    return shutil.copytree(trained, tmp_path / "adapter")


@pytest.mark.parametrize("into", ["dequantized", "dense"])
def test_every_method_merges_to_what_it_computes(adapter, tmp_path, into):
    out = tmp_path / "out"
    unmerged = merge(open_adapter(adapter, base=None, say=quiet), into, out, progress=quiet)
    found = plain_logits(out)
    torch.testing.assert_close(found, unmerged_logits(adapter, into), **CLOSE)
    bare = load(adapter, base=None, use_adapter=False, say=quiet).model
    with torch.inference_mode():
        assert (bare.logits(TOKENS, None) - found).abs().max() > 0.01, "the adapters should matter"
    if into == "dense":
        assert 0 < unmerged.error < 1e-4 and unmerged.layer


def test_every_method_is_quantized_again(adapter, tmp_path):
    opened = open_adapter(adapter, base=None, say=quiet)
    merge(opened, "dense", tmp_path / "dense", progress=quiet)
    merge(opened, "requantized", tmp_path / "nf4", progress=quiet)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).state_dict()
    again = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32).dequantize().state_dict()
    )
    assert dense.keys() == again.keys()
    for name, weight in dense.items():
        error = torch.linalg.norm(again[name] - weight) / torch.linalg.norm(weight).clamp_min(1e-9)
        # nf4's rounding error of normal weights is 9 % (docs/base.md)
        assert error < 0.15 if name.endswith("proj.weight") else error == 0, name


def test_a_bias_where_the_model_has_none_is_refused(tmp_path):
    adapter = adapter_of(tmp_path, adapter={"method": "bitfit"})
    with pytest.raises(AdapterError, match="has learned a bias, and a plain LlamaForCausalLM has none"):
        merge(open_adapter(adapter, base=None, say=quiet), "dense", tmp_path / "out", progress=quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["method", "overrides"])
def test_what_is_no_change_of_weights_is_refused_wherever_it_is(adapter, tmp_path, place):
    other = next(iter(NOT_MERGEABLE))
    description = json.loads((adapter / "adapter.json").read_text())
    if place == "method":
        description["adapter"] |= {"method": other, "options": {}}
    else:
        description["adapter"]["overrides"][-1] |= {"method": other, "options": {}}
    (adapter / "adapter.json").write_text(json.dumps(description))
    with pytest.raises(AdapterError, match=f"{other} is no change of weights"):
        merge(open_adapter(adapter, base=None, say=quiet), "dense", tmp_path / "out", progress=quiet)
