"""How much memory a rank needs: a sum of named terms, each with its derivation.

Symbols: T tokens of a micro batch (rows x sequence length), h hidden size, e bytes of a compute
number (2 or 4). The model of what is saved for backward is the worker's own: one autograd node a
frozen linear keeps its input (shared by q, k, v and by gate, up) and the thin product of its
adapter; never a dequantized weight. Anchors: Llama-2-7B's shape, nf4 with double quantization,
rank 16 on all linears, sequence 2048, micro batch 4, one H200: 36.9 GiB allocated without and 7.7
with full recomputation (prototype, shared/gpu/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from decompft.adapters.spec import ADAPTER_SPECS
from decompft.launcher.models import LinearShape, ModelShape, adapted_linears, trained_modules
from decompft.launcher.plan import RUNTIME, Device, Forecast, Plan, Strategy, Term
from decompft.launcher.recipe import Recipe

GIB = 1 << 30

# tokens whose logits exist at once; the loss goes over the sequence in such chunks
CHUNK_TOKENS = 1024
# a chunk's logits in float32 and logsumexp's temporary of the same size
LOGIT_BYTES = 8
# and one more where logits / softcap, its tanh and the product live at once
SOFTCAP_BYTES = 4
# hidden-wide tensors around the loss: the last norm's input and output, the loss's gradient
LOSS_HIDDEN_COPIES = 3
# AdamW: two float32 moments
ADAMW_BYTES = 8.0
# two moments of a byte, and a float32 absmax for each block of 256 of each of them
ADAMW8BIT_BYTES = 2 * (1 + 4 / 256)
# adapters, their gradients and whole-trained modules are float32
TRAINED_BYTES = 4
# nf4 with double quantization: float32 offset and step of a row's scales, which are bytes padded to 4
ROW_TAIL_BYTES = 8
SCALE_ALIGN = 4
# the weight dequantized for the running product, and the one before it, not yet freed
DEQUANTIZED_AT_ONCE = 2
# fsdp: the layer that runs and the one prefetched
GATHERED_LAYERS = 2
# CUDA context, cuBLAS workspace, allocator slack; with it one H200's peaks are met within 2 % with
# MAP and 4 % with LoRA (benchmarks/results/single_gpu.json)
CUDA_CONTEXT_BYTES = int(0.9 * GIB)
# NCCL's channels and buffers on one node, and what its streams keep from the allocator: what two
# H200s held beyond tensors, less what one held (benchmarks/results/multi_gpu.json)
NCCL_BYTES: dict[Strategy, int] = {"single": 0, "ddp": int(0.8 * GIB), "fsdp": int(1.3 * GIB)}
# a Python process that has imported torch and transformers, resident
CPU_PROCESS_BYTES = int(0.6 * GIB)
# the same with CUDA's host side
CUDA_PROCESS_BYTES = int(2.5 * GIB)

# Effective FLOP/s of needed work (4 a weight and token, plus attention; 28.0 GFLOP a token of
# Llama-2-7B's shape): MAP's tokens/s on one H200, benchmarks/results/single_gpu.json; LoRA's are 1.1 x
EFFECTIVE_FLOPS = {("H200", "none"): 15_516 * 28.0e9, ("H200", "full"): 11_128 * 28.0e9}
# the share of it a GPU that two reached, while other work ran on the host
PARALLEL_SHARE: dict[Strategy, float] = {"single": 1.0, "ddp": 0.94, "fsdp": 0.72}
# smaller models do not fill the card, and the figures above say nothing of them
MIN_KNOWN_HIDDEN = 2048

Recompute = Literal["none", "full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What the planner tries: how the work is spread."""

    device: Device
    strategy: Strategy
    world_size: int
    micro_size: int  # rows
    recompute: Recompute
    cpu_offload: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What does not depend on the layout, counted once and forecast many times."""

    shape: ModelShape
    recipe: Recipe
    adapted: tuple[tuple[str, int, int], ...]  # (name, out, in)
    num_adapter_params: int
    num_module_params: int  # of modules trained whole


def workload(shape: ModelShape, recipe: Recipe) -> Workload:
    """Resolve targets and modules trained whole against the model.

    Raises:
        AdapterError: a target or a module pattern matches nothing.
    """
    modules = dict(trained_modules(shape, recipe.adapter.train_modules))
    if shape.task == "sequence-classification":
        # no checkpoint has this head: it starts random and must learn
        modules[shape.head.name] = shape.head.num_weights + shape.head.num_biases
    adapted = tuple(adapted_linears(shape, recipe.adapter.targets))
    count = ADAPTER_SPECS[recipe.adapter.method].num_params
    return Workload(
        shape=shape,
        recipe=recipe,
        adapted=adapted,
        num_adapter_params=sum(count(out, in_, recipe.adapter.rank) for _, out, in_ in adapted),
        num_module_params=sum(modules.values()),
    )


def quantized(shape: ModelShape, recipe: Recipe) -> tuple[LinearShape, ...]:
    """The linears stored in the recipe's format: all but the head, adapted or not."""
    return shape.linears if recipe.quantization.format == "nf4" else ()


