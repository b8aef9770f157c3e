"""What is exported loads in the installed peft over the plain model, and computes the same."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_adapter_contract import VARIANTS, config_of, make_base, start, trained_away_from_start
from tiny_models import FAMILIES, PLAIN, built, saved, section
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from decompft.adapters.inject import adapters, make_adapter
from decompft.launcher.errors import AdapterError, UserError
from decompft.launcher.recipe import AdapterSection
from decompft.launcher.worker.build import trained_targets
from decompft.launcher.worker.checkpoint import save_adapter
from decompft.launcher.worker.data.batches import Batch
from decompft.launcher.worker.description import describe_adapter
from decompft.launcher.worker.inference import load, open_adapter
from decompft.launcher.worker.modelfiles import identity
from decompft.launcher.worker.peft_export import export_peft
from decompft.launcher.worker.tokenizers import byte_tokenizer, save_tokenizer
from decompft.launcher.worker.tools.export import main

pytestmark = pytest.mark.dist

# float32 sums of up to 128 products in another order, through two layers
CLOSE = {"rtol": 1e-4, "atol": 3e-5}
TOKENS = torch.tensor([[5, 17, 101, 64, 3, 88, 12, 40]])
LLAMA = FAMILIES["llama"]
# method, options -> PEFT's type, or a piece of why not
SCALED = "scales the base's weight"
NATIVE = {
    "lora": "LORA", "rslora": "LORA", "dora": "LORA", "adalora": "ADALORA", "ia3": "IA3", "ssl": "IA3",
    "delora": "DELORA", "hira": "HIRA", "liera": "HIRA",
}  # fmt: skip
REFUSED = {
    "map": SCALED, "map-dora": SCALED, "map-trilora": SCALED, "map-flora": SCALED, "ssb": SCALED,
    "liera-exact": "a factor of its own", "svdiff": "with its full rank", "mpc_n": "no change of weights",
    "svft": "with its full rank",  # 64 directions of a layer that has no more
}  # fmt: skip


def quiet(*args):
    pass


def adapter_of(folder, fields, adapter, *, task="causal-lm", num_labels=3):
    """A checkpoint, and an adapter of it that is far from its start; both as folders."""
    checkpoint, _ = saved(folder / "model", fields, task=task, num_labels=num_labels)
    model = section(checkpoint, task=task, num_labels=num_labels)
    made = built(model, PLAIN, adapter).model.model
    moved = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (p for p in made.parameters() if p.requires_grad):
            tensor += 0.1 * torch.randn(tensor.shape, generator=moved)
        for _, layer in adapters(made):
            _into_the_last_phase(layer, moved)
    save_tokenizer(byte_tokenizer(), checkpoint)
    description = {
        **describe_adapter(adapter),
        "model": model.model_dump(mode="json"),
        "quantization": PLAIN.model_dump(mode="json"),
        "seed": 0,
        "base": identity(checkpoint),
        "data_formats": [],
    }
    tensors = {name: tensor.detach() for name, tensor in trained_targets(made).items()}
    save_adapter(folder / "adapter", tensors, description)
    return folder / "adapter"


def _into_the_last_phase(layer, moved):
    for name in layer.fixed_shapes:
        buffer = layer.get_buffer(name)
        if name in ("A0", "B0", "U_T", "V_T") and not buffer.any():
            buffer += 0.1 * torch.randn(buffer.shape, generator=moved)
        elif name == "phase":
            buffer.fill_(1)
        elif name == "mask":
            buffer[0] = 0


def ours(adapter):
    with torch.inference_mode():
        return load(adapter, base=None, say=quiet).model.logits(TOKENS, None)


def plain(adapter):
    name = json.loads((adapter / "adapter.json").read_text())["model"]["id"]
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation="eager")


def theirs(adapter, exported):
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected).*")
        return PeftModel.from_pretrained(plain(adapter), exported).eval()(TOKENS).logits


def exported(adapter, out):
    form = export_peft(open_adapter(adapter, base=None, say=quiet), out)
    return form, json.loads((out / "adapter_config.json").read_text())


def test_every_variant_is_exported_or_refused():
    assert NATIVE.keys() | REFUSED.keys() <= VARIANTS.keys()


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in REFUSED])
def test_peft_computes_the_same(tmp_path, variant):
    method, options = VARIANTS[variant]
    adapter = adapter_of(tmp_path, LLAMA, AdapterSection(method=method, rank=4, alpha=6.0, options=options))
    form, config = exported(adapter, tmp_path / "out")
    native = NATIVE.get(variant) or {"mpc_o": "LORA", "mpc_d": "LORA"}.get(variant)
    assert (form.peft_type, form.is_plain) == ((native, False) if native else ("LORA", True))
    assert config["base_model_name_or_path"] == str(tmp_path / "model")
    expected = ours(adapter)
    torch.testing.assert_close(theirs(adapter, tmp_path / "out"), expected, **CLOSE)
    with torch.inference_mode():
        bare = plain(adapter)(TOKENS).logits
    assert (bare - expected).abs().max() > 0.01, "the adapter should matter"


@pytest.mark.parametrize("variant", REFUSED)
def test_what_peft_cannot_say_is_refused_in_words(tmp_path, variant):
    method, options = VARIANTS[variant]
    section = AdapterSection(method=method, rank=4, options=options, targets=["q_proj", "up_proj"])
    opened = open_adapter(adapter_of(tmp_path, LLAMA, section), base=None, say=quiet)
    with pytest.raises(AdapterError, match=REFUSED[variant]) as caught:
        export_peft(opened, tmp_path / "out")
    assert "decompft" in caught.value.hint
    assert variant == "mpc_n" or "model.layers.0." in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "hira", "delora", "vera", "ssl"])
def test_layers_stored_the_other_way_round(tmp_path, method):
    """GPT-2's Conv1D, and biases everywhere."""
    adapter = adapter_of(tmp_path, FAMILIES["gpt2"], AdapterSection(method=method, rank=4))
    exported(adapter, tmp_path / "out")
    torch.testing.assert_close(theirs(adapter, tmp_path / "out"), ours(adapter), **CLOSE)


