"""Attention inside documents alone: exact, without a mask over the row, and chosen in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers.masking_utils as masking
from tiny_models import FAMILIES, PLAIN, built, documents, row, saved, section
from torch.nn import functional as F

from decompft.launcher.attention import FAMILIES as PROVEN
from decompft.launcher.errors import ModelError
from decompft.launcher.recipe import AdapterSection, QuantizationSection
from decompft.launcher.worker import attention, packed_attention
from decompft.launcher.worker.attention import Heads, prove
from decompft.launcher.worker.data.batches import collate
from decompft.launcher.worker.data.documents import Documents
from decompft.launcher.worker.model import PLAIN_HEADS

LENGTHS = (9, 1, 13, 2, 7)
LORA = AdapterSection(method="lora", rank=4, alpha=8.0)
CPU = torch.device("cpu")
UNCAPPED = [name for name in FAMILIES if name != "gemma2"]


def test_documents_end_where_rows_end():
    found = collate([row((3, 4)), row((2,)), None], pad_id=0).documents
    assert found.lengths == (3, 4, 1, 2, 6, 8)
    assert found.starts.tolist() == [0, 3, 7, 8, 10, 16, 24]
    assert found.starts.dtype == torch.int32
    assert found.longest == 8 and found.is_packed


def test_rows_of_one_document_are_one_with_their_padding():
    """What follows a document is not seen by it, and no target lies there."""
    found = collate([row((3,)), row((11,)), None], pad_id=0).documents
    assert found.lengths == (16, 16, 16) and not found.is_packed


def made(lengths: Any, *, heads: int, keys: int, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """Documents, and a random query, key and value that ask for gradients."""
    found, draw = Documents.of(lengths), torch.Generator().manual_seed(0)
    sizes = [(sum(found.lengths), n, 16) for n in (heads, keys, keys)]
    tensors = [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]
    return found, *tensors


def masked(query, key, value, found: Documents, scaling: float, window: int | None):
    """The same with everything written out: scores of all pairs, and -inf on those that must not be."""
    number = torch.repeat_interleave(torch.arange(len(found.lengths)), torch.tensor(found.lengths))
    at = torch.arange(len(number))
    back = at[:, None] - at
    seen = (number[:, None] == number) & (back >= 0) & (back < (window or len(number)))
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


@pytest.mark.parametrize("keys", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 5])
def test_document_by_document_is_attention_under_a_mask(keys, window):
    found, *inputs = made([LENGTHS, (20, 12)], heads=4, keys=keys)
    ours = packed_attention.by_document(*inputs, found, 0.3, window)
    written_out = masked(*inputs, found, 0.3, window)
    torch.testing.assert_close(ours, written_out, rtol=1e-12, atol=1e-12)
    slope = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    grads, expected = (torch.autograd.grad(out, inputs, slope) for out in (ours, written_out))
    torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-12)


def documented(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), **groups
):
    """torch's varlen_attn as its documentation has it, of the arguments that we give."""
    assert cu_seq_q.dtype == torch.int32 and cu_seq_q is cu_seq_k and max_q == max_k
    lengths = tuple(cu_seq_q.diff().tolist())
    assert max_q == max(lengths) and window_size[1] == 0
    assert groups.get("enable_gqa", True) or query.shape[1] == key.shape[1]
    found = Documents(lengths=lengths, starts=cu_seq_q, is_packed=True)
    return masked(query, key, value, found, scale, None if window_size[0] < 0 else window_size[0] + 1)


def of_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return documented(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size
    )


def of_2_13(*args, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False):
    return documented(*args, scale=scale, window_size=window_size, enable_gqa=enable_gqa)


@pytest.mark.parametrize("keys", [4, 2])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("version", [of_2_11, of_2_13])
def test_what_the_kernel_is_asked_for_is_attention_inside_documents(keys, window, version, monkeypatch):
    """A stand-in of the kernel, which runs on no CPU; on a GPU the kernel itself is tested below."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", version)
    packed_attention._asks_for_groups.cache_clear()
    found, *inputs = made([LENGTHS], heads=4, keys=keys)
    ours = packed_attention.varlen(*inputs, found, 0.3, window)
    packed_attention._asks_for_groups.cache_clear()
    torch.testing.assert_close(ours, packed_attention.by_document(*inputs, found, 0.3, window))


@pytest.fixture(scope="module", params=UNCAPPED)
def folder(request, tmp_path_factory):
    return saved(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])[0]


def trained(folder, attend: str = "auto", *, recompute: str = "none"):
    """The family's model with LoRA whose B is not 0, so that both factors have gradients."""
    made = built(section(folder, attention=attend), PLAIN, LORA, recompute=recompute)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.trained.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    made.model.train()
    return made