def forecast(
    work: Workload, layout: Layout, *, capacity_bytes: int | None, host_capacity_bytes: int | None = None
) -> Forecast:
    """Memory of the fullest rank under a layout, in bytes."""
    is_cuda, is_sharded = layout.device == "cuda", layout.strategy == "fsdp"
    shards = layout.world_size if is_sharded else 1
    states = _states(work, shards)
    gathered = _gathered(work, layout) if is_sharded and (shards > 1 or layout.cpu_offload) else []
    device = [] if layout.cpu_offload and is_cuda else states
    terms = (
        *device,
        *_activations(work, layout),
        _logits(work, layout),
        *_dequantized(work),
        *gathered,
        _runtime(layout),
    )
    host: tuple[Term, ...] = ()
    if is_cuda:
        host = (
            *(states if layout.cpu_offload else ()),
            Term(name="loading", num_bytes=_largest_tensor(work.shape) * 4, note="largest tensor in float32"),
            Term(name="process", num_bytes=CUDA_PROCESS_BYTES, note="Python, torch, CUDA's host side"),
        )
    return Forecast(
        terms=tuple(t for t in terms if t.num_bytes),
        capacity_bytes=capacity_bytes,
        host_terms=host,
        host_capacity_bytes=host_capacity_bytes if is_cuda else None,
    )


def time_forecast(plan: Plan, tokens_per_s: float) -> float:
    """Seconds an optimizer step takes at a speed of all ranks together."""
    return plan.batch.tokens_per_step / tokens_per_s


def known_speed(work: Workload, layout: Layout, gpu_name: str | None) -> float | None:
    """Tokens a second of all ranks together, or None where nothing was measured."""
    shape, name = work.shape, gpu_name or ""
    is_measured = layout.device == "cuda" and not layout.cpu_offload and shape.hidden >= MIN_KNOWN_HIDDEN
    rates = [r for (gpu, mode), r in EFFECTIVE_FLOPS.items() if gpu in name and mode == layout.recompute]
    if not is_measured or not rates or work.recipe.quantization.compute != "bfloat16":
        return None
    weights = sum(shape.count(x) * x.num_weights for x in shape.linears) + shape.head.num_weights
    # causal attention: half of 2 products forward, 4 backward, of 2 FLOPs each over the sequence
    attention = 6 * work.recipe.data.sequence_length * shape.num_heads * shape.head_dim * shape.num_layers
    return rates[0] * PARALLEL_SHARE[layout.strategy] * layout.world_size / (4 * weights + attention)


