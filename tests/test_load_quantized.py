"""Checkpoints that bitsandbytes quantized are the base as they are: bit for bit, rank by rank, or refused in words."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LLAMA, fork, losses, make_run, run_ranks
from tiny_models import NF4, built, plain_model, section, single
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.dense import DenseLinear
from decompft.adapters.inject import adapters
from decompft.launcher.errors import ModelError, PlanError
from decompft.launcher.quantized_checkpoint import as_stored, stored_format
from decompft.launcher.recipe import AdapterSection, ModelSection, QuantizationSection
from decompft.launcher.worker.engines.fsdp import FsdpEngine
from decompft.launcher.worker.inference import load, open_adapter
from decompft.launcher.worker.merging import merge

MAP = AdapterSection(method="map", rank=4, alpha=8.0)
GATE = "model.layers.1.mlp.gate_proj"
KINDS = {
    "nf4-nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    # a layer beside the head that stays in plain floats
    "skipped": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["lm_head", GATE],
    },
}
FORMATS = {"nf4-nested": "nf4", "nf4": "nf4", "fp4": "fp4", "int8": "int8", "skipped": "nf4"}
# more than 256 blocks a matrix, so that nested scales have several blocks of their own, across rows
WIDE = {**LLAMA, "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    plain_model(WIDE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(plain, tmp_path_factory):
    """kind -> (folder as transformers saves it, name of a linear -> bitsandbytes' own dequantized weight)."""
    made = {}
    for kind, options in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=BitsAndBytesConfig(**options))
        model.save_pretrained(folder)
        save_tokenizer(folder)
        made[kind] = folder, {n: weight_of(m) for n, m in model.named_modules() if hasattr(m, "weight")}
    return made


def weight_of(module):
    import bitsandbytes as bnb

    weight = module.weight.data
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight, module.weight.quant_state).float()
    if isinstance(module, bnb.nn.Linear8bitLt):
        return torch.ops.bitsandbytes.int8_vectorwise_dequant(weight, module.weight.SCB)
    return weight.float()


def wish(kind):
    """What a recipe says: its own block size and double quantization are not the checkpoint's."""
    return QuantizationSection(format=FORMATS[kind], block_size=128, double_quant=True, compute="float32")


def frozen(model):
    return {n.removesuffix(".base"): m for n, m in model.named_modules() if isinstance(m, FrozenLinear)}


def assert_dequantizes_alike(found, expected, kind):
    if kind == "int8":
        # code * (absmax / 127) against (code * absmax) * float32(1 / 127): four roundings of half an ulp
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(torch.float32).eps, atol=0)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_what_bitsandbytes_dequantizes(quantized, kind):
    folder, expected = quantized[kind]
    layers = frozen(built(section(folder), wish(kind), MAP).model.model)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert_dequantizes_alike(layer.dense(torch.float32), expected[name], kind)
    assert isinstance(layers[GATE], DenseLinear) == (kind == "skipped")


@pytest.mark.parametrize("kind", ["nf4-nested", "int8"])
def test_codes_and_scales_are_those_of_the_file(quantized, kind):
    folder, _ = quantized[kind]
    stored = load_file(folder / "model.safetensors")
    codes, scales = frozen(built(section(folder), wish(kind), MAP).model.model)[GATE].storage()
    assert torch.equal(
        codes.view(torch.uint8).flatten(), stored[f"{GATE}.weight"].view(torch.uint8).flatten()
    )
    if kind == "int8":
        assert torch.equal(scales.view(torch.float32).flatten(), stored[f"{GATE}.SCB"])


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["nf4-nested", "int8"])
def test_each_fsdp_rank_reads_the_rows_it_holds(quantized, kind):
    folder, _ = quantized[kind]
    alone = built(section(folder), wish(kind), MAP).model.model
    parameters = dict(alone.named_parameters())
    stored = load_file(folder / "model.safetensors")
    whole = {n: t.numel() * t.element_size() for n, t in stored.items()}

    def rank_main(rank):
        engine = FsdpEngine(torch.device("cpu"), timeout_s=60, cpu_offload=False)
        engine.start()
        try:
            made = built(section(folder), wish(kind), MAP, engine=engine)
            for name, parameter in made.model.model.named_parameters():
                start, stop = engine.rows(parameter)
                mine, full = engine.local(parameter), parameters[name][start:stop]
                assert torch.equal(mine.view(torch.uint8), full.view(torch.uint8)), name
            norms = [a.base_norm.item() for _, a in adapters(made.model.model)]
            assert norms == pytest.approx([a.base_norm.item() for _, a in adapters(alone)], rel=1e-6)
            # whole on both ranks: norms, the tables of scales and levels, a byte a weight that names its layout
            tables = ("absmax", "quant_map", "weight_format") if "nested" in kind else ("weight_format",)
            small = sum(n for k, n in whole.items() if k.endswith(tables) and not k.endswith("weight.absmax"))
            small += sum(whole[k] for k, p in parameters.items() if p.dim() == 1 and k in whole)
            states = sum(n for k, n in whole.items() if ".quant_state." in k)
            assert made.loaded.bytes_read == sum(whole.values()) - states + small
        finally:
            engine.stop()

    fork(rank_main, 2)


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["nf4-nested", "int8"])
def test_a_run_trains_over_it_and_its_adapter_finds_the_base_again(quantized, kind, tmp_path):
    folder, _ = quantized[kind]
    run = make_run(
        tmp_path,
        model={"config": None, "weights": "checkpoint", "id": str(folder)},
        quantization={"format": FORMATS[kind]},
    )
    plan = run.read_plan()
    assert any("quantized already" in w for w in plan.warnings)
    assert kind == "int8" or not plan.recipe.quantization.double_quant
    run_ranks(run)
    assert losses(run)[-1] < losses(run)[0]
    loaded = load(run.path / "adapter", base=None, say=lambda line: None)
    assert loaded.model_dir == folder
    adapter = open_adapter(run.path / "adapter", base=None, say=lambda line: None)
    merge(adapter, "dense", tmp_path / "merged", progress=lambda done, total: None)
    # plain floats that transformers loads, without a word of quantization
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").float()
    ids = torch.arange(8)[None] + 3
    ours = loaded.model.logits(ids, None)
    # int8's weights are written as float16, the rest of it in float32
    torch.testing.assert_close(merged(ids).logits, ours, rtol=0, atol=2e-2 if kind == "int8" else 1e-4)


