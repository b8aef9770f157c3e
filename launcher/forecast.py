"""How much memory a rank needs: a sum of named terms, each with its derivation.

Symbols: T tokens of a micro batch (rows x sequence length), h hidden size, e bytes of a compute
number (2 or 4). The model of what is saved for backward is the worker's own: one autograd node a
frozen linear keeps its input (shared by q, k, v and by gate, up) and the thin product of its
adapter; never a dequantized weight. Anchors: Llama-2-7B's shape, nf4 with double quantization,
rank 16 on all linears, sequence 2048, micro batch 4, one H200: 36.9 GiB allocated without and 7.7
with full recomputation (prototype, shared/gpu/README.md).
"""

from __future__ import annotations

from collections.abc import Callable

from decompft.adapters.formats import FORMAT_SPECS
from decompft.adapters.spec import spec_of
from decompft.launcher.cuda_graph import is_recorded
from decompft.launcher.forecast_fitted import (
    CPU_PROCESS_BYTES,
    CUDA_CONTEXT_BYTES,
    CUDA_PROCESS_BYTES,
    DEEPSPEED_PROCESS_BYTES,
    NCCL_BYTES,
    NCCL_HOST_BYTES,
    RECORDED_BYTES,
    RECORDED_EVALUATION_BYTES,
)
from decompft.launcher.forecast_recompute import (
    ON_THE_WAY,
    host_bytes,
    kept_by_norms,
    kept_by_selective,
    kept_without_activation,
    made_again_by_norms,
    made_again_by_selective,
)
from decompft.launcher.forecast_states import (
    ADAMW8BIT_BYTES,
    TRAINED_BYTES,
    gathered,
    largest_tensor,
    pinned_rounding,
    snapshot,
    states,
)
from decompft.launcher.models import ModelShape
from decompft.launcher.plan import RECORDED, RUNTIME, Forecast, Term
from decompft.launcher.recompute import pieces_of, runs_again
from decompft.launcher.workload import (
    Layout,
    Workload,
    compute_bytes,
    quantized_linears,
    storage_bytes,
)

# tokens whose logits exist at once; the loss goes over the sequence in such chunks
CHUNK_TOKENS = 1024
# a chunk's logits in float32 and logsumexp's temporary of the same size, where no kernel computes the loss
LOGIT_BYTES = 8
# and one more where logits / softcap, its tanh and the product live at once
SOFTCAP_BYTES = 4
# hidden-wide tensors around the loss: the last norm's input and output, the loss's gradient
LOSS_HIDDEN_COPIES = 3
# the weight dequantized for the running product, and the one before it, not yet freed
DEQUANTIZED_AT_ONCE = 2
# compute fp8, bytes a weight at most: on a GPU the codes made of 4-bit ones, and one before, not yet freed; else the
# bfloat16 weight, its transposed copy, and the codes of that; on a CPU float32 beside all of it
FP8_FROM_BLOCKS_BYTES, FP8_FROM_WIDE_BYTES, FP8_ON_CPU_BYTES = 2, 5, 10
# and of what it is multiplied with and gives, a number: on a CPU the codes in float32, and the product
FP8_INPUT_BYTES, FP8_CPU_INPUT_BYTES, FP8_CPU_PRODUCT_BYTES = 1, 5, 4
# LLM.int8's forward: the input in int8, the product in int32
INT8_INPUT_BYTES, INT8_PRODUCT_BYTES = 1, 4
# linears whose outputs attention and the activation keep as they are
_KEPT_BY_THE_MODEL = frozenset({"v_proj", "gate_proj", "up_proj"})
# rows are quantized in chunks of at most this size in float32
LOAD_CHUNK_BYTES = 64 << 20
# slices of the largest tensor that are read ahead of the one being quantized, that one included
LOAD_SLICES = 2


