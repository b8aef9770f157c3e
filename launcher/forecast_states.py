"""What a rank holds of the model, its trained part and its optimizer, and what its engine gathers.

Which of it is cut, and over how many ranks, is STRATEGIES' and the layout's answer. What DeepSpeed
holds was read in its source (0.19.8; no precision enabled, so that dtypes stay as they are).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from decompft.adapters.formats import FORMAT_SPECS
from decompft.adapters.spec import spec_of
from decompft.adapters.specs.base import count
from decompft.launcher.deepspeed_config import BUCKET_NUMBERS, PERSIST_NUMBERS
from decompft.launcher.models import ModelShape
from decompft.launcher.plan import Term
from decompft.launcher.recipe import Recipe
from decompft.launcher.workload import Layout, Workload, compute_bytes, storage_bytes, weight_bytes

# AdamW: two float32 moments
ADAMW_BYTES = 8.0
# two moments of a byte, and a float32 absmax for each block of 256 of each of them
ADAMW8BIT_BYTES = 2 * (1 + 4 / 256)
# adapters, their gradients and whole-trained modules are float32
TRAINED_BYTES = 4
# fsdp: the layer that runs and the one prefetched
GATHERED_LAYERS = 2
# ZeRO-1 and 2 write one bucket while the other is reduced (overlap_comm); ZeRO-3 has one
ZERO_BUFFERS = {"zero1": 2, "zero2": 2, "zero3": 1}
# ZeRO-3 keeps what is used again within this many numbers; the default, which a recipe may change
REUSE_KEY, REUSE_NUMBERS = "stage3_max_reuse_distance", 1_000_000_000


def states(work: Workload, layout: Layout) -> list[Term]:
    """What lives through the whole run: the frozen model, the trained part and its optimizer."""
    base, recipe = _base(work), work.recipe
    q, trained = recipe.quantization, work.num_trained
    fixed = work.num_adapter_fixed + work.num_adapter_derived
    whole, grads, optimizer = layout.shard_size, layout.gradient_shards, layout.optimizer_shards
    moments = ADAMW8BIT_BYTES if recipe.train.optimizer == "adamw8bit" else ADAMW_BYTES
    spec = FORMAT_SPECS[q.format]
    scales = f"blocks of {q.block_size}" if spec.has_blocks else "one a row"
    # ZeRO-1 and 2 step a copy of their partition; ZeRO-3 steps its pieces themselves unless they are away
    has_master = layout.spec.is_deepspeed and (not layout.spec.shards_base or layout.cpu_offload)
    sizes = (
        ("base weights", base.weights, spec.title, whole),
        ("quantization constants", base.scales, scales, whole),
        ("embeddings, head, norms, biases", base.rest, q.activations, whole),
        ("adapter", work.num_adapter_params * TRAINED_BYTES, "float32", whole),
        ("adapter's fixed part", fixed * TRAINED_BYTES, "float32, on each rank", 1),
        ("rounded factors", _rounded(work, layout), f"copies in {q.activations}, made once a step", 1),
        ("modules trained whole", work.num_module_params * TRAINED_BYTES, "float32", whole),
        ("rows of tokens", work.num_token_params * TRAINED_BYTES, "float32", whole),
        ("gradients", trained * TRAINED_BYTES, "float32, reduced in place", grads),
        ("master weights", has_master * trained * TRAINED_BYTES, "float32, of the partition", optimizer),
        ("optimizer", int(trained * moments), recipe.train.optimizer, optimizer),
    )
    return [
        Term(name=name, num_bytes=-(-size // n), note=f"{text}; 1/{n} of it" if n > 1 else text)
        for name, size, text, n in sizes
        if size
    ]


def _rounded(work: Workload, layout: Layout) -> int:
    """Copies of thin factors in the compute dtype, where a rank has the factors whole."""
    e = compute_bytes(work.recipe)
    if e >= TRAINED_BYTES or layout.spec.shards_base:
        return 0
    return e * sum(spec_of(config).num_rounded(out, in_, config) for _, out, in_, config in work.adapted)


def gathered(work: Workload, layout: Layout) -> list[Term]:
    """What the engine holds beside its own shards: gathered parameters, buckets, whole gradients."""
    if layout.spec.is_deepspeed:
        if layout.device == "cpu":
            # the buckets are there, but what of them is never written takes no memory
            return _zero3_live(work, layout)
        numbers = ZERO_BUFFERS[layout.strategy] * BUCKET_NUMBERS
        note = f"{ZERO_BUFFERS[layout.strategy]} x {BUCKET_NUMBERS:,} numbers in float32"
        buckets = Term(name="reduction buckets", num_bytes=numbers * TRAINED_BYTES, note=note)
        return [*_zero3_live(work, layout), buckets]
    if layout.shard_size == 1 and not layout.cpu_offload:
        return []
    return _fsdp_gathered(work, layout)


def pinned_rounding(work: Workload, layout: Layout) -> list[Term]:
    """What offload wastes on the host: torch rounds each pinned tensor up to a power of two."""
    waste = 0
    for size, number in _tensor_bytes(work):
        shard = -(-size // layout.shard_size)
        waste += number * ((1 << max(0, shard - 1).bit_length()) - shard)
    return [Term(name="pinned rounding", num_bytes=waste, note="each pinned tensor is a power of two")]


def snapshot(work: Workload, layout: Layout) -> Term:
    """The pinned copy that a save is written from: rank 0's share, rounded up to a power of two by torch."""
    trained = work.num_trained
    numbers = (
        -(-trained // layout.shard_size) + 2 * -(-trained // layout.optimizer_shards) + work.num_adapter_fixed
    )
    size = 1 << max(0, TRAINED_BYTES * numbers - 1).bit_length()
    return Term(name="copy for saves", num_bytes=size, note="trained numbers and moments, float32, pinned")


def largest_tensor(shape: ModelShape) -> int:
    """Numbers of the model's largest parameter."""
    return max(*(x.num_weights for x in (*shape.linears, shape.head)), *(x.num_params for x in shape.others))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Base:
    """Bytes of the frozen model, of all layers and of one."""

    weights: int
    scales: int
    rest: int
    one_layer: int
    root: int  # outside the layers


def _base(work: Workload) -> _Base:
    shape, recipe = work.shape, work.recipe
    e = compute_bytes(recipe)
    weights = scales = layer = root = 0
    for x in shape.linears:
        w, s = weight_bytes(x, recipe)
        weights, scales = weights + shape.count(x) * w, scales + shape.count(x) * s
        own = w + s + x.num_biases * e
        layer, root = (layer + own, root) if x.per_layer else (layer, root + own)
    layer += sum(x.num_params * e for x in shape.others if x.per_layer)
    root += sum(x.num_params * e for x in shape.others if not x.per_layer) + shape.num_head_params * e
    biases = sum(shape.count(x) * x.num_biases for x in shape.linears)
    others = sum(shape.count(x) * x.num_params for x in shape.others)
    frozen = others + biases + shape.num_head_params - work.num_module_params
    return _Base(weights=weights, scales=scales, rest=max(0, frozen) * e, one_layer=layer, root=root)


def _fsdp_gathered(work: Workload, layout: Layout) -> list[Term]:
    base, shape = _base(work), work.shape
    adapters = _layer_adapters(work)
    layers = min(GATHERED_LAYERS, shape.num_layers)
    # the root (embedding, head, last norm) stays gathered between forward and backward
    size = layers * (base.one_layer + adapters) + adapters + base.root
    terms = [Term(name="gathered blocks", num_bytes=size, note=f"{layers} layers, one's gradients, the root")]
    if work.recipe.train.global_batch_size > layout.micro_size * layout.world_size:
        # without a reduction after each micro batch, whole gradients wait for the last one
        whole = work.num_trained * TRAINED_BYTES
        terms.append(
            Term(name="accumulated gradients", num_bytes=whole, note="whole until the last micro batch")
        )
    return terms


def _zero3_live(work: Workload, layout: Layout) -> list[Term]:
    """What ZeRO-3 has gathered at its fullest moment, between forward and backward."""
    if not layout.spec.shards_base or layout.shard_size == 1 and not layout.cpu_offload:
        return []
    base, shape, recipe = _base(work), work.shape, work.recipe
    # DeepSpeed counts numbers: packed bytes are viewed as bfloat16
    e = 2 if FORMAT_SPECS[recipe.quantization.format].is_quantized else storage_bytes(recipe)
    adapters = _layer_adapters(work)
    # of the last layers both uses lie within the distance: forward and backward share it
    kept = _reuse_numbers(recipe) // 2 * e
    everything = shape.num_layers * (base.one_layer + adapters) + base.root
    # the head, or a layer, with its adapters' gradients, and what is fetched ahead
    size = max(base.one_layer, base.root) + 2 * adapters + BUCKET_NUMBERS * e + kept
    whole = (x for x in shape.others if x.num_params <= PERSIST_NUMBERS)
    small = sum(shape.count(x) * x.num_params * compute_bytes(recipe) for x in whole)
    note = f"kept for backward within {REUSE_KEY}, a layer, the bucket fetched ahead"
    return [Term(name="gathered parameters", num_bytes=min(size + small, everything), note=note)]


def _reuse_numbers(recipe: Recipe) -> int:
    zero = recipe.parallel.deepspeed.get("zero_optimization")
    given = zero.get(REUSE_KEY) if isinstance(zero, dict) else None
    return int(given) if isinstance(given, int | float) else REUSE_NUMBERS


def _layer_adapters(work: Workload) -> int:
    return -(-work.num_adapter_params // work.shape.num_layers) * TRAINED_BYTES


def _tensor_bytes(work: Workload) -> Iterator[tuple[int, int]]:
    """(bytes, how many) of every parameter, and of every adapter's gradient."""
    shape, recipe, e = work.shape, work.recipe, compute_bytes(work.recipe)
    for x in shape.linears:
        for size in (*weight_bytes(x, recipe), x.num_biases * e):
            yield size, shape.count(x)
    for other in shape.others:
        yield other.num_params * e, shape.count(other)
    yield shape.num_head_params * e, 1
    for _, out, in_, config in work.adapted:
        for name, dims in spec_of(config).tensors(out, in_, config).items():
            yield count({name: dims}) * TRAINED_BYTES, 2
