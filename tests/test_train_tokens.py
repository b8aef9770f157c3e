"""Rows of tokens that train beside a frozen embedding and head: their gradients, their place in files, merging."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError
from tiny import LLAMA, WORLDS, losses, make_run, recipe_data, run_ranks
from tiny_models import FAMILIES, PLAIN, built, row, saved, section, single
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from decompft.adapters.token_rows import TokenEmbedding, TokenHead, token_rows
from decompft.launcher.checkpoints import newest_valid
from decompft.launcher.errors import AdapterError
from decompft.launcher.recipe import AdapterSection, QuantizationSection
from decompft.launcher.worker import loss as loss_module
from decompft.launcher.worker.build import build, count_trained, trained_targets
from decompft.launcher.worker.combining_parts import open_parts
from decompft.launcher.worker.data.batches import collate
from decompft.launcher.worker.data.feed import open_train
from decompft.launcher.worker.generation import generate
from decompft.launcher.worker.inference import load, open_adapter
from decompft.launcher.worker.loss import TrainedRows, head_logits, token_loss_sum
from decompft.launcher.worker.merging import merge
from decompft.launcher.worker.prepared import Prepared
from decompft.launcher.worker.restore import load_adapter
from decompft.launcher.worker.tokenizers import byte_tokenizer, save_tokenizer
from decompft.launcher.worker.tokens import TrainedToken, add_tokens
from decompft.launcher.worker.tools.merge import main

KINDS = ("llama", "gemma", "gemma2", "gemma3_text", "phi", "gpt2", "qwen2", "qwen3")
ROWS = {"a": 5, "b": 40, "new": 120, "newer": 121}  # the last two past a vocabulary of 120
TOKENS = tuple(TrainedToken(text=t, id=i, is_added=i >= 120) for t, i in ROWS.items())
TIED = {
    "model_type": "gemma", "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16,
}  # fmt: skip


def adapter(**fields):
    return AdapterSection(method="lora", rank=4, alpha=8.0, train_tokens=list(ROWS), **fields)


def with_rows(folder, compute="float32", task="causal-lm", **fields):
    return build(
        section(folder, task=task), QuantizationSection(format="none", compute=compute), adapter(**fields),
        single(), seed=0, model_dir=folder, recompute="none", tokens=TOKENS,
    )  # fmt: skip


def batch():
    """With the trained tokens among inputs and targets, the first of them twice in a row."""
    rows = [row((13,)), row((17,), seed=1)]
    rows[0].tokens[[2, 4, 5, 7]] = [5, 120, 120, 40]
    rows[1].tokens[[3, 9, 16]] = [121, 5, 120]
    return collate(rows, pad_id=0)


def moved(found):
    """Trained rows away from their start."""
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in found.trained.items():
            if name.endswith(".rows"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=made)
    return found


def grown(plain, found):
    """transformers' own model with the rows in its embedding and head."""
    values = {n: m.rows.detach() for n, m in token_rows(found.model.model)}
    embedding, head = values.values()
    bias = getattr(plain.get_output_embeddings(), "bias", None)
    plain.resize_token_embeddings(122, mean_resizing=False)
    ids = list(ROWS.values())
    with torch.no_grad():
        plain.get_input_embeddings().weight[ids] = embedding.to(plain.dtype)
        plain.get_output_embeddings().weight[ids] = head.to(plain.dtype)
        if bias is not None:
            plain.get_output_embeddings().bias[120:] = 0
    return plain


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    return saved(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])


def test_it_is_the_grown_model_in_float64_and_only_those_rows_have_gradients(checkpoint):
    folder, plain = checkpoint
    found = moved(with_rows(folder))
    loss = found.model.train()(batch())
    loss.backward()
    twin = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    twin = grown(twin, found).requires_grad_(True)
    logits = twin(batch().input_ids).logits
    expected = F.cross_entropy(
        logits.flatten(0, 1), batch().targets.flatten(), ignore_index=-100, reduction="sum"
    )
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
    names = [n for n in found.trained if n.endswith(".rows")]
    assert len(names) == (1 if plain.config.tie_word_embeddings else 2)
    ids = list(ROWS.values())
    for name in names:
        whole = twin.get_parameter(name.removesuffix("rows") + "weight").grad[ids]
        assert found.trained[name].grad.dtype == torch.float32
        # float32 sums over 30 tokens in another order, through two layers
        torch.testing.assert_close(
            found.trained[name].grad.double(), whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item()
        )
    with torch.inference_mode():
        ours = found.model.logits(batch().input_ids, None)
        torch.testing.assert_close(ours.double(), twin(batch().input_ids).logits, rtol=1e-4, atol=1e-4)
        hf = found.model.model(batch().input_ids).logits  # as generate asks it
        torch.testing.assert_close(hf.float(), ours, rtol=1e-5, atol=1e-5)
    frozen = [p for n, p in found.model.model.named_parameters() if n not in found.trained]
    assert all(p.grad is None for p in frozen)