def forecast(
    work: Workload, layout: Layout, *, capacity_bytes: int | None, host_capacity_bytes: int | None = None
) -> Forecast:
    """Memory of the fullest rank under a layout, in bytes."""
    is_cuda = layout.device == "cuda"
    held = states(work, layout)
    beside = (
        *_one_after_the_other(_activations(work, layout), _logits(work, layout)),
        *_dequantized(work, layout),
        *gathered(work, layout),
    )
    is_away = layout.cpu_offload and is_cuda
    terms = (
        *(() if is_away else held),
        *beside,
        _loading(work, layout, beside),
        _recorded(work, layout),
        _runtime(layout),
    )
    host: tuple[Term, ...] = ()
    if is_cuda:
        slices = LOAD_SLICES * _largest_slice(work, layout)
        process = CUDA_PROCESS_BYTES + DEEPSPEED_PROCESS_BYTES * layout.spec.is_deepspeed
        process += NCCL_HOST_BYTES * (layout.world_size > 1)
        host = (
            *((*held, *pinned_rounding(work, layout)) if is_away else ()),
            *_inputs_on_host(work, layout),
            snapshot(work, layout),
            Term(name="loading", num_bytes=slices, note=f"{LOAD_SLICES} slices of the largest tensor"),
            Term(name="process", num_bytes=process, note="Python, torch, CUDA's host side"),
        )
    return Forecast(
        terms=tuple(t for t in terms if t.num_bytes),
        capacity_bytes=capacity_bytes,
        host_terms=tuple(t for t in host if t.num_bytes),
        host_capacity_bytes=host_capacity_bytes if is_cuda else None,
    )


def checkpoint_bytes(work: Workload) -> int:
    """One checkpoint on disk: trained numbers with two float32 moments, and the adapter's own file."""
    # eight-bit moments are written as float32, so that another engine can go on with them, and as they are
    written = work.num_trained + work.num_adapter_fixed
    raw = ADAMW8BIT_BYTES if work.recipe.train.optimizer == "adamw8bit" else 0
    return int(work.num_trained * (TRAINED_BYTES * 2 + raw)) + 2 * written * TRAINED_BYTES


def _activations(work: Workload, layout: Layout) -> list[Term]:
    shape, recipe, mode = work.shape, work.recipe, layout.recompute
    tokens, layers = layout.micro_size * recipe.data.sequence_length, work.shape.num_layers
    e = compute_bytes(recipe)
    is_fused = layout.device == "cuda" and shape.saved.has_liger and work.has_liger
    layer = tokens * _layer_bytes_per_token(shape, e, is_fused=is_fused)
    thin, thin_layer = _thin_bytes(work, e)
    if mode == "none":
        note = f"{tokens} tokens, {layers} layers, all kept"
        return [Term(name="activations", num_bytes=layer * layers + thin * tokens, note=note)]
    if mode == "norms":
        kept = (kept_by_norms(shape, e, is_fused=is_fused) * layers + thin) * tokens
        made = made_again_by_norms(shape, e, is_fused=is_fused) * tokens
        note = f"{tokens} tokens, {layers} layers, all but norms' outputs"
        return [
            Term(name="activations", num_bytes=kept, note=note),
            Term(name="recomputed norm", num_bytes=made, note="one layer's, its output"),
        ]
    if mode == "selective":
        pieces = pieces_of(shape.model_type)
        assert pieces is not None, f"the planner takes full for {shape.model_type}"
        again, again_layer = _thin_bytes(work, e, only=lambda name: runs_again(name, pieces))
        # the last ones keep their linears' outputs, and have freed them when the first of the others runs again
        rest = 0 if layout.recompute_blocks is None else layers - layout.recompute_blocks
        more = rest * (kept_without_activation(shape, e, is_fused=is_fused) - kept_by_selective(shape, e))
        more += again * rest // layers
        kept = (kept_by_selective(shape, e) * layers + more + thin - again) * tokens
        made = (made_again_by_selective(shape, e, is_fused=is_fused) + again_layer - more) * tokens
        # of the last, one norm's output or the activation's
        last = max(made_again_by_norms(shape, e, is_fused=is_fused), shape.intermediate * e * bool(rest))
        made = max(made, last * tokens)
        besides = f", {rest} with their MLPs" * bool(rest)
        return [
            Term(
                name="activations", num_bytes=kept,
                note=f"{tokens} tokens, {layers} layers, norms' inputs and attention{besides}",
            ),
            Term(name="recomputed MLP", num_bytes=made, note="one layer's, up to its last product"),
        ]  # fmt: skip
    away = mode == "offloaded" and layout.device == "cuda"
    on_device = min(ON_THE_WAY, layers) if away else layers
    which = (
        f"the input of each of {layers} layers"
        if not away
        else f"the inputs of {on_device} layers on the way"
    )
    return [
        Term(name="activations", num_bytes=_input_bytes(work, layout) * on_device, note=f"{tokens} tokens, {which}"),
        Term(name="recomputed layer", num_bytes=layer + thin_layer * tokens, note="one layer's, all kept"),
    ]  # fmt: skip


