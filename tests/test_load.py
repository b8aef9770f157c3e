"""Checkpoints of every shape load, each rank reads its own rows only, and what does not fit is told in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import fork
from tiny_models import FAMILIES, NF4, built, plain_model, saved, section

from decompft.launcher.errors import ModelError
from decompft.launcher.recipe import AdapterSection, ModelSection
from decompft.launcher.worker.engines.fsdp import FsdpEngine
from decompft.launcher.worker.tensors import RandomSource

MAP = AdapterSection(method="map", rank=4, alpha=8.0)
GATE = "model.layers.1.mlp.gate_proj.weight"
FIELDS = {"llama": FAMILIES["llama"], "gpt2": FAMILIES["gpt2"], "gemma": FAMILIES["gemma"]}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """family -> folder of its checkpoint as transformers saves it, one file."""
    return {name: saved(tmp_path_factory.mktemp(name), fields)[0] for name, fields in FIELDS.items()}


def copied(original: Path, folder: Path, change=lambda tensors: tensors) -> Path:
    """The checkpoint with its tensors changed, in a new folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((original / "config.json").read_bytes())
    save_file(change(load_file(original / "model.safetensors")), folder / "model.safetensors")
    return folder


def configured(folder: Path, **fields) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(built(section(folder)).model.model.named_parameters())


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


# -- layouts of a checkpoint -----------------------------------------------------------------------


def test_shards_with_an_index_load_as_one_file_does(originals, tmp_path):
    plain_model(FIELDS["llama"]).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(weights(tmp_path), weights(originals["llama"]))


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_a_checkpoint_of_the_bare_decoder_loads(originals, tmp_path, family):
    """Without the prefix, as GPT-2's own on the hub is."""
    prefix = {"gpt2": "transformer.", "gemma": "model."}[family]
    bare = copied(originals[family], tmp_path, lambda ts: {n.removeprefix(prefix): t for n, t in ts.items()})
    assert_same(weights(bare), weights(originals[family]))


def test_a_checkpoint_with_a_prefix_too_many_loads(originals, tmp_path):
    prefixed = copied(originals["llama"], tmp_path, lambda ts: {f"model.{n}": t for n, t in ts.items()})
    assert_same(weights(prefixed), weights(originals["llama"]))


def test_other_files_beside_the_model_are_not_read(originals, tmp_path):
    folder = copied(originals["llama"], tmp_path)
    save_file({GATE: torch.zeros(128, 64)}, folder / "other.safetensors")
    assert_same(weights(folder), weights(originals["llama"]))


def test_tensors_that_the_model_lacks_are_ignored(originals, tmp_path):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "ids": torch.ones(4, dtype=torch.int64),
    }
    folder = copied(originals["llama"], tmp_path, lambda ts: ts | extra)
    assert_same(weights(folder), weights(originals["llama"]))


def test_more_layers_than_the_config_says_are_refused(originals, tmp_path):
    folder = configured(copied(originals["llama"], tmp_path), num_hidden_layers=1)
    with pytest.raises(
        ModelError, match=r"holds 9 tensors of layers .* first model.layers.1.input_layer"
    ) as caught:
        weights(folder)
    assert "different models" in caught.value.hint and "num_hidden_layers" in caught.value.hint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_stored_as_the_recipe_asks(originals, tmp_path, dtype):
    folder = copied(originals["llama"], tmp_path, lambda ts: {n: t.to(dtype) for n, t in ts.items()})
    expected = {n: t.to(dtype).float() for n, t in weights(originals["llama"]).items()}
    assert_same(weights(folder), expected)


# -- tied tensors ----------------------------------------------------------------------------------


def test_tied_tensors_that_are_both_there_and_equal_load(originals, tmp_path):
    folder = copied(
        originals["gemma"],
        tmp_path,
        lambda ts: ts | {"lm_head.weight": ts["model.embed_tokens.weight"].clone()},
    )
    assert_same(weights(folder), weights(originals["gemma"]))


