"""`compute: fp8` from recipe to rank: what is refused, what stays in bfloat16, what is said and forecast."""

from __future__ import annotations

import pytest
import torch
from planning import ALONE, CPU, LLAMA_7B, TINY, gpus, recipe
from pydantic import ValidationError
from tiny_models import FAMILIES

from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.fp8_products import Fp8Products
from decompft.launcher.errors import AdapterError, PlanError
from decompft.launcher.planner import make
from decompft.launcher.recipe import AdapterSection, ModelSection, QuantizationSection
from decompft.launcher.worker import checkup
from decompft.launcher.worker import fp8 as worker_fp8
from decompft.launcher.worker.build import Built, build, outline_of
from decompft.launcher.worker.engines.base import Engine

FP8 = {"format": "nf4", "compute": "fp8"}


def built(
    fields: dict, *, method: str = "lora", targets: str | list[str] = "all-linear", **quantization
) -> Built:
    return build(
        ModelSection(config=fields, weights="random"),
        QuantizationSection(**{**FP8, **quantization}),
        AdapterSection(method=method, rank=4, alpha=8.0, targets=targets),
        Engine(torch.device("cpu"), timeout_s=60), seed=0, model_dir=None, recompute="none",
    )  # fmt: skip


def in_fp8(found: Built) -> list[str]:
    return [
        name.removesuffix(".base")
        for name, module in found.model.model.named_modules()
        if isinstance(module, FrozenLinear) and isinstance(module.products, Fp8Products)
    ]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"compute": "bfloat16", "fp8_skip": ["down_proj"]}, "fp8_skip works with compute fp8 only"),
        ({"format": "int8", "outlier_threshold": 6.0, "compute": "fp8"}, "leave one of the two out"),
        ({"compute": "float8"}, "'bfloat16', 'float32' or 'fp8'"),
    ],
)
def test_combinations_that_cannot_be(section, said):
    with pytest.raises(ValidationError, match=said):
        QuantizationSection.model_validate(section)


def test_activations_are_bfloat16():
    assert QuantizationSection(compute="fp8").activations == "bfloat16"
    assert QuantizationSection(compute="float32").activations == "float32"
    outline = outline_of(
        ModelSection(config=FAMILIES["llama"], weights="random"),
        QuantizationSection(**FP8),
        AdapterSection(),
        None,
    )
    assert {p.dtype for n, p in outline.hf.named_parameters() if "embed" in n or "norm" in n} == {
        torch.bfloat16
    }


def test_a_gpu_without_fp8_is_refused_with_what_to_do():
    machine = gpus(1, 80, name="NVIDIA A100", capability=(8, 0))
    with pytest.raises(PlanError) as error:
        make(recipe(quantization=FP8), machine=machine)
    assert str(error.value).startswith(
        "quantization.compute: fp8 needs a GPU of compute capability 8.9 or higher, NVIDIA A100 has 8.0"
    )
    assert "quantization.compute: bfloat16" in error.value.hint and error.value.exit_code == 2


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), None])
def test_it_is_planned_where_it_works_or_nothing_is_known(capability):
    plan = make(recipe(quantization=FP8), machine=gpus(1, 80, capability=capability))
    assert not any("fp8" in w for w in plan.warnings) and plan.seconds_per_step is None


def test_a_cpu_is_warned():
    plan = make(recipe(TINY, quantization=FP8, **ALONE), machine=CPU)
    assert any("emulated on a CPU" in w for w in plan.warnings)


def test_a_pattern_that_matches_nothing_is_refused_with_the_names():
    with pytest.raises(AdapterError, match="quantization.fp8_skip: 'down_prj' matches no layer") as error:
        make(recipe(quantization=FP8 | {"fp8_skip": ["down_prj"]}), machine=gpus(1, 80))
    assert "q_proj" in error.value.hint and "down_proj" in error.value.hint
    with pytest.raises(AdapterError, match=r"quantization.fp8_skip: '\*\.7\.\*'"):
        built(FAMILIES["llama"], fp8_skip=["*.7.*"])