def packed_bytes(part: LinearShape, *, block_size: int, double_quant: bool) -> tuple[int, int]:
    """(codes, scales) of one nf4 weight: half a byte a weight; scales row by row."""
    blocks = part.in_ // block_size
    padded = -(-blocks // SCALE_ALIGN) * SCALE_ALIGN
    row = padded + ROW_TAIL_BYTES if double_quant else 4 * blocks
    return part.num_weights // 2, part.out * row


def compute_bytes(recipe: Recipe) -> int:
    return 4 if recipe.quantization.compute == "float32" else 2


def _storage_bytes(recipe: Recipe) -> int:
    dtype = recipe.model.dtype
    return compute_bytes(recipe) if dtype == "auto" else 4 if dtype == "float32" else 2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Base:
    """Bytes of the frozen model, of all layers and of one."""

    codes: int
    scales: int
    dense: int
    rest: int
    one_layer: int
    root: int  # outside the layers


def _base(work: Workload) -> _Base:
    shape, recipe = work.shape, work.recipe
    e, stored = compute_bytes(recipe), _storage_bytes(recipe)
    q = recipe.quantization
    packed = set(quantized(shape, recipe))
    codes = scales = dense = layer = root = 0
    for x in shape.linears:
        n = shape.count(x)
        if x in packed:
            c, s = packed_bytes(x, block_size=q.block_size, double_quant=q.double_quant)
            codes, scales, own = codes + n * c, scales + n * s, c + s
        else:
            own = x.num_weights * stored
            dense += n * own
        own += x.num_biases * e
        layer, root = (layer + own, root) if x.per_layer else (layer, root + own)
    layer += sum(x.num_params * e for x in shape.others if x.per_layer)
    root += sum(x.num_params * e for x in shape.others if not x.per_layer) + shape.num_head_params * e
    biases = sum(shape.count(x) * x.num_biases for x in shape.linears)
    others = sum(shape.count(x) * x.num_params for x in shape.others)
    frozen = others + biases + shape.num_head_params - work.num_module_params
    return _Base(codes=codes, scales=scales, dense=dense, rest=max(0, frozen) * e, one_layer=layer, root=root)


def _states(work: Workload, shards: int) -> list[Term]:
    """What lives through the whole run: the frozen model, the trained part and its optimizer."""
    base, recipe = _base(work), work.recipe
    trained = work.num_adapter_params + work.num_module_params
    moments = ADAMW8BIT_BYTES if recipe.train.optimizer == "adamw8bit" else ADAMW_BYTES
    note = f"1/{shards} of it" if shards > 1 else ""
    sizes = (
        ("base weights", base.codes + base.dense, "nf4, half a byte a weight" if base.codes else "dense"),
        ("quantization constants", base.scales, f"blocks of {recipe.quantization.block_size}"),
        ("embeddings, head, norms, biases", base.rest, recipe.quantization.compute),
        ("adapter", work.num_adapter_params * TRAINED_BYTES, "float32"),
        ("modules trained whole", work.num_module_params * TRAINED_BYTES, "float32"),
        ("gradients", trained * TRAINED_BYTES, "float32; ddp reduces them in place"),
        ("optimizer", int(trained * moments), recipe.train.optimizer),
    )
    return [
        Term(name=name, num_bytes=-(-size // shards), note="; ".join(filter(None, (text, note))))
        for name, size, text in sizes
        if size
    ]


def _activations(work: Workload, layout: Layout) -> list[Term]:
    shape, recipe = work.shape, work.recipe
    tokens = layout.micro_size * recipe.data.sequence_length
    e = compute_bytes(recipe)
    is_fused = layout.device == "cuda" and shape.saved.has_liger
    layer = tokens * _layer_bytes_per_token(shape, e, is_fused=is_fused)
    thin, thin_layer = _thin_bytes(work, e)
    if layout.recompute == "none":
        saved = [
            Term(
                name="activations",
                num_bytes=layer * shape.num_layers + thin * tokens,
                note=f"{tokens} tokens, {shape.num_layers} layers, all kept",
            )
        ]
    else:
        saved = [
            Term(
                name="activations",
                num_bytes=tokens * shape.hidden * e * shape.num_layers,
                note=f"{tokens} tokens, the input of each of {shape.num_layers} layers",
            ),
            Term(
                name="recomputed layer", num_bytes=layer + thin_layer * tokens, note="one layer's, all kept"
            ),
        ]
    return saved


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


def _thin_bytes(work: Workload, e: int) -> tuple[int, int]:
    """Saved by adapters for each token, of all layers and of one: A x, and with dropout its own x."""
    total = work.recipe.adapter.rank * e * len(work.adapted)
    if work.recipe.adapter.dropout > 0:
        # the dropped input and a mask of bytes
        total += sum(in_ for _, _, in_ in work.adapted) * (e + 1)
    return total, -(-total // work.shape.num_layers)


def _logits(work: Workload, layout: Layout) -> Term:
    shape = work.shape
    tokens = layout.micro_size * work.recipe.data.sequence_length
    hidden = LOSS_HIDDEN_COPIES * tokens * shape.hidden * compute_bytes(work.recipe)
    rows = min(tokens, CHUNK_TOKENS) if shape.task == "causal-lm" else layout.micro_size
    note = f"{rows} rows of {shape.head.out} at a time, and the last hidden states"
    logits = rows * shape.head.out * (LOGIT_BYTES + SOFTCAP_BYTES * shape.has_softcap)
    return Term(name="logits and loss", num_bytes=logits + hidden, note=note)


def _dequantized(work: Workload) -> list[Term]:
    shape, recipe, e = work.shape, work.recipe, compute_bytes(work.recipe)
    packed = quantized(shape, recipe)
    if not packed and _storage_bytes(recipe) == e:
        return []
    largest = max(packed or shape.linears, key=lambda x: x.num_weights)
    what = "dequantized" if packed else "cast"
    return [
        Term(
            name=f"{what} weights",
            num_bytes=DEQUANTIZED_AT_ONCE * largest.num_weights * e,
            note=f"{DEQUANTIZED_AT_ONCE} x {largest.name.rpartition('.')[2]} at a time",
        )
    ]


def _gathered(work: Workload, layout: Layout) -> list[Term]:
    """What fsdp holds unsharded: layers with their adapters and gradients, and the root."""
    base, shape = _base(work), work.shape
    adapters = -(-work.num_adapter_params // shape.num_layers) * TRAINED_BYTES
    layers = min(GATHERED_LAYERS, shape.num_layers)
    # the root (embedding, head, last norm) stays gathered between forward and backward
    size = layers * (base.one_layer + adapters) + adapters + base.root
    terms = [Term(name="gathered blocks", num_bytes=size, note=f"{layers} layers, one's gradients, the root")]
    if work.recipe.train.global_batch_size > layout.micro_size * layout.world_size:
        # without a reduction after each micro batch, whole gradients wait for the last one
        whole = (work.num_adapter_params + work.num_module_params) * TRAINED_BYTES
        terms.append(
            Term(name="accumulated gradients", num_bytes=whole, note="whole until the last micro batch")
        )
    return terms


def _runtime(layout: Layout) -> Term:
    if layout.device == "cpu":
        return Term(name=RUNTIME, num_bytes=CPU_PROCESS_BYTES, note="Python, torch")
    nccl = NCCL_BYTES[layout.strategy] if layout.world_size > 1 else 0
    return Term(
        name=RUNTIME,
        num_bytes=CUDA_CONTEXT_BYTES + nccl,
        note="CUDA, cuBLAS, allocator" + (", NCCL" if nccl else ""),
    )


def _largest_tensor(shape: ModelShape) -> int:
    return max(*(x.num_weights for x in (*shape.linears, shape.head)), *(x.num_params for x in shape.others))