def test_vera_over_layers_of_one_shape_stays_vera(tmp_path):
    section = AdapterSection(method="vera", rank=8, targets=["q_proj", "o_proj"])
    adapter = adapter_of(tmp_path, LLAMA, section)
    form, config = exported(adapter, tmp_path / "out")
    assert form.peft_type == "VERA" and config["save_projection"]
    torch.testing.assert_close(theirs(adapter, tmp_path / "out"), ours(adapter), **CLOSE)


def test_ranks_and_alphas_of_their_own(tmp_path):
    overrides = [
        {"targets": ["v_proj"], "rank": 2, "alpha": 5.0},
        {"targets": ["layers.1.mlp.*"], "alpha": 0.5},
        {"targets": ["k_proj"], "skip": True},
    ]
    section = AdapterSection(method="lora", rank=4, options={"scaling": "rslora"}, overrides=overrides)
    adapter = adapter_of(tmp_path, LLAMA, section)
    _, config = exported(adapter, tmp_path / "out")
    assert len(config["rank_pattern"]) == 2 and len(config["alpha_pattern"]) == 5 and config["use_rslora"]
    assert set(config["target_modules"]) == {
        "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    torch.testing.assert_close(theirs(adapter, tmp_path / "out"), ours(adapter), **CLOSE)


def test_different_methods_become_one_plain_lora(tmp_path):
    overrides = [
        {"targets": ["q_proj"], "method": "pissa"},
        {"targets": ["v_proj"], "method": "adalora"},
        {"targets": ["layers.0.mlp.up_proj"], "method": "bitfit"},
    ]
    section = AdapterSection(method="lora", rank=4, overrides=overrides)
    adapter = adapter_of(tmp_path, LLAMA, section)
    form, config = exported(adapter, tmp_path / "out")
    assert form.is_plain and config["lora_bias"]
    # twice the rank for pissa, one direction less for the masked one
    assert {config["rank_pattern"][f"model.layers.0.self_attn.{n}"] for n in ("q_proj", "v_proj")} == {8, 3}
    torch.testing.assert_close(theirs(adapter, tmp_path / "out"), ours(adapter), **CLOSE)


def test_ia3_and_ssl_are_one_peft_method(tmp_path):
    overrides = [{"targets": ["down_proj"], "method": "ssl"}]
    section = AdapterSection(method="ia3", targets=["k_proj", "v_proj", "down_proj"], overrides=overrides)
    adapter = adapter_of(tmp_path, LLAMA, section)
    _, config = exported(adapter, tmp_path / "out")
    assert len(config["feedforward_modules"]) == 2
    torch.testing.assert_close(theirs(adapter, tmp_path / "out"), ours(adapter), **CLOSE)


def test_ia3_over_a_bias_is_refused(tmp_path):
    adapter = adapter_of(tmp_path, FAMILIES["llama-llama3-rope"], AdapterSection(method="ia3"))
    with pytest.raises(AdapterError, match="scales the bias"):
        exported(adapter, tmp_path / "out")


def test_a_method_that_stands_alone_in_peft_is_refused_beside_another(tmp_path):
    overrides = [{"targets": ["o_proj"], "method": "dora"}]
    adapter = adapter_of(tmp_path, LLAMA, AdapterSection(method="lora", rank=4, overrides=overrides))
    with pytest.raises(AdapterError, match="layers.0.self_attn.o_proj: dora is a PEFT method, but"):
        exported(adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "modules"),
    [("llama", ["norm", "lm_head"]), ("qwen2", ["embed_tokens"]), ("gpt2", ["ln_f", "wte"])],
)
def test_modules_trained_whole_go_along(tmp_path, family, modules):
    """Also an embedding that is tied to the head."""
    section = AdapterSection(method="lora", rank=4, train_modules=modules)
    adapter = adapter_of(tmp_path, FAMILIES[family], section)
    _, config = exported(adapter, tmp_path / "out")
    assert len(config["modules_to_save"]) >= len(modules)
    torch.testing.assert_close(theirs(adapter, tmp_path / "out"), ours(adapter), **CLOSE)