def gradients(made, batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = made.model(batch)
    return loss.detach(), list(torch.autograd.grad(loss, list(made.trained.values())))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Sums in another order: float32 keeps 6e-8, and a softmax's slope is a difference of like numbers."""
    return bool((found - expected).norm() <= 4e-6 * expected.norm())


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_packed_rows_gradients_are_the_sum_of_its_documents(folder, recompute):
    made, packed = trained(folder, recompute=recompute), row(LENGTHS)
    loss, grads = gradients(made, collate([packed, row((20,), seed=1)], pad_id=0))
    parts = [gradients(made, collate([one], pad_id=0)) for one in [*documents(packed), row((20,), seed=1)]]
    torch.testing.assert_close(loss, sum(part[0] for part in parts), rtol=1e-6, atol=0)
    for name, found, expected in zip(
        made.trained, grads, zip(*(p[1] for p in parts), strict=True), strict=True
    ):
        assert close(found, sum(expected)), name


def test_it_equals_sdpa_under_a_mask(folder):
    batch = collate([row(LENGTHS), row((11, 9), seed=1), row((17,), seed=2)], pad_id=0)
    ours, masks = trained(folder), trained(folder, "sdpa")
    assert ours.model.config._attn_implementation == packed_attention.NAME
    assert masks.model.config._attn_implementation == "sdpa"
    (loss, grads), (expected, by_mask) = gradients(ours, batch), gradients(masks, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, one, other in zip(ours.trained, grads, by_mask, strict=True):
        assert close(one, other), name


@torch.no_grad()
def test_another_documents_tokens_change_no_bit(folder):
    model, packed = trained(folder).model.eval(), row(LENGTHS)
    other = replace(packed, tokens=packed.tokens.copy())
    other.tokens[10:23] = other.tokens[10:23][::-1] // 2
    first, second = (collate([one], pad_id=0) for one in (packed, other))
    before, after = (model.hidden(b.input_ids, b.position_ids, b.documents)[0] for b in (first, second))
    assert torch.equal(before[:10], after[:10]) and torch.equal(before[23:], after[23:])
    assert not torch.equal(before[10:23], after[10:23])


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("rows", [[LENGTHS, (20,)], [(7,), (20,)]], ids=["packed", "one document a row"])
def test_no_mask_is_made_and_nothing_is_asked_of_the_device(folder, rows, recompute, monkeypatch):
    """transformers would look whether positions restart: on a GPU, each time, a wait for it."""
    made = trained(folder, recompute=recompute)

    def refuse(*args, **kwargs):
        raise AssertionError("a mask over the row")

    monkeypatch.setitem(masking.AttentionMaskInterface._global_mapping, packed_attention.NAME, refuse)
    monkeypatch.setattr(masking, "find_packed_sequence_indices", refuse)
    loss, grads = gradients(made, collate([row(r) for r in rows], pad_id=0))
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)


@torch.no_grad()
def test_a_call_without_documents_is_transformers_own(folder):
    """`generate` hands masks of its own: padding on the left here, which may change nothing."""
    model = trained(folder).model.eval().model
    ids = torch.from_numpy(row((9,)).tokens).long()[None]
    padded, mask = F.pad(ids, (3, 0)), torch.tensor([[0] * 3 + [1] * 9])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    alone = model(input_ids=ids).logits[0]
    beside = model(input_ids=padded, attention_mask=mask, position_ids=places).logits[0, 3:]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=2e-5)


def test_the_families_are_those_with_a_plain_head():
    assert PROVEN == PLAIN_HEADS


def test_the_worker_says_what_runs(tmp_path):
    capped = saved(tmp_path / "gemma2", FAMILIES["gemma2"])[0]
    llama = saved(tmp_path / "llama", FAMILIES["llama"])[0]

    def words(folder, attend):
        return built(section(folder, attention=attend)).kernels.partition("attention: ")[2]

    assert words(llama, "auto").startswith("document by document in packed rows, SDPA (")
    assert words(llama, "varlen") == words(llama, "auto")
    assert words(llama, "sdpa") == "sdpa (model.attention)"
    assert words(llama, "eager") == "eager (model.attention)"
    assert (
        words(capped, "auto") == "eager, with a mask over packed rows (the model caps its attention scores)"
    )
    with pytest.raises(ModelError, match="caps its attention scores"):
        built(section(capped, attention="varlen"))