def test_rows_that_were_there_start_as_they_are_and_new_ones_as_the_mean(checkpoint):
    folder, plain = checkpoint
    found = with_rows(folder)
    for name in [n for n in found.trained if n.endswith(".rows")]:
        whole = plain.get_parameter(name.removesuffix("rows") + "weight")
        rows = found.trained[name]
        assert torch.equal(rows[:2], whole[[5, 40]])
        torch.testing.assert_close(rows[2:], whole.double().mean(0).float().expand(2, -1))
    known = torch.randint(3, 120, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = found.model.logits(known, None), plain(known).logits
        torch.testing.assert_close(ours[..., :120], theirs, rtol=1e-4, atol=1e-4)
        share = torch.softmax(ours, -1)[..., 120:].amax()
        if plain.get_output_embeddings().bias is None and plain.config.model_type != "gemma2":
            assert share <= 1 / 120, "a mean row takes no more than an average token"


def test_in_bfloat16_all_else_stays_in_it(tmp_path):
    folder, _ = saved(tmp_path, FAMILIES["llama"])
    found = with_rows(folder, compute="bfloat16")
    found.model.train()(batch()).backward()
    for name, parameter in found.model.model.named_parameters():
        is_trained = name.endswith((".rows", ".A", ".B"))
        assert parameter.dtype == (torch.float32 if is_trained else torch.bfloat16), name
        assert (parameter.grad is not None) == is_trained


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_chunked_loss_is_that_of_all_logits(monkeypatch, softcap):
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 8)
    made = torch.Generator().manual_seed(0)
    hidden, weight, rows = (torch.randn(n, 24, generator=made) for n in (37, 50, 4))
    ids, targets = torch.tensor([0, 7, 50, 51]), torch.randint(0, 52, (37,), generator=made)
    targets[:6] = torch.tensor([0, 0, 7, 50, 51, 1])
    bias = torch.randn(50, generator=made)
    hidden.requires_grad_()
    rows.requires_grad_()
    trained = TrainedRows(rows=rows, ids=ids, num_new=2)
    ours = token_loss_sum(hidden, weight, bias, targets, softcap, trained)
    found = torch.autograd.grad(ours / 7, (hidden, rows))
    theirs = F.cross_entropy(head_logits(hidden, weight, bias, softcap, trained), targets, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-4)
    for a, b in zip(found, torch.autograd.grad(theirs / 7, (hidden, rows)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_classifier_has_rows_of_its_embedding_alone(tmp_path):
    folder, _ = saved(tmp_path, FAMILIES["llama"])
    found = with_rows(folder, task="sequence-classification")
    kinds = [type(m) for _, m in token_rows(found.model.model)]
    assert kinds == [TokenEmbedding] and TokenHead not in kinds


def test_which_texts_are_tokens_already(tmp_path):
    tokenizer = byte_tokenizer()
    texts = ["A", "<pad>", "<|im_start|>", "two words", " x"]
    found = add_tokens(tokenizer, texts)
    assert [(t.id, t.is_added) for t in found] == [
        (65, False),
        (258, False),
        (260, True),
        (261, True),
        (262, True),
    ]
    assert tokenizer("a<|im_start|>two words").input_ids == [97, 260, 261]
    assert tokenizer.decode([260, 261], skip_special_tokens=True) == "two words", (
        "only control tokens are special"
    )
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.decode([260, 261], skip_special_tokens=True) == "two words"
    again = add_tokens(loaded, texts)
    assert [(t.id, t.is_added) for t in again] == [(t.id, False) for t in found]


@pytest.mark.parametrize("texts", [[""], ["a", " \n"], ["a", "a"]])
def test_a_text_that_is_no_token_is_refused(texts):
    with pytest.raises(ValidationError, match="white space|named twice"):
        AdapterSection(train_tokens=texts)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"]])
def test_not_together_with_the_whole_embedding_or_head(tmp_path, modules):
    folder, _ = saved(tmp_path, FAMILIES["llama"])
    with pytest.raises(AdapterError, match="trains whole, these rows included"):
        with_rows(folder, train_modules=modules)
    with pytest.raises(AdapterError, match=r"names .*(embed_tokens|lm_head), which then trains whole"):
        make_run(tmp_path, adapter={"train_modules": modules, "train_tokens": ["x"]})


def test_a_model_with_fewer_rows_than_the_tokenizer_had_is_refused(tmp_path):
    folder, _ = saved(tmp_path, FAMILIES["llama"])
    far = (TrainedToken(text="a", id=125, is_added=True),)
    one = AdapterSection(method="lora", train_tokens=["a"])
    with pytest.raises(AdapterError, match="the model has 120 rows"):
        build(section(folder), PLAIN, one, single(), seed=0, model_dir=folder, recompute="none", tokens=far)
    with pytest.raises(AdapterError, match="ids of these tokens are not known"):
        built(section(folder), PLAIN, one)


TRAINED = ["<|im_start|>", "It is", "y"]  # the second stands in every answer, the first nowhere
TRAIN = {
    "max_steps": 4,
    "weight_decay": 0.1,
    "global_batch_size": 4,
    "micro_batch_size": 1,
    "learning_rate": 0.01,
}


def run_of(folder, name, world="single", *, tied=False, **train):
    model = {"model": {"config": TIED if tied else LLAMA, "weights": "random"}}
    return make_run(
        folder, name, adapter={"method": "lora", "rank": 4, "alpha": 8.0, "train_tokens": TRAINED},
        train={**TRAIN, **train}, parallel=WORLDS[world], **model,
    )  # fmt: skip


@pytest.mark.dist
@pytest.mark.parametrize("tied", [False, True])
def test_they_train_alike_on_every_engine(tmp_path, tied, capfd):
    curves, tensors = {}, {}
    for world in ("single", "ddp", "fsdp", "zero2", "zero3"):
        run = run_of(tmp_path, world, world, tied=tied)
        run_ranks(run)
        curves[world], (tensors[world], description) = losses(run), load_adapter(run.path / "adapter")
    assert "'<|im_start|>' does not stand in the training data" in capfd.readouterr().err.replace("\n", " ")
    assert [(t["text"], t["id"], t["is_added"]) for t in description["tokens"]] == [
        ("<|im_start|>", 260, True), ("It is", 261, True), ("y", 121, False),
    ]  # fmt: skip
    names = {n for n in tensors["single"] if n.endswith(".rows")}
    assert names == {"model.embed_tokens.rows"} | (set() if tied else {"lm_head.rows"})
    assert curves["single"][-1] < curves["single"][0]
    for world in curves:
        assert curves[world] == pytest.approx(curves["single"], rel=1e-4), world
        for name in names:
            # AdamW steps of 0.01; where a slope is near 0 its sign, and so the step, may differ
            off = (tensors[world][name] - tensors["single"][name]).abs() > 1e-3
            assert off.float().mean() < 0.01, (world, name)
    start = {n: p for n, p in built_of(run).trained.items() if n in names}
    order = [121, 260, 261]
    assert torch.equal(
        tensors["single"]["model.embed_tokens.rows"][order.index(260)],
        start["model.embed_tokens.rows"][order.index(260)].detach(),
    ) != tied, "a row that is never read, and no head's, stays: weight decay leaves it alone"  # fmt: skip


def built_of(run):
    recipe, prepared = run.read_plan().recipe, Prepared.read(run.path)
    return build(
        recipe.model, recipe.quantization, recipe.adapter, single(), seed=recipe.train.seed,
        model_dir=prepared.model_dir, recompute="none", tokens=prepared.tokens,
    )  # fmt: skip


def test_a_stream_is_read_with_the_added_tokens(tmp_path):
    save_tokenizer(byte_tokenizer(), tmp_path / "bytes")
    run = make_run(
        tmp_path, model={"tokenizer": str(tmp_path / "bytes")}, adapter={"train_tokens": TRAINED},
        data={**recipe_data(tmp_path)["data"], "streaming": True},
    )  # fmt: skip
    data = open_train(run.read_plan().recipe, Prepared.read(run.path))
    rows = [row for micro in data.step(0, 1, 0, 4, 1).micro_batches for row in micro if row is not None]
    assert rows and all(261 in row.tokens for row in rows)


@pytest.mark.dist
@pytest.mark.parametrize("world", ["single", "fsdp", "zero2"])
def test_stopped_and_resumed_equals_unbroken_bit_for_bit(tmp_path, world):
    unbroken = run_of(tmp_path, "unbroken", world)
    run_ranks(unbroken)
    first = run_of(tmp_path, "first", world, stop_after_steps=2)
    run_ranks(first)
    rest = run_of(tmp_path, "rest", world)
    run_ranks(rest, resume=newest_valid(first.checkpoints_dir)[0])
    assert losses(first) + losses(rest) == losses(unbroken)
    tensors, expected = (load_adapter(r.path / "adapter")[0] for r in (rest, unbroken))
    assert all(torch.equal(tensors[n], expected[n]) for n in expected)


@pytest.mark.dist
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapters_folder_asks_and_merges_with_its_rows(tmp_path, tied):
    run = run_of(tmp_path, "run", tied=tied)
    run_ranks(run)
    folder = run.path / "adapter"
    trained = built_of(run)
    plan = run.read_plan()
    assert plan.num_adapter_params + plan.num_module_params == count_trained(trained.trained)
    with torch.no_grad():
        for name, value in trained_targets(trained.model.model).items():
            value.copy_(load_adapter(folder)[0][name])
    loaded = load(folder, base=None, say=print)
    ids = loaded.tokenizer("<|im_start|>Say y. It is 4.", return_tensors="pt").input_ids
    assert {260, 261, 121} <= set(ids.flatten().tolist())
    with torch.inference_mode():
        ours = loaded.model.logits(ids, None)
        assert ours.shape[-1] == 262
        assert torch.equal(ours, trained.model.eval().logits(ids, None))
    out = tmp_path / "merged"
    merge(open_adapter(folder, base=None, say=print), "dequantized", out, progress=lambda done, total: None)
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 262
    assert AutoTokenizer.from_pretrained(out)("<|im_start|>").input_ids == [260]
    with torch.inference_mode():
        # float32 sums of up to 128 products in another order, through two layers
        torch.testing.assert_close(plain(ids).logits, ours, rtol=1e-4, atol=2e-5)
        answer = generate(loaded, [ids[0].tolist()], max_new_tokens=5)
        config = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 257, "pad_token_id": 258}
        expected = plain.generate(ids, **config)[0, ids.shape[1] :].tolist()
        assert answer[0] == [i for i in expected if i != 257]
    bare = load(folder, base=None, use_adapter=False, say=print)
    assert len(bare.tokenizer) == 260, "the bare base has no row for an added token"
    with pytest.raises(AdapterError, match="trained rows of tokens"):
        open_parts([open_adapter(folder, base=None, say=print)], torch.device("cpu"))


MERGES = {
    "phi": ({"compute": "float32", "format": "none"}, "dense", 260),  # the head has a bias
    "gpt2": ({"compute": "float32", "format": "nf4"}, "dequantized", 260),
    "llama": ({"compute": "float32", "format": "nf4"}, "requantized", 272),  # rows that no token used
}


@pytest.mark.dist
@pytest.mark.parametrize("family", MERGES)
def test_a_merge_over_a_checkpoint_has_every_row_in_place(tmp_path, family):
    quantization, into, size = MERGES[family]
    long = {"vocab_size": size, "n_positions" if family == "gpt2" else "max_position_embeddings": 256}
    base, plain = saved(tmp_path / "base", {**FAMILIES[family], **long})
    save_tokenizer(byte_tokenizer(), base)
    run = make_run(
        tmp_path, model={"id": str(base), "config": None, "weights": "checkpoint"}, train=TRAIN,
        adapter={"method": "lora", "rank": 4, "alpha": 8.0, "train_tokens": TRAINED}, quantization=quantization,
    )  # fmt: skip
    start = {n: p for n, p in built_of(run).trained.items() if n.endswith(".rows")}
    for name, rows in start.items():
        known = plain.get_parameter(name.removesuffix("rows") + "weight")[:260]
        torch.testing.assert_close(rows[1], known.double().mean(0).float())
    run_ranks(run)
    main(
        [
            str(run.path),
            "--into",
            into,
            "--out",
            str(tmp_path / "out"),
            "--check-data",
            str(tmp_path / "data.jsonl"),
        ]
    )
    check = json.loads((tmp_path / "out" / "merge.json").read_text())["check"]
    if into != "requantized":  # which rounds what the layers learned; the rows of tokens are compared below
        assert check["kl_nats"] < 1e-6
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids, grown = [121, 260, 261], max(size, 262)
    tensors, _ = load_adapter(run.path / "adapter")
    for name in start:
        whole = merged.get_parameter(name.removesuffix("rows") + "weight")
        assert len(whole) == merged.config.vocab_size == grown
        assert torch.equal(whole[ids], tensors[name])
        others = [i for i in range(size) if i not in ids]
        assert torch.equal(whole[others], plain.get_parameter(name.removesuffix("rows") + "weight")[others])