def test_a_tied_tensor_under_its_second_name_only_loads(originals, tmp_path):
    def renamed(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        return tensors

    assert_same(weights(copied(originals["gemma"], tmp_path, renamed)), weights(originals["gemma"]))


def test_tied_tensors_with_other_values_are_refused(originals, tmp_path):
    """transformers unties them with a warning; training would go on with the wrong head here."""
    folder = copied(
        originals["gemma"], tmp_path, lambda ts: ts | {"lm_head.weight": ts["model.embed_tokens.weight"] + 1}
    )
    with pytest.raises(ModelError, match=r"ties model.embed_tokens.weight and lm_head.weight") as caught:
        weights(folder)
    assert "tie_word_embeddings: false" in caught.value.hint


# -- what does not fit -----------------------------------------------------------------------------


def test_a_missing_shard_is_named(tmp_path):
    plain_model(FIELDS["llama"]).save_pretrained(tmp_path, max_shard_size="60KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=f"{gone.name}: this shard is in the index but not"):
        weights(tmp_path)


@pytest.mark.parametrize("kept", [0.9, 0.001])
def test_a_truncated_file_is_named(originals, tmp_path, kept):
    folder = copied(originals["llama"], tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(ModelError, match=r"model.safetensors: (truncated|not a .*cut short)") as caught:
        weights(folder)
    assert "fetch the file again" in caught.value.hint


def test_a_damaged_index_is_named(tmp_path):
    plain_model(FIELDS["llama"]).save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text()[:100])
    with pytest.raises(ModelError, match=r"index.json: not a weight index"):
        weights(tmp_path)


def test_no_safetensors_at_all_is_told(originals, tmp_path):
    folder = copied(originals["llama"], tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no \*.safetensors file"):
        weights(folder)


@pytest.mark.parametrize(
    ("family", "config"), [("llama", {"intermediate_size": 192}), ("gpt2", {"n_inner": 192})]
)
def test_another_shape_is_told_with_both(originals, tmp_path, family, config):
    folder = configured(copied(originals[family], tmp_path), **config)
    with pytest.raises(ModelError, match=r"(128, 64|64, 256).*(192, 64|64, 192)") as caught:
        weights(folder)
    assert "different models" in caught.value.hint


def test_a_missing_tensor_is_named(originals, tmp_path):
    folder = copied(originals["llama"], tmp_path, lambda ts: {n: t for n, t in ts.items() if n != GATE})
    with pytest.raises(ModelError, match=f"lacks 1 of the model's tensors, first {GATE}"):
        weights(folder)


def test_a_checkpoint_that_is_quantized_already_is_refused(originals, tmp_path):
    """An fp8 weight has the right name and shape; without its scale it is another number."""
    folder = copied(originals["llama"], tmp_path, lambda ts: ts | {GATE: ts[GATE].to(torch.float8_e4m3fn)})
    with pytest.raises(ModelError, match=f"{GATE} is stored as F8_E4M3.*quantized already"):
        weights(folder)


# -- weights: random -------------------------------------------------------------------------------

SHAPES = {"a.weight": (24, 10), "b.weight": (24, 10), "norm.weight": (12,), "a.bias": (12,)}
GOLDEN = [-0.0021787, 0.0284233, 0.0315192]
CPU = torch.device("cpu")


def test_random_rows_are_the_same_however_they_are_cut():
    source = RandomSource(3, SHAPES, CPU)
    whole = source.rows("a.weight", 0, 24)
    pieces = [source.rows("a.weight", a, b) for a, b in ((0, 1), (1, 1), (1, 17), (17, 24))]
    assert torch.equal(torch.cat(pieces), whole)
    pieces = [source.rows("a.weight", a, b, transposed=True) for a, b in ((0, 4), (4, 10))]
    assert torch.equal(torch.cat(pieces), whole.T)


def test_random_weights_are_fixed_by_seed_and_name():
    first, same = (RandomSource(3, SHAPES, CPU).rows("a.weight", 0, 24) for _ in range(2))
    assert torch.equal(first, same)
    assert not torch.equal(first, RandomSource(4, SHAPES, CPU).rows("a.weight", 0, 24))
    assert not torch.equal(first, RandomSource(3, SHAPES, CPU).rows("b.weight", 0, 24))
    # the very numbers: a run of last year is repeated
    assert first[0, :3].tolist() == pytest.approx(GOLDEN, abs=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_weights_are_equal_on_a_gpu():
    shapes = {"w": (2000, 300)}
    cpu, gpu = (RandomSource(0, shapes, torch.device(d)).rows("w", 7, 1900) for d in ("cpu", "cuda"))
    assert torch.equal(cpu, gpu.cpu())


def test_random_weights_are_as_wide_as_transformers_init():
    values = RandomSource(0, {"w": (1000, 1000)}, CPU).rows("w", 0, 1000)
    # a million draws: three standard errors of mean and deviation
    assert abs(values.mean()) < 3 * 0.02 / 1000
    assert values.std().item() == pytest.approx(0.02, rel=0.003)
    flat = values.flatten()
    for lag in (1, 2, 1000):  # neighbours in a row and in a column are independent
        assert abs(torch.mean(flat[lag:] * flat[:-lag]) / 0.02**2) < 0.004


def test_a_random_model_starts_as_a_fresh_one_in_norms_and_biases():
    random = ModelSection(config=FAMILIES["llama-llama3-rope"], weights="random")
    for name, parameter in built(random).model.model.named_parameters():
        if parameter.dim() == 1:
            assert torch.all(parameter == (0.0 if name.endswith("bias") else 1.0)), name


@pytest.mark.dist
def test_random_weights_do_not_depend_on_the_world():
    random = ModelSection(config=FIELDS["gpt2"], weights="random")
    alone = dict(built(random, NF4, MAP).model.model.named_parameters())

    def rank_main(rank):
        engine = FsdpEngine(CPU, timeout_s=60, cpu_offload=False)
        engine.start()
        try:
            for name, parameter in built(random, NF4, MAP, engine=engine).model.model.named_parameters():
                start, stop = engine.rows(parameter)
                mine, full = engine.local(parameter).detach(), alone[name][start:stop].detach()
                if name.endswith(".a"):  # a norm: the order of addition
                    torch.testing.assert_close(mine, full, rtol=1e-6, atol=0)
                else:
                    assert torch.equal(mine.view(torch.uint8), full.view(torch.uint8)), name
        finally:
            engine.stop()

    fork(rank_main, 3)