HEADS = Heads(num=4, num_keys=2, dim=16, has_window=True)


def test_a_kernel_is_used_where_it_agrees_with_sdpa(monkeypatch):
    monkeypatch.setattr(packed_attention, "varlen", packed_attention.by_document)
    assert prove(HEADS, torch.bfloat16, CPU) is None


def whole_row(query, key, value, found, scaling, window):
    """What a kernel does that knows no documents."""
    one = Documents.of([(sum(found.lengths),)])
    return packed_attention.by_document(query, key, value, one, scaling, window)


def no_window(query, key, value, found, scaling, window):
    return packed_attention.by_document(query, key, value, found, scaling, None)


@pytest.mark.parametrize("wrong", [whole_row, no_window])
def test_a_kernel_that_differs_is_not_used(wrong, monkeypatch):
    monkeypatch.setattr(packed_attention, "varlen", wrong)
    assert "differs from SDPA by" in (prove(HEADS, torch.bfloat16, CPU) or "")


def test_a_kernel_that_does_not_run_is_not_used(tmp_path, monkeypatch):
    """There is none for a CPU; a GPU whose kernel fails falls back to the mask, in words."""
    reason = prove(HEADS, torch.bfloat16, CPU)
    assert reason is not None and "does not run here" in reason
    monkeypatch.setattr(attention, "_refusal", lambda *_: reason)
    made = built(section(saved(tmp_path, FAMILIES["llama"])[0]))
    assert f"with a mask over packed rows ({reason})" in made.kernels
    assert made.model.config._attn_implementation == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("heads,keys,dim", [(8, 8, 128), (8, 2, 64), (4, 1, 256), (9, 3, 64)])
@pytest.mark.parametrize("window", [None, 100])
def test_the_gpus_kernel_equals_sdpa_forward_and_backward(heads, keys, dim, window):
    device, draw = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
    found = Documents.of([(1, 300, 700, 23), (1024,)]).to(device)
    shape = (2048, heads, dim)
    inputs = [
        torch.randn(2048, n, dim, generator=draw, device=device).bfloat16().requires_grad_()
        for n in (heads, keys, keys)
    ]
    whole = [x.detach().float().requires_grad_() for x in inputs]
    slope = torch.randn(shape, generator=draw, device=device).bfloat16()
    ours = packed_attention.varlen(*inputs, found, dim**-0.5, window)
    exact = packed_attention.by_document(*whole, found, dim**-0.5, window)
    pairs = [(ours, exact)]
    grads = torch.autograd.grad(ours, inputs, slope), torch.autograd.grad(exact, whole, slope.float())
    pairs += zip(*grads, strict=True)
    for one, other in pairs:
        # bf16 keeps 8 bits, and the weights of attention are rounded to it between two products
        assert (one.float() - other).norm() < 2**-6 * other.norm()


@pytest.mark.gpu
def test_a_gpu_runs_it_through_the_whole_model_and_no_document_changes_another(tmp_path):
    from decompft.launcher.worker.engines.base import Engine

    engine = Engine(torch.device("cuda"), timeout_s=60)
    bf16 = QuantizationSection(format="none", compute="bfloat16")
    folder = saved(tmp_path, FAMILIES["mistral"])[0]
    made, masks = (built(section(folder, attention=a), bf16, LORA, engine=engine) for a in ("varlen", "sdpa"))
    assert "variable-length (torch) in packed rows" in made.kernels
    packed = row(LENGTHS)
    batch = collate([packed], pad_id=0).to(engine.device)
    loss, by_mask = made.model(batch), masks.model(batch)
    torch.testing.assert_close(loss, by_mask, rtol=2e-2, atol=0)
    loss.backward()
    other = replace(packed, tokens=packed.tokens.copy())
    other.tokens[10:23] = other.tokens[10:23][::-1] // 2
    changed = collate([other], pad_id=0).to(engine.device)
    with torch.no_grad():
        before, after = (
            made.model.hidden(b.input_ids, b.position_ids, b.documents)[0] for b in (batch, changed)
        )
    assert torch.equal(before[:10], after[:10]) and torch.equal(before[23:], after[23:])
