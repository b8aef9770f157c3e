"""What the forecast says of recomputing norms, selective and offloaded recomputation, by hand."""

from __future__ import annotations

import pytest
from test_forecast import TINY, layout, run, work

from decompft.launcher.forecast import forecast
from decompft.launcher.forecast_fitted import GIB
from decompft.launcher.forecast_recompute import norm_numbers
from decompft.launcher.recompute import MODES


def test_norms_keep_all_but_what_norms_gave_by_hand() -> None:
    w = work(adapter={"rank": 4})
    none, norms = (run(w, micro_size=1, recompute=mode) for mode in ("none", "norms"))
    # of 2 layers: what q, k, v read, and what gate and up read
    assert none["activations"] - norms["activations"] == 2 * 2048 * 2 * 64 * 2
    assert "recomputed norm" not in norms  # less than the logits, which are gone by then
    # on a CPU the eager norms' own copies in float32 go, too: then an input of bfloat16 numbers is left
    none, norms = (run(w, micro_size=1, recompute=mode, device="cpu") for mode in ("none", "norms"))
    assert none["activations"] - norms["activations"] == 2 * 2048 * (2 * 64 * 2 + 2 * 64 * (4 - 2))
    assert "recomputed norm" not in norms


def test_norms_and_queries_that_are_normed_give_as_much_as_they_read() -> None:
    w = work(TINY | {"model_type": "qwen3", "head_dim": 32})
    assert norm_numbers(w.shape) == 2 * 64 + (4 + 2) * 32


def test_selective_keeps_norms_inputs_and_attention_by_hand() -> None:
    many_words = work(TINY | {"vocab_size": 1024}, adapter={"rank": 4})
    got = run(many_words, micro_size=1, recompute="selective")
    # per token: 2 norm inputs, q k v, attention's output; log-sum; A x of q, k, v, o and down
    elements = 2 * 64 + (64 + 2 * 32) + 64
    assert got["activations"] == 2048 * 2 * (elements * 2 + 4 * 4 + 5 * 4 * 2)
    # a norm's output, 3 x intermediate; A x of gate and up; less than the logits, which are gone by then
    again = 2048 * ((64 + 3 * 128) * 2 + 2 * 4 * 2)
    assert "recomputed MLP" not in got and again < got["logits and loss"]
    few_words = work(TINY | {"vocab_size": 8}, adapter={"rank": 4})
    small = run(few_words, micro_size=1, recompute="selective")
    assert "logits and loss" not in small and small["recomputed MLP"] == again


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_an_activation_of_copies_is_not_made_again(device) -> None:
    """Of halves of one output Liger's activation saves copies, and eager torch the halves."""
    phi3 = work(TINY | {"model_type": "phi3"})
    norms = run(phi3, micro_size=1, recompute="norms", device=device)
    some = run(phi3, micro_size=1, recompute="selective", recompute_blocks=0, device=device)
    less = 0 if device == "cuda" else 2 * 2048 * 128 * 2
    assert norms["activations"] - some["activations"] == less


def test_selective_in_some_layers_keeps_the_mlps_of_the_others_by_hand() -> None:
    few_words = work(TINY | {"vocab_size": 8}, adapter={"rank": 4})
    ways = ("selective", None), ("selective", 1), ("norms", None)
    every, one, norms = (
        run(few_words, micro_size=1, recompute=mode, recompute_blocks=some) for mode, some in ways
    )
    act = 2048 * 128 * 2
    mlp = 2048 * (3 * 128 * 2 + 2 * 4 * 2)
    # of the other the linears' outputs: the activation is made again
    assert one["activations"] == every["activations"] + mlp - act == norms["activations"] - mlp - act
    # the last layer's MLP is gone when the first's is made again
    assert every["recomputed MLP"] - mlp == 2048 * 64 * 2 < act < one["logits and loss"]
    assert "recomputed MLP" not in one


def test_llama7b_fits_into_34_gib_with_norms_and_20_with_selective() -> None:
    # the targets of micro batch 4
    w = work("meta-llama/Llama-2-7b-hf")
    totals = {m: forecast(w, layout(recompute=m), capacity_bytes=None).total_bytes / GIB for m in MODES}
    assert totals["norms"] < 34.5 and totals["none"] - totals["norms"] == pytest.approx(4.0, abs=0.001)
    assert totals["selective"] < 20 and list(totals.values()) == sorted(totals.values(), reverse=True)