@pytest.mark.parametrize("form", ["nf4", "fp4", "int8", "fp8", "none"])
def test_forecast_counts_the_copies(form):
    """One weight's codes and its input's; two bytes more and its transposed copy where it is first dequantized."""
    train = {"micro_batch_size": 4, "recompute": "none"}

    def terms(compute: str, **more) -> dict[str, int]:
        quantization = {"format": form, "compute": compute, **more}
        plan = make(recipe(LLAMA_7B, train=train, quantization=quantization, **ALONE), machine=gpus(1, 140))
        return {t.name: t.num_bytes for t in plan.forecast.terms}

    got, before = terms("fp8"), terms("bfloat16")
    weight, tokens = 11008 * 4096, 4 * 2048
    assert got.pop("fp8 copies") == weight * (2 if form in ("nf4", "fp4") else 5) + tokens * 11008
    before.pop("dequantized weights", None)
    assert got == before
    if form == "nf4":
        assert terms("fp8", fp8_skip=["up_proj"])["fp8 copies"] == 2 * 2 * weight


def test_every_linear_multiplies_in_fp8_and_it_is_said():
    found = built(FAMILIES["llama"])
    assert len(in_fp8(found)) == 14
    assert "fp8 products in 14 of 14 linears (emulated on a CPU)" in found.kernels


def test_other_computes_say_nothing():
    found = built(FAMILIES["llama"], compute="bfloat16")
    assert in_fp8(found) == [] and "fp8" not in found.kernels


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_named_layers_stay_in_bfloat16(targets):
    """Adapted or not: patterns are of the model's own names."""
    found = built(FAMILIES["llama"], targets=targets, fp8_skip=["down_proj", "layers.0.*.q_proj"])
    left = in_fp8(found)
    assert len(left) == 11 and not any("down_proj" in n for n in left)
    assert [n for n in left if n.endswith("q_proj")] == ["model.layers.1.self_attn.q_proj"]
    assert "bfloat16 in 3 (named by quantization.fp8_skip: model.layers.0.self_attn.q_proj," in found.kernels


def test_sizes_that_fp8_does_not_take_stay_in_bfloat16():
    odd = {**FAMILIES["llama"], "intermediate_size": 136}
    found = built(odd, format="int8")
    assert len(in_fp8(found)) == 8
    assert "bfloat16 in 6 (a size that is no multiple of 16: model.layers.0.mlp.gate_proj," in found.kernels


def test_a_method_with_a_product_of_its_own_stays_in_bfloat16():
    found = built(FAMILIES["llama"], method="liera", targets=["q_proj"])
    assert (
        len(in_fp8(found)) == 12 and "bfloat16 in 2 (their method multiplies with a changed" in found.kernels
    )


def test_gpt2_s_transposed_layers():
    found = built(FAMILIES["gpt2"])
    assert len(in_fp8(found)) == 8


def test_a_gpu_is_tried_before_training(monkeypatch):
    """What a rank says of a card that cannot, of a torch that refuses, of numbers that are wrong."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (8, 6))
    with pytest.raises(PlanError, match=r"8\.9 or higher, Some GPU has 8\.6"):
        worker_fp8.refuse_gpu(device)

    def refuses(device):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (12, 0))
    monkeypatch.setattr(worker_fp8, "product_error", refuses)
    with pytest.raises(PlanError, match="torch refuses on Some GPU: CUBLAS_STATUS_NOT_SUPPORTED") as error:
        worker_fp8.refuse_gpu(device)
    assert "more" not in str(error.value)
    for wrong in (0.5, float("nan")):
        monkeypatch.setattr(worker_fp8, "product_error", lambda d, wrong=wrong: wrong)
        with pytest.raises(PlanError, match="a product on Some GPU is wrong"):
            worker_fp8.refuse_gpu(device)


def test_the_trial_product_is_right_here():
    assert 0.02 < worker_fp8.product_error(torch.device("cpu")) < 0.05


def test_doctor_says_what_the_machine_can(monkeypatch):
    assert "emulated on the CPU" in checkup._fp8().text
    monkeypatch.setattr(checkup, "_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (8, 0))
    found = checkup._fp8()
    assert found.state == "ok" and found.text.startswith("this GPU has none (compute capability 8.0")
