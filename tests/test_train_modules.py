"""Modules trained whole beside the adapters: their gradients, their precision, their place in the adapter's file."""

from __future__ import annotations

import pytest
import torch
from planning import read_shape
from tiny import losses, make_run, run_ranks
from tiny_models import FAMILIES, NF4, PLAIN, built, row, saved, section
from torch.nn import functional as F

from decompft.launcher.errors import AdapterError
from decompft.launcher.models import trained_modules
from decompft.launcher.recipe import AdapterSection, QuantizationSection, Recipe
from decompft.launcher.recompute import MODES
from decompft.launcher.worker.data.batches import collate
from decompft.launcher.worker.restore import load_adapter

CASES = {
    "llama": ["embed_tokens", "lm_head", "norm", "layers.*.input_layernorm"],
    "phi": ["lm_head", "final_layernorm"],  # with biases
    "gemma": ["embed_tokens"],  # tied: the head's slope joins the embedding's
    "gemma2": ["lm_head", "model.layers.[0]*layernorm"],  # tied, and capped
    "gpt2": ["wte", "wpe", "ln_?"],
    "qwen3": ["*.q_norm"],
}


def adapter(*modules: str) -> AdapterSection:
    return AdapterSection(method="lora", rank=4, alpha=8.0, train_modules=list(modules))


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request, tmp_path_factory):
    return request.param, *saved(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])


def batch():
    return collate([row((13,)), row((17,), seed=1)], pad_id=0)


def plain_gradients(plain, names):
    """By plain autograd through transformers' own forward."""
    plain.requires_grad_(True).zero_grad()
    logits = plain(batch().input_ids).logits
    F.cross_entropy(
        logits.flatten(0, 1), batch().targets.flatten(), ignore_index=-100, reduction="sum"
    ).backward()
    return {n: plain.get_parameter(n).grad for n in names}


@pytest.mark.parametrize("recompute", MODES)
def test_gradients_are_those_of_plain_autograd(checkpoint, recompute):
    name, folder, plain = checkpoint
    found = built(section(folder), PLAIN, adapter(*CASES[name]), recompute=recompute)
    found.model.train()(batch()).backward()
    whole = {n: p for n, p in found.trained.items() if not n.endswith((".A", ".B"))}
    assert whole
    for n, expected in plain_gradients(plain, whole).items():
        # float32 sums over 30 tokens in another order, through two layers
        torch.testing.assert_close(
            whole[n].grad, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()
        )


def test_in_bfloat16_they_are_float32_and_so_are_their_gradients(checkpoint):
    name, folder, plain = checkpoint
    found = built(
        section(folder), QuantizationSection(format="none", compute="bfloat16"), adapter(*CASES[name])
    )
    found.model.train()(batch()).backward()
    whole = {n: p for n, p in found.trained.items() if not n.endswith((".A", ".B"))}
    for n, expected in plain_gradients(plain, whole).items():
        assert whole[n].dtype == whole[n].grad.dtype == torch.float32
        assert torch.equal(whole[n], plain.get_parameter(n)), "not rounded to bfloat16 on the way"
        # activations of 8 bits: the same direction
        assert F.cosine_similarity(whole[n].grad.flatten(), expected.flatten(), dim=0) > 0.99, n
    frozen = [p for n, p in found.model.model.named_parameters() if n not in found.trained]
    assert frozen and all(p.dtype == torch.bfloat16 for p in frozen)


def test_the_planner_selects_what_the_worker_trains(checkpoint):
    name, folder, _ = checkpoint
    recipe = Recipe.model_validate(
        {
            "model": {"id": str(folder)},
            "data": {"train": [{"path": "/x.jsonl"}]},
            "train": {"max_steps": 1},
        }
    )
    planned = {n for n, _ in trained_modules(read_shape(recipe), CASES[name])}
    found = built(section(folder), NF4, adapter(*CASES[name]))
    tied = {"gemma": "model.embed_tokens", "gemma2": "model.embed_tokens"}.get(name)
    trained = {n.rpartition(".")[0] for n in found.trained if not n.endswith((".A", ".B"))}
    assert trained == {tied if n == "lm_head" and tied else n for n in planned}


@pytest.mark.parametrize("pattern", ["nrom", "q_proj", "layers.*.self_attn.o_proj", "down_proj"])
def test_a_pattern_that_names_no_such_module_is_refused(tmp_path, pattern):
    """A linear layer too, adapted or only frozen: its adapter is what trains."""
    folder, _ = saved(tmp_path, FAMILIES["llama"])
    section_ = adapter(pattern).model_copy(update={"targets": ["q_proj", "o_proj"]})
    with pytest.raises(AdapterError, match=r"adapter.train_modules: .* matches no layer") as caught:
        built(section(folder), NF4, section_)
    assert "embed_tokens, input_layernorm, post_attention_layernorm, norm, lm_head" in caught.value.hint


TIED = {
    "model_type": "gemma", "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16,
}  # fmt: skip
RUNS = {
    "untied": {"adapter": {"train_modules": ["norm", "embed_tokens", "lm_head", "layers.*.input_layernorm"]}},
    "tied": {"model": {"config": TIED, "weights": "random"}, "adapter": {"train_modules": ["lm_head"]}},
}


@pytest.mark.dist
@pytest.mark.parametrize("kind", RUNS)
def test_they_train_alike_on_every_engine_and_are_saved_in_float32(tmp_path, kind):
    sections = RUNS[kind]
    curves, tensors = {}, {}
    for strategy in ("single", "ddp", "fsdp"):
        world = {} if strategy == "single" else {"parallel": {"strategy": strategy, "gpus_per_node": 2}}
        recipe = {**sections, "adapter": {"method": "map", "rank": 4, "alpha": 8.0, **sections["adapter"]}}
        run = make_run(tmp_path, strategy, train={"max_steps": 3, "weight_decay": 0.1, "global_batch_size": 4,
                       "micro_batch_size": 1, "learning_rate": 0.01}, **world, **recipe)  # fmt: skip
        run_ranks(run)
        curves[strategy], (tensors[strategy], _) = losses(run), load_adapter(run.path / "adapter")
    assert curves["single"][-1] < curves["single"][0]
    whole = {
        n: t for n, t in tensors["single"].items() if not n.endswith((".A", ".B", ".a", ".b", ".base_norm"))
    }
    names = {"model.embed_tokens.weight"}
    if kind == "untied":
        names |= {
            "lm_head.weight",
            "model.norm.weight",
            *(f"model.layers.{i}.input_layernorm.weight" for i in (0, 1)),
        }
    assert set(whole) == names
    assert all(t.dtype == torch.float32 for t in whole.values())
    for strategy in ("ddp", "fsdp"):
        assert curves[strategy] == pytest.approx(curves["single"], rel=1e-4)
        for n, expected in whole.items():
            # three AdamW steps of 0.01; where a slope is near 0 its sign, and so the step, may differ
            off = (tensors[strategy][n] - expected).abs() > 1e-3
            assert off.float().mean() < 0.01, (strategy, n)
