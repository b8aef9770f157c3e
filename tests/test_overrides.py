"""Layers of one model with different adapters: what a recipe may say, and what is trained then."""

from __future__ import annotations

import json
from pathlib import Path

import planning
import pytest
import torch
from safetensors.torch import load_file
from test_recipe_source import error
from tiny import losses, make_run, run_ranks

from decompft.adapters.inject import adapters
from decompft.launcher.errors import AdapterError
from decompft.launcher.recipe import AdapterSection
from decompft.launcher.worker.build import outline_of
from decompft.launcher.workload import workload

HEAD = "model: {id: m}\ndata: {train: [{path: d.jsonl}]}\ntrain: {max_steps: 1}\nadapter:\n"


def configs(**adapter: object) -> dict[str, tuple[str, int]]:
    """Layer -> method and rank, as the planner sees them and as they are built: both must agree."""
    recipe = planning.recipe(planning.TINY, adapter=adapter)
    shape = planning.read_shape(recipe)
    planned = {name: (c.method, c.rank) for name, _, _, c in workload(shape, recipe).adapted}
    hf = outline_of(recipe.model, recipe.quantization, recipe.adapter, None).hf
    assert planned == {name: (a.config.method, a.config.rank) for name, a in adapters(hf)}
    return planned


def test_ranks_and_methods_differ_by_pattern_and_the_later_wins():
    found = configs(
        method="lora",
        rank=4,
        overrides=[
            {"targets": "mlp.*", "method": "map", "rank": 8},
            {"targets": ["down_proj"], "rank": 2},
            {"targets": "layers.0.*", "skip": True},
        ],
    )
    assert found == {
        f"model.layers.1.{name}": ("lora", 4)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    } | {
        "model.layers.1.mlp.gate_proj": ("map", 8),
        "model.layers.1.mlp.up_proj": ("map", 8),
        "model.layers.1.mlp.down_proj": ("lora", 2),  # each starts from the section, not from the one before
    }


def test_a_regularisers_mean_is_over_the_layers_that_have_it():
    """Of AdaLoRA's A and B whether under map or not; of map's over other methods none."""
    over = {"method": "map", "options": {"over": "adalora"}}
    adapter = {
        "method": "map",
        "targets": "layers.0.*",
        "overrides": [
            {"targets": ["q_proj", "k_proj"], **over},
            {"targets": "v_proj", "method": "adalora"},
            {"targets": ["o_proj", "up_proj"], "method": "mpc_o"},
            {"targets": "down_proj", "method": "mpc_o", "options": {"over": "map"}},
        ],
    }
    recipe = planning.recipe(planning.TINY, adapter=adapter)
    hf = outline_of(recipe.model, recipe.quantization, recipe.adapter, None).hf
    counts = {name.rpartition(".")[2]: a.num_siblings for name, a in adapters(hf)}
    del counts["gate_proj"]  # map over lora, which has none
    assert counts == {"q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 3, "up_proj": 3, "down_proj": 3}


def test_options_are_kept_within_a_method_and_start_anew_with_another():
    section = AdapterSection.model_validate(
        {
            "method": "map", "options": {"b_init": 0.5, "eps": 1e-5},
            "overrides": [
                {"targets": "q_proj", "options": {"b_init": 2.0}},
                {"targets": "k_proj", "method": "lora", "alpha": 64.0, "dropout": 0.5},
            ],
        }
    )  # fmt: skip
    mine, other = (section.config(o) for o in section.overrides)
    assert (mine.options.b_init, mine.options.eps, mine.alpha) == (2.0, 1e-5, 32.0)
    assert (other.method, other.alpha, other.dropout, other.options.scaling) == ("lora", 64.0, 0.5, "alpha/r")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("{targets: q_proj}", "changes nothing"),
        ("{targets: q_proj, skip: true, rank: 2}", "no adapter for rank"),
        ("{targets: q_proj, rnk: 2}", "did you mean rank"),
        ("{targets: q_proj, method: lroa}", "lora"),
        ("{targets: q_proj, method: lora, options: {settle_norm: 1.0}}", "it is an option of map"),
        ("{targets: q_proj, options: {scalng: rslora}}", "scalng"),
    ],
)
def test_a_wrong_override_is_said_in_words(override, words):
    text = f"{HEAD}  method: lora\n  overrides:\n    - {override}\n"
    told = error(text)
    assert words in f"{told} {told.hint}"
    assert "overrides" in str(told)


def test_an_override_of_layers_without_an_adapter_is_refused():
    with pytest.raises(AdapterError, match=r"adapter.overrides\[0\].targets: 'mlp"):
        configs(targets=["q_proj"], overrides=[{"targets": "mlp.*", "rank": 2}])
    with pytest.raises(AdapterError, match="skip every layer"):
        configs(targets=["q_proj"], overrides=[{"targets": "q_proj", "skip": True}])


def test_delta_lora_is_known_and_refused_with_its_reason():
    told = error(f"{HEAD}  method: delta_lora\n")
    assert "changes the base weight itself" in f"{told} {told.hint}"


@pytest.mark.dist
def test_a_run_with_two_methods_trains_both_and_says_so(tmp_path: Path):
    overrides = [
        {"targets": "mlp.*", "method": "lora", "rank": 2},
        {"targets": ["k_proj"], "skip": True},
    ]
    run = make_run(tmp_path, adapter={"method": "map", "rank": 4, "overrides": overrides})
    run_ranks(run)
    assert losses(run)[-1] < losses(run)[0]
    tensors = load_file(run.path / "adapter" / "adapter.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.A"].shape == (4, 64)
    assert tensors["model.layers.0.mlp.up_proj.A"].shape == (2, 64)
    assert "model.layers.0.mlp.up_proj.a" not in tensors
    assert all(torch.count_nonzero(t) for n, t in tensors.items() if n.endswith(".B"))
    assert not any("k_proj" in name for name in tensors)
    adapter = json.loads((run.path / "adapter" / "adapter.json").read_text())["adapter"]
    kept, asked = AdapterSection.model_validate(adapter), run.read_plan().recipe.adapter
    assert [o.model_dump() for o in kept.overrides] == [o.model_dump() for o in asked.overrides]
    text = (run.path / "adapter" / "adapter.json").read_text()
    assert '"formulas"' in text and "LoRA: W + s B A" in text and "MAP: a W/N(W)" in text