def test_the_bare_base_is_loaded_as_it_is_stored(quantized):
    folder, expected = quantized["nf4"]
    model = load(None, base=str(folder), say=lambda line: None).model.model
    assert torch.equal(frozen(model)[GATE].dense(torch.float32), expected[GATE])


def save_tokenizer(folder):
    from decompft.launcher.worker.tokenizers import load_tokenizer

    load_tokenizer(ModelSection(config=LLAMA, weights="random"), None).save_pretrained(folder)


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["none", "int8", "fp4"])
def test_another_format_than_the_checkpoint_s_is_refused(quantized, wanted):
    folder, _ = quantized["nf4"]
    with pytest.raises(ModelError, match=f"bitsandbytes nf4; quantization.format is {wanted}") as caught:
        built(section(folder), QuantizationSection(format=wanted), MAP)
    assert "set quantization.format: nf4" in caught.value.hint


@pytest.mark.parametrize(
    ("method", "options", "why"),
    [("pissa", {"base": "residual"}, "stores another base"), ("lora", {"init": "loftq"}, "loses nothing")],
)
def test_the_plan_refuses_what_would_rewrite_codes(quantized, tmp_path, method, options, why):
    def run(kind, **more):
        model = {"config": None, "weights": "checkpoint", "id": str(quantized[kind][0])}
        adapter = {"method": method, "rank": 4, "options": options | more}
        quantization = {"format": FORMATS[kind]}
        return make_run(tmp_path, kind, model=model, quantization=quantization, adapter=adapter)

    with pytest.raises(PlanError, match=f"{why}.*model.layers.0") as caught:
        run("nf4-nested")
    assert "unquantized checkpoint" in caught.value.hint
    if method == "pissa":
        run("int8", base="exact")


def test_the_plan_refuses_it_already(quantized, tmp_path):
    with pytest.raises(ModelError, match="quantized already"):
        make_run(
            tmp_path,
            model={"config": None, "weights": "checkpoint", "id": str(quantized["int8"][0])},
            quantization={"format": "nf4"},
        )


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "fp8"])
def test_what_is_not_bitsandbytes_is_refused_by_name(method):
    with pytest.raises(ModelError, match=f"quantized by {method}"):
        stored_format({"quantization_config": {"quant_method": method, "bits": 4}})


def test_random_weights_of_its_shape_are_of_any_format():
    model = ModelSection(id="some/model", weights="random")
    config = {"quantization_config": {"quant_method": "gptq"}}
    assert as_stored(model, NF4, config, None) == (NF4, ())


def test_blocks_that_we_lack_are_refused(plain, quantized, tmp_path):
    folder = changed(quantized["fp4"][0], tmp_path, state={"blocksize": 256})
    with pytest.raises(ModelError, match="blocks of 256; decompft has blocks of 64 and 128"):
        built(section(folder), wish("fp4"), MAP)


def test_blocks_that_cross_rows_are_refused(quantized, tmp_path):
    folder = changed(quantized["fp4"][0], tmp_path, state={"shape": [128, 320 - 32]})
    with pytest.raises(ModelError, match="blocks cross rows|no multiple"):
        built(section(folder), wish("fp4"), MAP)


@pytest.mark.parametrize(("part", "words"), [("absmax", "lacks .*absmax"), ("quant_map", "")])
def test_a_missing_part_is_named(quantized, tmp_path, part, words):
    folder = changed(quantized["fp4"][0], tmp_path, drop=f"{GATE}.weight.{part}")
    if not words:  # the levels are the format's own
        built(section(folder), wish("fp4"), MAP)
        return
    with pytest.raises(ModelError, match=words):
        built(section(folder), wish("fp4"), MAP)


def test_other_levels_than_the_format_s_are_refused(quantized, tmp_path):
    folder = changed(quantized["fp4"][0], tmp_path, levels=True)
    with pytest.raises(ModelError, match="other levels"):
        built(section(folder), wish("fp4"), MAP, engine=single())


def changed(original, folder, *, state=None, drop=None, levels=False):
    """A copy with every quant_state changed, a tensor dropped, or other levels."""
    (folder / "config.json").write_bytes((original / "config.json").read_bytes())
    tensors = load_file(original / "model.safetensors")
    for name, tensor in tensors.items():
        if ".quant_state." in name and state:
            text = json.dumps({**json.loads(bytes(tensor.tolist())), **state}).encode()
            tensors[name] = torch.tensor(list(text), dtype=torch.uint8)
        if name.endswith(".quant_map") and levels:
            tensors[name] = tensor * 0.5
    save_file({n: t for n, t in tensors.items() if n != drop}, folder / "model.safetensors")
    return folder