def class_logits(adapter):
    model = load(adapter, base=None, say=quiet).model
    batch = Batch.__new__(Batch)
    for name, value in {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}.items():
        object.__setattr__(batch, name, value)
    with torch.inference_mode():
        return model.class_logits(batch)


def test_a_classifier_takes_its_head_along(tmp_path):
    section = AdapterSection(method="lora", rank=4)
    adapter = adapter_of(tmp_path, LLAMA, section, task="sequence-classification")
    _, config = exported(adapter, tmp_path / "out")
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", dtype=torch.float32, num_labels=3, pad_token_id=0
    )
    torch.nn.init.zeros_(base.score.weight)
    with torch.inference_mode():
        found = PeftModel.from_pretrained(base, tmp_path / "out").eval()(TOKENS).logits
    torch.testing.assert_close(found, class_logits(adapter), **CLOSE)


@pytest.mark.parametrize("iterations", [1, 2])
def test_what_loftq_took_out_of_the_base_is_part_of_its_change(iterations):
    """Over the checkpoint's weight W: W + up down is what W less the part, plus s B A, is."""
    weight = 0.05 * torch.randn(24, 128, generator=torch.Generator().manual_seed(2))
    config = config_of("lora", init="loftq", loftq_iterations=iterations)
    layer = start(make_adapter(make_base("nf4", weight), config), weight)
    with torch.no_grad():
        trained_away_from_start(layer)
        rest = layer.base_rows(weight, 0, dict(layer.named_buffers(recurse=False)))
        up, down = layer.change_of_checkpoint()
        torch.testing.assert_close(weight + up @ down, layer.merged(rest), rtol=1e-5, atol=1e-6)
    assert layer.rewrites_base == (iterations > 1) and up.shape[1] == layer.config.rank * iterations


def test_random_weights_are_refused(tmp_path):
    adapter = adapter_of(tmp_path, LLAMA, AdapterSection(method="lora", rank=4))
    path = adapter / "adapter.json"
    description = json.loads(path.read_text())
    description["model"]["weights"] = "random"
    path.write_text(json.dumps(description))
    with pytest.raises(AdapterError, match="no base to load it over"):
        exported(adapter, tmp_path / "out")


def test_the_command(tmp_path, capsys):
    adapter = adapter_of(tmp_path, LLAMA, AdapterSection(method="trilora", rank=4, targets=["q_proj"]))
    path = adapter / "adapter.json"
    description = json.loads(path.read_text())
    description["quantization"]["format"] = "nf4"
    path.write_text(json.dumps(description))
    main([str(adapter), "--format", "peft", "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert "a plain LoRA of rank 4" in said.out and "trained over nf4" in said.err
    assert all(
        t.dtype == torch.float32 for t in load_file(tmp_path / "out/adapter_model.safetensors").values()
    )
    with pytest.raises(UserError, match="exists already"):
        main([str(adapter), "--format", "peft", "--out", str(tmp_path / "out")])
