"""Which runs make the table of speed, and what each is meant to reach: tokens/s a GPU, GiB in tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
RECIPE = HERE / "llama7b_shape.yaml"
RECIPE_8B = HERE / "llama8b_shape.yaml"
RECIPE_70B = HERE / "llama70b_shape.yaml"

# blocks whose MLP runs again, of 32: the fewest that leave 20 GiB in tensors (call H took 0.45 less than was forecast)
SOME = 22

# of LoRA and MAP at 7B, nf4: recompute -> (bfloat16, fp8) tokens/s, GiB
_TARGETS = {
    "none": ((20_000, 27_000), 34.0),
    "norms": ((20_000, 27_000), 34.0),  # as none, which keeps 4 GiB more
    "selective": ((18_500, 24_500), 20.0),
    f"selective{SOME}": ((18_500, 24_500), 20.0),
    "full": ((13_500, 19_000), 7.5),
    "offloaded": ((13_095, 18_430), 6.0),  # 3 % under full
}

_PEERS = {
    "none": ("nf4-liger", "unsloth-false"),
    "norms": ("nf4-liger", "unsloth-false"),
    "full": ("nf4-liger-gc", "unsloth-true"),
    "offloaded": ("unsloth-unsloth",),
}

# how far a row's last loss may be from its twin's, of what the twin's fell: rounding, in float8 up to a sixteenth of a
# number
TOLERANCES = {"bfloat16": 0.02, "fp8": 0.05}

_SHORT_70B = ("train.micro_batch_size=2", "train.global_batch_size=4", "train.max_steps=8")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of a recipe through `launch`."""

    name: str
    overrides: tuple[str, ...]
    recipe: Path = RECIPE
    tokens_per_s: float | None = None  # target, a GPU
    peak_gib: float | None = None  # target
    flops_share: float | None = None  # target: needed FLOPs over the card's 989 TFLOP/s in bfloat16
    peers: tuple[str, ...] = ()  # the same work: cases of peers.py, or unsloth- and its recomputation
    twin: tuple[str, ...] = ()  # overrides of the same work in bfloat16, nothing fused; (): not compared
    is_unfused: bool = False  # it is one


def with_twins(chosen: Iterable[Case]) -> list[Case]:
    """Before the first that has it, each twin."""
    found: list[Case] = []
    made: set[tuple[tuple[str, ...], Path]] = set()
    for case in chosen:
        if case.twin and (case.twin, case.recipe) not in made:
            made.add((case.twin, case.recipe))
            found.append(
                Case(name=f"{case.name}-twin", overrides=case.twin, recipe=case.recipe, is_unfused=True)
            )
        found.append(case)
    return found


def unfused(method: str) -> tuple[str, ...]:
    """Of a method at 7B on one GPU."""
    return _none(method, graph=False)


def _none(method: str, *, graph: bool, recompute: str = "none") -> tuple[str, ...]:
    """A method's overrides without recomputation, or with that of norms alone."""
    # so that LieRA's loss, which starts slowest, falls by more than rounding
    faster = ("train.learning_rate=1e-3",) if method == "liera" else ()
    recorded = f"train.cuda_graph={str(graph).lower()}"
    return f"adapter.method={method}", f"train.recompute={recompute}", *faster, recorded


def cases(gpus: int) -> tuple[Case, ...]:
    return _single() if gpus == 1 else _pair()


def _single() -> tuple[Case, ...]:
    """As a user would set it, and with passes recorded, where the host is the limit; the most telling first."""
    found = []
    for recompute, ((bfloat16, fp8), gib) in _TARGETS.items():
        peers = _PEERS.get(recompute, ())
        for method in ("lora", "map"):
            for compute, target in (("bfloat16", bfloat16), ("fp8", fp8)):
                for graph in (False,) if recompute == "offloaded" else (False, True):
                    found.append(
                        Case(
                            name="-".join((method, recompute, compute, *["graph"] * graph)),
                            overrides=(
                                f"adapter.method={method}", f"train.recompute={recompute.removesuffix(str(SOME))}",
                                *[f"train.recompute_blocks={SOME}"] * recompute.endswith(str(SOME)),
                                f"quantization.compute={compute}", f"train.cuda_graph={str(graph).lower()}",
                            ),
                            tokens_per_s=target, peak_gib=gib, peers=peers, twin=unfused(method),
                        )
                    )  # fmt: skip
    found.sort(key=lambda case: "selective" in case.name or "offloaded" in case.name)
    for method, recompute, target, gib in (
        ("dora", "none", 19_000, 36.0),
        ("dora", "norms", 19_000, 36.0),
        ("liera", "none", None, None),
    ):
        for graph in (False, True):
            found.append(
                Case(
                    name="-".join((method, recompute, "bfloat16", *["graph"] * graph)),
                    overrides=_none(method, graph=graph, recompute=recompute),
                    tokens_per_s=target, peak_gib=gib, twin=unfused(method),
                    peers=("nf4-liger-dora",) if (method, recompute) == ("dora", "none") else (),
                )
            )  # fmt: skip
    for rows in (2, 4):
        batch = (f"train.micro_batch_size={rows}", f"train.global_batch_size={rows}")
        found.append(
            Case(
                name=f"8b-lora-none-{rows}-rows",
                overrides=batch,
                recipe=RECIPE_8B,
                flops_share=0.55,
                twin=batch,
            )
        )
    return tuple(found)


def _pair() -> tuple[Case, ...]:
    """Two GPUs with the same global batch on every strategy, so that losses compare; then 70B."""
    common = ("adapter.method=map", "train.global_batch_size=8")
    ddp = (*common, "parallel.strategy=ddp", "parallel.gpus_per_node=2")
    fsdp = (*common, "parallel.strategy=fsdp", "parallel.gpus_per_node=2")
    known = {
        "map-single": (*common, "parallel.strategy=single", "parallel.gpus_per_node=1"),
        "map-ddp": ddp,
        "map-ddp-graph": (*ddp, "train.cuda_graph=true"),
        "map-fsdp": fsdp,
        "map-fsdp-full": (*fsdp, "train.recompute=full"),
    }
    small = tuple(
        Case(name=name, overrides=overrides, twin=known["map-single"]) for name, overrides in known.items()
    )
    large = tuple(
        Case(
            name=f"70b-map-fsdp-full-{compute}",
            overrides=(f"quantization.compute={compute}", *_SHORT_70B),
            recipe=RECIPE_70B, tokens_per_s=target, peak_gib=60.0,
            twin=("quantization.compute=bfloat16", *_SHORT_70B),
        )
        for compute, target in (("bfloat16", 1_450), ("fp8", 2_100))
    )  # fmt: skip
    return (*small, *large)