def _one_after_the_other(activations: list[Term], logits: Term) -> list[Term]:
    """What a layer's backward pass makes again comes when the loss is done: the larger counts."""
    again = [term for term in activations if term.name.startswith("recomputed")]
    if not again:
        return [*activations, logits]
    return [*(t for t in activations if t not in again), max(*again, logits, key=lambda t: t.num_bytes)]


def _input_bytes(work: Workload, layout: Layout) -> int:
    """Of one layer's input, of a micro batch."""
    tokens = layout.micro_size * work.recipe.data.sequence_length
    return tokens * work.shape.hidden * compute_bytes(work.recipe)


def _inputs_on_host(work: Workload, layout: Layout) -> list[Term]:
    if layout.recompute != "offloaded":
        return []
    layers = work.shape.num_layers
    size = host_bytes(_input_bytes(work, layout), layers)
    return [Term(name="inputs of layers", num_bytes=size, note=f"{layers} layers', pinned, powers of two")]


def _layer_bytes_per_token(shape: ModelShape, e: int, *, is_fused: bool) -> int:
    """Saved by one layer for each token, adapters' thin products apart.

    Residual additions save nothing; rotary embeddings do not (cos and sin are frozen); flash
    attention saves q, k, v, its output (which is the next linear's input) and a float32 log-sum.
    """
    saved, h = shape.saved, shape.hidden
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    # the fused norm keeps its input as it came, the eager one a float32 copy
    norm = e if is_fused or not shape.saved.has_liger else 4
    norms = saved.norm_inputs * h * norm + ((q + kv) * norm if saved.qk_norm else 0)
    linear_inputs = saved.block_inputs * h * e
    attention = (q + 2 * kv + q) * e + 4 * shape.num_heads
    mlp = (saved.mlp_fused if is_fused else saved.mlp_eager) * shape.intermediate * e
    return norms + linear_inputs + attention + mlp


