"""What adapter.json says of formulas: the one that was trained, and whether it is a reading."""

import pytest

from decompft.launcher.recipe import AdapterSection
from decompft.launcher.worker.description import describe_adapter


def formulas(**section):
    return describe_adapter(AdapterSection(**section))["formulas"]


@pytest.mark.parametrize(("spec_mode", "core"), [("multiplicative", "m o S_k"), ("additive", "m")])
def test_the_title_is_the_formula_that_the_options_choose(spec_mode, core):
    found = formulas(method="speclora", options={"spec_mode": spec_mode})
    assert found["speclora"]["title"] == f"SpecLoRA: W + U_k diag({core}) V_k^T + s B A"
    assert found["speclora"]["is_reading"]


def test_layers_with_either_formula_have_both_titles():
    overrides = [
        {"targets": "q_proj", "options": {"spec_mode": "additive"}},
        {"targets": "k_proj", "rank": 2},
    ]
    title = formulas(method="speclora", overrides=overrides)["speclora"]["title"]
    assert title == "SpecLoRA: W + U_k diag(m o S_k) V_k^T + s B A; SpecLoRA: W + U_k diag(m) V_k^T + s B A"


@pytest.mark.parametrize("over", ["speclora", "lora_init", "lora_tsd"])
@pytest.mark.parametrize("method", ["mpc_o", "mpc_d"])
def test_what_stands_over_a_reading_is_one(method, over):
    found = formulas(method=method, options={"over": over})
    assert {name: entry["is_reading"] for name, entry in found.items()} == {method: True, over: True}


def test_what_stands_over_no_reading_is_none_and_names_all_below():
    found = formulas(method="mpc_o", options={"over": "map", "inner": {"over": "dora"}})
    assert {name: entry["is_reading"] for name, entry in found.items()} == {
        "mpc_o": False, "map": False, "dora": False,
    }  # fmt: skip
    skipped = {"targets": "q_proj", "skip": True}
    mixed = formulas(method="lora", overrides=[skipped, {"targets": "k_proj", "method": "lora_tsd"}])
    assert {name: entry["is_reading"] for name, entry in mixed.items()} == {"lora": False, "lora_tsd": True}
