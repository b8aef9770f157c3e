"""What peft saved becomes an adapter of ours that computes the same, and goes back again."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from test_peft_export import CLOSE, LLAMA, TOKENS, adapter_of, class_logits, exported, ours, plain, quiet
from tiny_models import FAMILIES, saved
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from decompft.launcher import cli
from decompft.launcher.errors import AdapterError, ModelError, UserError
from decompft.launcher.recipe import AdapterSection
from decompft.launcher.worker.inference import load, open_adapter
from decompft.launcher.worker.merging import merge
from decompft.launcher.worker.peft_import import import_peft
from decompft.launcher.worker.tokenizers import byte_tokenizer, save_tokenizer
from decompft.launcher.worker.tools.import_ import main

pytestmark = pytest.mark.dist

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def checkpoint_of(folder, fields):
    checkpoint, _ = saved(folder / "model", fields)
    save_tokenizer(byte_tokenizer(), checkpoint)
    return checkpoint


def peft_of(folder, config, *, fields=LLAMA):
    """A PEFT adapter of a checkpoint, far from its start, as peft saves it; its folder and its logits."""
    checkpoint = checkpoint_of(folder, fields)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(0)
    wrapped = get_peft_model(model, copy.deepcopy(config))
    moved = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=moved)
    wrapped.save_pretrained(folder / "peft")
    with torch.inference_mode():
        return folder / "peft", wrapped.eval()(TOKENS).logits


def method_of(folder):
    return json.loads((folder / "adapter.json").read_text())["adapter"]


CONFIGS = {
    "lora": (peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL, lora_dropout=0.1), "lora"),
    "rslora": (
        peft.LoraConfig(
            r=4, target_modules=ALL, use_rslora=True, rank_pattern={"v_proj": 2, r"layers\.1\..*up_proj": 3},
            alpha_pattern={"mlp.down_proj": 1},
        ),
        "lora",
    ),
    "dora": (peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], use_dora=True), "dora"),
    "adalora": (peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=ALL), "adalora"),
    "ia3": (
        peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "ia3",
    ),
    "vera": (peft.VeraConfig(r=8, target_modules=ALL), "lora"),
    "delora": (peft.DeloraConfig(r=4, target_modules=ALL, rank_pattern={"k_proj": 2}), "delora"),
    "hira": (peft.HiraConfig(r=4, target_modules=ALL, rank_pattern={"k_proj": 2}), "hira"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_ours_computes_what_peft_did(tmp_path, kind):
    config, method = CONFIGS[kind]
    folder, expected = peft_of(tmp_path, config)
    import_peft(folder, tmp_path / "ours", base=None, say=quiet)
    assert method_of(tmp_path / "ours")["method"] == method
    torch.testing.assert_close(ours(tmp_path / "ours"), expected, **CLOSE)
    with torch.inference_mode():
        assert (plain(tmp_path / "ours")(TOKENS).logits - expected).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["lora", "dora", "hira", "vera"])
def test_layers_stored_the_other_way_round(tmp_path, kind):
    fields = {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    config = {
        "lora": peft.LoraConfig(**fields),
        "dora": peft.LoraConfig(**fields, use_dora=True),
        "hira": peft.HiraConfig(**fields),
        "vera": peft.VeraConfig(**fields),
    }[kind]
    folder, expected = peft_of(tmp_path, config, fields=FAMILIES["gpt2"])
    import_peft(folder, tmp_path / "ours", base=None, say=quiet)
    torch.testing.assert_close(ours(tmp_path / "ours"), expected, **CLOSE)


def test_directions_that_adalora_cut_away_stay_so(tmp_path):
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"])
    folder, _ = peft_of(tmp_path, config)
    kept = [True, False, True, False]
    model = PeftModel.from_pretrained(plain_of(folder), folder)
    with torch.no_grad():
        for layer in model.base_model.model.model.layers:
            layer.self_attn.q_proj.lora_E["default"][[1, 3]] = 0
    model.peft_config["default"].rank_pattern = {
        f"model.layers.{i}.self_attn.q_proj.lora_E": kept for i in range(2)
    }
    model.save_pretrained(tmp_path / "cut")
    with torch.inference_mode():
        expected = model.eval()(TOKENS).logits
    import_peft(tmp_path / "cut", tmp_path / "ours", base=None, say=quiet)
    torch.testing.assert_close(ours(tmp_path / "ours"), expected, **CLOSE)
    exported(tmp_path / "ours", tmp_path / "again")


def plain_of(folder):
    name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("kind", CONFIGS)
def test_there_and_back_again(tmp_path, kind):
    folder, expected = peft_of(tmp_path, CONFIGS[kind][0])
    import_peft(folder, tmp_path / "ours", base=None, say=quiet)
    exported(tmp_path / "ours", tmp_path / "back")
    with torch.inference_mode():
        found = PeftModel.from_pretrained(plain_of(folder), tmp_path / "back").eval()(TOKENS).logits
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3", "delora", "hira"])
def test_what_was_exported_comes_back_number_by_number(tmp_path, method):
    adapter = adapter_of(tmp_path, LLAMA, AdapterSection(method=method, rank=4, alpha=4.0))
    exported(adapter, tmp_path / "peft")
    import_peft(tmp_path / "peft", tmp_path / "again", base=None, say=quiet)
    one, two = (open_adapter(f, base=None, say=quiet).tensors for f in (adapter, tmp_path / "again"))
    assert one.keys() == two.keys()
    assert method_of(tmp_path / "again")["method"] == method
    if method != "adalora":  # whose masked direction is 0 in PEFT
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=0, msg=name)
    torch.testing.assert_close(ours(tmp_path / "again"), ours(adapter), **CLOSE)


def test_an_imported_adapter_merges(tmp_path):
    folder, expected = peft_of(tmp_path, CONFIGS["dora"][0])
    import_peft(folder, tmp_path / "ours", base=None, say=quiet)
    merge(open_adapter(tmp_path / "ours", base=None, say=quiet), "dense", tmp_path / "out", progress=quiet)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS).logits, expected, **CLOSE)


def test_modules_to_save_become_modules_trained_whole(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=ALL, modules_to_save=["norm", "lm_head"])
    folder, expected = peft_of(tmp_path, config)
    import_peft(folder, tmp_path / "ours", base=None, say=quiet)
    # peft compares ends of names: "norm" is each layer's two as well
    assert {"model.norm", "lm_head"} < set(method_of(tmp_path / "ours")["train_modules"])
    torch.testing.assert_close(ours(tmp_path / "ours"), expected, **CLOSE)


def test_half_of_a_tied_pair_is_refused(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    folder, _ = peft_of(tmp_path, config, fields=FAMILIES["qwen2"])
    with pytest.raises(AdapterError, match="are one tensor in the base"):
        import_peft(folder, tmp_path / "ours", base=None, say=quiet)


def test_a_classifier_comes_with_its_head(tmp_path):
    checkpoint = checkpoint_of(tmp_path, LLAMA)
    base = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, dtype=torch.float32, num_labels=3, pad_token_id=0
    )
    model = get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape) * parameter.requires_grad
    model.save_pretrained(tmp_path / "peft")
    with torch.inference_mode():
        expected = model.eval()(TOKENS).logits
    import_peft(tmp_path / "peft", tmp_path / "ours", base=None, say=quiet)
    torch.testing.assert_close(class_logits(tmp_path / "ours"), expected, **CLOSE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "its peft_type is LOHA; decompft reads LORA"),
        ({"task_type": "TOKEN_CLS"}, "its task_type is TOKEN_CLS"),
        ({"bias": "all"}, "trained biases of the base"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication is"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
        ({"lora_bias": True}, "lora_bias is true"),
        ({"init_lora_weights": "pissa"}, "took a part out of the base"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": "a"}, "lora_alpha: 'a' is no number"),
        ({"lora_alpha": None}, "lora_alpha: None is no number"),
        ({"lora_dropout": [0.1]}, r"lora_dropout: \[0.1\] is no number"),
        ({"alpha_pattern": [1]}, r"alpha_pattern: \[1\] is no table of numbers"),
        ({"task_type": ["CAUSAL_LM"]}, "task_type: .* is no text"),
        ({"revision": ["main"]}, "revision: .* is no text"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path: .* is no text"),
        ({"base_model_name_or_path": None}, "names no base model"),
    ],
)
def test_what_ours_does_not_have_is_refused_in_words(tmp_path, changes, words):
    folder, _ = peft_of(tmp_path, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(AdapterError, match=words):
        import_peft(folder, tmp_path / "ours", base=None, say=quiet)
    assert not (tmp_path / "ours").exists()


def test_places_that_take_no_adapter_here(tmp_path):
    for number, targets in enumerate((["embed_tokens"], ["lm_head"])):
        folder, _ = peft_of(tmp_path / str(number), peft.LoraConfig(r=4, target_modules=targets))
        with pytest.raises(AdapterError, match=r"lora_embedding|adapts lm_head, which is no linear layer"):
            import_peft(folder, tmp_path / "ours", base=None, say=quiet)


def test_ia3_over_a_bias_is_refused(tmp_path):
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    folder, _ = peft_of(tmp_path, config, fields=FAMILIES["llama-llama3-rope"])
    with pytest.raises(AdapterError, match="which PEFT's IA3 scales"):
        import_peft(folder, tmp_path / "ours", base=None, say=quiet)


def test_projections_that_were_not_saved_are_refused(tmp_path):
    folder, _ = peft_of(tmp_path, peft.VeraConfig(r=4, target_modules=["q_proj"], save_projection=False))
    with pytest.raises(AdapterError, match="holds no random projections"):
        import_peft(folder, tmp_path / "ours", base=None, say=quiet)


def test_another_model_is_refused(tmp_path):
    folder, _ = peft_of(tmp_path, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    narrow, _ = saved(tmp_path / "narrow", {**LLAMA, "hidden_size": 32})
    with pytest.raises(AdapterError, match="the adapter has shape"):
        import_peft(folder, tmp_path / "ours", base=str(narrow), say=quiet)


def test_a_base_that_is_not_here_is_asked_for(tmp_path):
    folder, _ = peft_of(tmp_path, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="does not exist") as caught:
        import_peft(folder, tmp_path / "ours", base=None, say=quiet)
    assert "--base" in caught.value.hint


def test_pickles_and_folders_of_other_kinds(tmp_path):
    folder, _ = peft_of(tmp_path, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="a pickle"):
        import_peft(folder, tmp_path / "ours", base=None, say=quiet)
    with pytest.raises(AdapterError, match="holds no adapter_config.json"):
        import_peft(tmp_path / "model", tmp_path / "ours", base=None, say=quiet)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="is no PEFT config"):
        import_peft(folder, tmp_path / "ours", base=None, say=quiet)


def test_the_command(tmp_path, capsys):
    folder, expected = peft_of(tmp_path, CONFIGS["ia3"][0])
    moved = (tmp_path / "model").rename(tmp_path / "elsewhere")
    main([str(folder), "--base", str(moved), "--out", str(tmp_path / "ours")])
    assert "ia3, ssl on 6 layers; eval" in capsys.readouterr().out
    torch.testing.assert_close(ours(tmp_path / "ours"), expected, **CLOSE)
    assert load(tmp_path / "ours", base=str(moved), say=quiet).formats == ()
    with pytest.raises(UserError, match="exists already"):
        main([str(folder), "--out", str(tmp_path / "ours")])


@pytest.mark.slow
def test_the_verb_finds_its_tool(tmp_path, capfd):
    assert cli.main(["import", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "holds no adapter_config.json" in capfd.readouterr().err
