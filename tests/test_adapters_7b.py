"""The timing table at toy size, and what the count of dense tensors sees."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import adapters_7b  # noqa: E402
from dense_tensors import dense_tensors  # noqa: E402
from recording import FakeRecorder  # noqa: E402
from scoreboard_cases import cases  # noqa: E402

from decompft.adapters.base import Adapter  # noqa: E402
from decompft.adapters.frozen.fourbit import Nf4Linear  # noqa: E402
from decompft.adapters.inject import make_adapter  # noqa: E402
from decompft.adapters.joint import join  # noqa: E402
from decompft.adapters.lora import LoraLinear  # noqa: E402
from decompft.adapters.spec import AdapterConfig, spec_of  # noqa: E402
from decompft.launcher.recipe import AdapterSection  # noqa: E402

# the first two hold dense factors, as they are; liera works on tiles, and a layer this small is one
MANY = ("svdiff", "svft full", "liera", "liera exact")
MODEL = {
    "model_type": "llama", "vocab_size": 260, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def layer(kind=None, method="lora", options=None, rank=16):
    base = Nf4Linear(128, 256, block_size=64, double_quant=True, bias_dtype=None)
    for name, tensor in zip(base.storage_names(), base.pack(torch.randn(256, 128)), strict=True):
        setattr(base, name, torch.nn.Parameter(tensor, requires_grad=False))
    typed = AdapterSection(method=method, options=options or {}).typed_options()
    config = AdapterConfig(method=method, rank=rank, alpha=32.0, dropout=0.0, options=typed)
    made = make_adapter(base, config) if kind is None else kind(base, config)
    adapters_7b.fill(made)
    return made


def test_lora_makes_the_dequantized_weight_once_a_pass_and_holds_one():
    found = dense_tensors(layer(), torch.float32)
    assert (found.made, found.alive) == (2, 1)


@pytest.mark.parametrize("case", [c for c in cases() if c.name not in MANY], ids=lambda c: c.name)
def test_no_method_holds_more_than_one_tensor_of_the_weights_size(case):
    made = layer(method=case.method, options=case.options)
    made.on_step(adapters_7b.LATE)
    found = dense_tensors(made, torch.bfloat16)
    assert found.alive <= 1
    # the weight dequantized for each pass, nothing else; DoRA's rows are measured on it before they are scaled
    assert found.made == (3 if "dora" in case.name else 2)


def test_a_dense_update_is_seen():
    class Wasteful(LoraLinear):
        def forward(self, x):
            return x @ (self.base.dense(torch.float32) + self.B @ self.A).T

    found = dense_tensors(layer(Wasteful), torch.float32)
    assert found.made > 2 and found.alive > 1


def test_a_dense_update_is_seen_also_where_the_weight_is_gone_by_then():
    class Sequential(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, B, A, base):
            ctx.save_for_backward(B, A)
            ctx.base = base
            y = x @ base.dense(x.dtype).T
            return y + x @ (B @ A).to(x.dtype).T

        @staticmethod
        def backward(ctx, dy):
            B, A = ctx.saved_tensors
            dx = dy @ ctx.base.dense(dy.dtype)
            return dx + dy @ (B @ A).to(dy.dtype), None, None, None

    class Patient(LoraLinear):
        def forward(self, x):
            return Sequential.apply(x, self.B, self.A, self.base)

    found = dense_tensors(layer(Patient), torch.float32)
    assert (found.made, found.alive) == (4, 1)


@pytest.mark.dist
def test_methods_are_timed_beside_lora_of_the_same_run(tmp_path):
    sizes = ["data.sequence_length=32", "train.micro_batch_size=1", "train.global_batch_size=1"]
    overrides = [f"model.config={json.dumps(MODEL)}", *sizes, "quantization.compute=float32"]
    part, out = tmp_path / "part.jsonl", tmp_path / "table.json"
    asked = ["--micro", "1", "2", "--steps", "1", "--recorded", "--out", str(part), "--cases", "map", "dora"]
    adapters_7b.main([*asked, "--override", *overrides], recorder=FakeRecorder)
    adapters_7b.main(["--join", str(part), "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert {row["case"] for row in rows} == {"lora", "map", "dora"}
    assert not [row for row in rows if "error" in row]
    # first and last, two micro batches, with passes recorded and without
    assert len([row for row in rows if row["case"] == "lora"]) == 8
    assert all(row["step_over_lora"] > 0 for row in rows)
    losses = {(r["case"], r["place"], r["micro_batch"], r["is_recorded"]): r["loss"] for r in rows}
    for (*where, is_recorded), loss in losses.items():
        assert loss == pytest.approx(losses[*where, not is_recorded], rel=1e-4)


class Three(torch.nn.Module):
    """Three joined layers of one x."""

    def __init__(self, *members):
        super().__init__()
        self.q, self.k, self.v = members
        join(self, [("q", "k", "v")])

    @property
    def base(self):
        return self.q.base

    def forward(self, x):
        return self.q(x) + self.k(x) + self.v(x)


@pytest.mark.parametrize("case", [c for c in cases() if c.name not in MANY], ids=lambda c: c.name)
def test_joined_layers_hold_one_weight_at_a_time(case):
    # of rank 4: the thin gradients of all three are one array, which shall stay thin in a layer as small as this
    members = [layer(method=case.method, options=case.options, rank=4) for _ in range(3)]
    for made in members:
        made.on_step(adapters_7b.LATE)
    is_thin = spec_of(made.config).num_columns(256, 128, made.config) <= 16
    if is_thin and type(made).forward is Adapter.forward:
        found = dense_tensors(Three(*members), torch.bfloat16)
        assert found.alive <= 1
        assert found.made == (9 if "dora" in case.name else 6)