def _thin_bytes(work: Workload, e: int, only: Callable[[str], bool] = lambda name: True) -> tuple[int, int]:
    """Saved by adapters for each token, of all layers and of one: A x, its own x with dropout, W x under row scales.

    Args:
        only: of the linears, by name, that are counted.
    """
    total = 0
    for name, out, in_, config in work.adapted:
        if not only(name):
            continue
        spec = spec_of(config)
        total += spec.num_columns(out, in_, config) * e
        if config.dropout > 0 and spec.num_columns(out, in_, config):
            total += in_ * (e + 1)  # the dropped input and a mask of bytes
        if spec.keeps_output(config) and not _is_kept_anyway(work, name):
            total += out * e
    return total, -(-total // work.shape.num_layers)


def _is_kept_anyway(work: Workload, name: str) -> bool:
    """Whether a linear's output, that a row's scale wants for its slope, is an array that the model keeps as well.

    Only where the scale is multiplied into the weight (over a dense one the output before it is kept), and nothing is
    added to the output or written over it: q and k are turned in place, o and down added to the residual.
    """
    recipe = work.recipe
    folds = FORMAT_SPECS[recipe.quantization.format].is_quantized or recipe.quantization.compute == "fp8"
    biased = {linear.name.rpartition(".")[2] for linear in work.shape.linears if linear.bias}
    last = name.rpartition(".")[2]
    return folds and last in _KEPT_BY_THE_MODEL and last not in biased


def _logits(work: Workload, layout: Layout) -> Term:
    shape = work.shape
    tokens = layout.micro_size * work.recipe.data.sequence_length
    hidden = LOSS_HIDDEN_COPIES * tokens * shape.hidden * compute_bytes(work.recipe)
    rows = min(tokens, CHUNK_TOKENS) if shape.task == "causal-lm" else layout.micro_size
    note = f"{rows} rows of {shape.head.out} at a time, and the last hidden states"
    is_plain = not (shape.has_softcap or shape.head.num_biases or work.num_token_params)
    a_logit = LOGIT_BYTES + SOFTCAP_BYTES * shape.has_softcap
    if layout.device == "cuda" and shape.task == "causal-lm" and is_plain:
        a_logit = compute_bytes(work.recipe)  # the kernel writes slopes over the product
    return Term(name="logits and loss", num_bytes=rows * shape.head.out * a_logit + hidden, note=note)


def _dequantized(work: Workload, layout: Layout) -> list[Term]:
    shape, recipe, e = work.shape, work.recipe, compute_bytes(work.recipe)
    packed = quantized_linears(shape, recipe)
    if recipe.quantization.compute == "fp8":
        return [_fp8_copies(work, layout)]
    if not packed and storage_bytes(recipe) == e:
        return []
    largest = max(packed or shape.linears, key=lambda x: x.num_weights)
    last = largest.name.rpartition(".")[2]
    what = "dequantized" if packed else "cast"
    size, note = DEQUANTIZED_AT_ONCE * largest.num_weights * e, f"{DEQUANTIZED_AT_ONCE} x {last} at a time"
    if recipe.quantization.outlier_threshold:
        # the forward pass multiplies in int8, the backward pass dequantizes: never both at once
        tokens = layout.micro_size * recipe.data.sequence_length
        products = max(tokens * (x.in_ * INT8_INPUT_BYTES + x.out * INT8_PRODUCT_BYTES) for x in packed)
        if products > size:
            what, size, note = "int8 product of", products, "a linear's input and product; forward only"
    return [Term(name=f"{what} weights", num_bytes=size, note=note)]


def _fp8_copies(work: Workload, layout: Layout) -> Term:
    """A weight as the fp8 product takes it, with the activations or gradients that it is multiplied with."""
    recipe, linears = work.recipe, work.shape.linears
    tokens = layout.micro_size * recipe.data.sequence_length
    if layout.device == "cpu":
        each, wide, narrow = FP8_ON_CPU_BYTES, FP8_CPU_INPUT_BYTES, FP8_CPU_PRODUCT_BYTES
    else:
        has_blocks = FORMAT_SPECS[recipe.quantization.format].has_blocks
        each, wide, narrow = FP8_FROM_BLOCKS_BYTES if has_blocks else FP8_FROM_WIDE_BYTES, FP8_INPUT_BYTES, 0
    size = max(
        each * x.num_weights + tokens * (wide * max(x.in_, x.out) + narrow * min(x.in_, x.out))
        for x in linears
    )
    if recipe.quantization.fp8_skip:  # what is left out is dequantized
        size = max(size, DEQUANTIZED_AT_ONCE * compute_bytes(recipe) * max(x.num_weights for x in linears))
    return Term(name="fp8 copies", num_bytes=size, note="one weight, and its input or its output's gradient")


def _loading(work: Workload, layout: Layout, beside: tuple[Term, ...]) -> Term:
    """What loading takes beyond training: nothing for all but toy shapes.

    While the base is placed there are no activations, logits, gathered blocks or dequantized weights,
    and the allocator gives loading's temporaries' memory to them later: the peak is the larger of the
    two, not the sum. (Gradients and moments come later, too; they are left out, on the safe side.)
    """
    chunk = min(LOAD_CHUNK_BYTES, 4 * -(-largest_tensor(work.shape) // layout.shard_size))
    slices = 1 if layout.device == "cuda" else LOAD_SLICES  # read ahead on the host, which a CPU's rank is
    needs = slices * _largest_slice(work, layout) + chunk
    more = max(0, needs - sum(t.num_bytes for t in beside))
    return Term(name="loading", num_bytes=more, note="a slice and a chunk of it in float32, beyond training")


def _largest_slice(work: Workload, layout: Layout) -> int:
    """Bytes of this rank's rows of the largest tensor, as the file has them: of the compute dtype."""
    return -(-largest_tensor(work.shape) * compute_bytes(work.recipe) // layout.shard_size)


def _recorded(work: Workload, layout: Layout) -> Term:
    """What `train.cuda_graph` reserves beyond tensors: nothing where passes run plainly."""
    if not is_recorded(work.recipe, layout):
        return Term(name=RECORDED, num_bytes=0)
    data = work.recipe.data
    if not (data.eval or data.eval_fraction):
        return Term(name=RECORDED, num_bytes=RECORDED_BYTES, note="a CUDA graph's own memory")
    return Term(
        name=RECORDED,
        num_bytes=RECORDED_BYTES + RECORDED_EVALUATION_BYTES,
        note="a CUDA graph's own memory, which evaluations cannot use",
    )


def _runtime(layout: Layout) -> Term:
    if layout.device == "cpu":
        process = CPU_PROCESS_BYTES + DEEPSPEED_PROCESS_BYTES * layout.spec.is_deepspeed
        return Term(name=RUNTIME, num_bytes=process, note="Python, torch")
    nccl = NCCL_BYTES[layout.strategy] if layout.world_size > 1 else 0
    return Term(
        name=RUNTIME,
        num_bytes=CUDA_CONTEXT_BYTES + nccl,
        note="CUDA, cuBLAS, allocator" + (", NCCL" if nccl else ""),
    )
