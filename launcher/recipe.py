"""What the user wrote: the recipe's sections, keys, types and defaults.

A default stands here, or in a section's own recipe_*.py, and nowhere else. `source.py` turns text into these
objects and errors into places; `plan.py` decides what a recipe leaves open ("auto").
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from decompft.launcher.recipe_adapter import AdapterOverride as AdapterOverride
from decompft.launcher.recipe_adapter import AdapterSection as AdapterSection
from decompft.launcher.recipe_section import Names as Names
from decompft.launcher.recipe_section import Section as Section
from decompft.launcher.recipe_slurm import SlurmSection as SlurmSection
from decompft.launcher.recipe_sweep import SweepSection as SweepSection
from decompft.launcher.recompute import Recompute
from decompft.launcher.strategies import STRATEGIES, Strategy

Task = Literal["causal-lm", "sequence-classification"]
DType = Literal["bfloat16", "float32"]
Compute = Literal["bfloat16", "float32", "fp8"]
Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
NodeRange = Annotated[str, Field(pattern=r"^\d+-\d+$")]
Beta = Annotated[float, Field(ge=0, lt=1)]

# our field names of each data format: those a record must have, those it may have
FORMAT_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "instruction": (("instruction", "output"), ("input",)),
    "completion": (("prompt", "completion"), ()),
    "chat": (("messages",), ()),
    "text": (("text",), ()),
    "classification": (("text", "label"), ("text_pair",)),
}


class ModelSection(Section):
    """Which model is fine-tuned. Exactly one of `id` and `config`."""

    id: str | None = Field(None, description="hub id, local folder, or GGUF file")
    config: dict[str, Any] | None = Field(
        None, description="a transformers config (model_type, hidden_size, ...) to build from"
    )
    weights: Literal["checkpoint", "random"] = Field(
        "checkpoint", description="random: any rows of any tensor from (seed, name), no file needed"
    )
    revision: str = Field("main", description="hub revision")
    task: Task = Field("causal-lm", description="what is trained")
    num_labels: int = Field(2, ge=2, description="classes of a sequence-classification head")
    tokenizer: str | None = Field(
        None,
        description="another tokenizer: folder, hub id, .model or tokenizer.json file; "
        "a config model without one uses bytes",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="storage of frozen, unquantized linear weights; auto: quantization.compute (fp8: bfloat16)",
    )
    attention: Literal["auto", "varlen", "sdpa", "eager"] = Field(
        "auto",
        description="how documents of a packed row are kept apart; varlen: each by itself, without a mask; sdpa: "
        "torch's attention under a mask over the row; eager: written out; auto: varlen where it can run",
    )
    trust_remote_code: bool = Field(False, description="run Python code that the model's repository carries")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.id is None) == (self.config is None):
            raise ValueError("give exactly one of id and config")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs model_type, e.g. llama")
        if self.config is not None and self.weights == "checkpoint":
            raise ValueError("a model built from config has no checkpoint; add weights: random")
        return self


class QuantizationSection(Section):
    """How the frozen base is stored and computed with."""

    format: Literal["none", "int8", "nf4", "fp4", "fp8"] = Field(
        "nf4", description="storage of the frozen linear weights"
    )
    block_size: Literal[64, 128] = Field(64, description="weights that share a scale (nf4, fp4)")
    double_quant: bool = Field(True, description="quantize the scales too, per row (nf4, fp4)")
    outlier_threshold: float = Field(
        0.0,
        ge=0,
        description="int8: multiply in int8 as LLM.int8 does, activations beyond this apart (6.0 is usual); "
        "0: weights are dequantized and multiplied in compute",
    )
    cache: bool = Field(True, description="keep quantized rows on disk: the next start reads those alone")
    compute: Compute = Field(
        "bfloat16",
        description="dtype of matrix products and activations; fp8: products of frozen linears in float8 e4m3, "
        "all else in bfloat16 (GPUs of compute capability 8.9 or higher; a CPU emulates it)",
    )
    fp8_skip: list[str] = Field(
        [], description="compute fp8: linears that stay in bfloat16, names or patterns as in adapter.targets"
    )

    @property
    def activations(self) -> DType:
        """The dtype of what is not a product of a frozen linear."""
        return "bfloat16" if self.compute == "fp8" else self.compute

    @model_validator(mode="after")
    def _int8_only(self) -> Self:
        if self.outlier_threshold and self.format != "int8":
            raise ValueError("outlier_threshold works with format int8 only")
        return self

    @model_validator(mode="after")
    def _fp8_only(self) -> Self:
        if self.fp8_skip and self.compute != "fp8":
            raise ValueError("fp8_skip works with compute fp8 only")
        if self.outlier_threshold and self.compute == "fp8":
            raise ValueError(
                "outlier_threshold multiplies in int8, compute fp8 in fp8; leave one of the two out"
            )
        return self


class Source(Section):
    """One data set. Exactly one of `path` and `hub`."""

    path: str | None = Field(None, description="file, or glob, of .jsonl .json .csv .parquet .arrow .txt")
    hub: str | None = Field(None, description="data set id on the hub, or a folder datasets can load")
    name: str | None = Field(None, description="configuration name of a hub data set")
    split: str = Field("train", description="split of a hub data set")
    format: Literal["instruction", "completion", "chat", "text", "classification"] = Field(
        "instruction",
        description="instruction: instruction/output in the papers' template; "
        "completion: prompt/completion verbatim; chat: messages through the tokenizer's template; "
        "text: plain text; classification: text (and text_pair) with label",
    )
    fields: dict[str, str] = Field({}, description="our field name -> the file's, e.g. {output: answer}")
    train_on: Literal["completion", "all"] = Field(
        "completion", description="which tokens carry loss; text always trains all"
    )
    weight: float = Field(1.0, gt=0, description="times a record is seen in an epoch (0.5: every second)")
    max_records: int | None = Field(None, ge=1, description="read at most this many records")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path and hub")
        return self

    @model_validator(mode="after")
    def _known_fields(self) -> Self:
        required, optional = FORMAT_FIELDS[self.format]
        for name in self.fields:
            if name not in required + optional:
                raise ValueError(
                    f"fields names {name}, which format {self.format} does not have; "
                    f"it has: {', '.join(required + optional)}"
                )
        return self


class DataSection(Section):
    """What is trained on and evaluated on."""

    train: list[Source] = Field(min_length=1, description="training sets, mixed by weight")
    eval: list[Source] = Field([], description="evaluation sets")
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="part of each training set held out for evaluation"
    )
    sequence_length: int = Field(2048, ge=8, description="tokens in a row")
    packing: bool = Field(True, description="several documents in a row, isolated from each other")
    too_long: Literal["error", "truncate", "drop"] = Field(
        "error", description="a sample longer than sequence_length (text is always split instead)"
    )
    shuffle: bool = Field(True, description="a new order each epoch, a function of train.seed")
    streaming: bool = Field(False, description="read while training; needs train.max_steps")
    cache_dir: str | None = Field(None, description="where tokenized data is kept; default the user's cache")

    @model_validator(mode="after")
    def _streaming(self) -> Self:
        if self.streaming and self.eval_fraction > 0:
            raise ValueError("eval_fraction needs the whole set, which streaming never has; name data.eval")
        return self


class TrainSection(Section):
    """How long, how fast, with what optimizer."""

    max_steps: int | None = Field(None, ge=1, description="optimizer steps; exclusive with epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the training set")
    stop_after_steps: int | None = Field(
        None, ge=1, description="stop in order (exit 75) after this step, as a signal would"
    )
    learning_rate: float = Field(2e-4, gt=0, description="peak of the schedule")
    global_batch_size: int = Field(16, ge=1, description="rows an optimizer step, over all ranks")
    micro_batch_size: Count | Auto = Field("auto", description="rows a forward pass on one rank")
    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit: 8-bit moments")
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999), strict=False, description="decay of AdamW's first and second moment"
    )
    adam_eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="never applied to scalars, norms and biases, nor to factors that hold a part of W (pissa)",
    )
    schedule: Literal[
        "constant", "linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = Field("cosine", description="as transformers.get_scheduler")
    warmup_steps: int = Field(0, ge=0, description="steps over which the rate rises from 0")
    max_grad_norm: float = Field(1.0, ge=0, description="global-norm clipping; 0 turns it off")
    recompute: Recompute | Auto = Field(
        "auto",
        description="what the backward pass computes again: nothing; norms; norms and the MLP but its last linear; "
        "each block, from its input; the same with the inputs in host memory. auto: the first that the forecast fits",
    )
    recompute_blocks: int | None = Field(
        None,
        ge=0,
        description="with recompute: selective, so many blocks compute their MLP again, the first ones, and the others "
        "norms and the MLP's activation alone; default: all, and with auto as few as fit",
    )
    deterministic: bool = Field(
        False,
        description="kernels that add in a fixed order, so that a GPU repeats a run, and resumes it, bit for bit "
        "(measured on H200s); an operation that has none ends the run",
    )
    cuda_graph: bool | Auto = Field(
        False,
        description="record a micro batch's forward and backward pass once and replay it, which spares the host its "
        "launches; auto: where that is possible and rows are packed",
    )
    eval_every_steps: int | None = Field(None, ge=1, description="default: at start and end only")
    early_stop_evals: int | None = Field(
        None, ge=1, description="stop when the evaluation loss has not improved this many times"
    )
    seed: int = Field(0, ge=0, description="of the adapter's init, dropout and the order of records")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of max_steps and epochs")
        if self.schedule == "constant" and self.warmup_steps:
            raise ValueError("warmup_steps has no effect on schedule constant; use constant_with_warmup")
        if self.recompute_blocks is not None and self.recompute != "selective":
            raise ValueError("recompute_blocks goes with recompute: selective alone")
        return self


class ParallelSection(Section):
    """On how many devices, and how the work is spread."""

    strategy: Auto | Strategy = Field(
        "auto", description="auto: the simplest that fits, and the plan says why"
    )
    nodes: Count | NodeRange = Field(
        1, description='machines; a range "2-4" is planned for its fewest and again for those that a job gets'
    )
    gpus_per_node: Count | Auto = Field(
        "auto", description="ranks a node: GPUs where there are any, else CPU processes"
    )
    shard_size: Count | Auto = Field(
        "auto", description="hsdp: ranks that share one copy of the model; auto: the ranks of a node"
    )
    cpu_offload: bool = Field(False, description="keep shards in host memory (fsdp, zero3)")
    deepspeed: dict[str, Any] = Field(
        {},
        description="zero1 to zero3: further keys of DeepSpeed's config; what the plan sets is an error here",
    )
    timeout_s: float = Field(600.0, gt=0, description="a rank that is silent this long ends the run")
    hang_s: Annotated[float, Field(gt=0)] | Auto | None = Field(
        "auto",
        description="a run that stands still this long ends, and the rank it waits for is named with its stack; "
        "auto: four fifths of timeout_s, but at least 20 median steps, and an hour before the third; null: never",
    )
    gpu_memory_gib: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto", description="memory of one device, for the forecast"
    )

    @property
    def fewest_nodes(self) -> int:
        return self.nodes if isinstance(self.nodes, int) else int(self.nodes.split("-")[0])

    @property
    def most_nodes(self) -> int:
        return self.nodes if isinstance(self.nodes, int) else int(self.nodes.split("-")[1])

    @model_validator(mode="after")
    def _range_of_nodes(self) -> Self:
        if not 1 <= self.fewest_nodes <= self.most_nodes:
            raise ValueError(f'nodes: "{self.nodes}" is no range; write the fewest first, e.g. "2-4"')
        return self


class CheckpointSection(Section):
    """When training state is written, and how much of it is kept."""

    every_steps: int | None = Field(None, ge=1, description="default: at the end and on a stop only")
    keep: int = Field(3, ge=1, description="newest checkpoints that are kept")
    keep_best: int = Field(
        0,
        ge=0,
        description="besides them, so many with the lowest evaluation loss; an evaluation that gains saves",
    )
    keep_every_hours: float | None = Field(
        None, gt=0, description="besides them, one for each such span of time, for good"
    )
    grace_s: float = Field(
        120.0,
        gt=0,
        description="seconds after a stop signal by which the last completed step is on disk, whatever runs",
    )


class WandbSection(Section):
    """Weights & Biases; needs the extra `logging`."""

    project: str = Field(description="project that the run is filed under")
    name: str | None = Field(None, description="run name; default the recipe's")


class MlflowSection(Section):
    """MLflow; needs the extra `logging`."""

    tracking_uri: str = Field(description="server or folder")
    experiment: str = Field(description="experiment that the run is filed under")


class LoggingSection(Section):
    """Where numbers go besides the terminal and metrics.jsonl."""

    every_steps: int = Field(1, ge=1, description="steps between lines")
    tensorboard: bool = Field(True, description="write event files into the run directory")
    wandb: WandbSection | None = Field(None, description="also log to Weights & Biases")
    mlflow: MlflowSection | None = Field(None, description="also log to MLflow")


class Recipe(Section):
    """A whole recipe, checked."""

    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="run name; default the file's"
    )
    model: ModelSection
    quantization: QuantizationSection = QuantizationSection()
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    train: TrainSection
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    slurm: SlurmSection = SlurmSection()
    sweep: SweepSection | None = None

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        formats = {s.format for s in (*self.data.train, *self.data.eval)}
        if self.model.task == "sequence-classification":
            if formats != {"classification"}:
                raise ValueError("model.task sequence-classification needs data of format classification")
            if self.data.packing:
                raise ValueError("data.packing cannot be used with sequence-classification; set it false")
            if self.model.attention == "varlen":
                raise ValueError(
                    "model.attention varlen is for packed rows, which classification has none of"
                )
        elif "classification" in formats:
            raise ValueError("data of format classification needs model.task: sequence-classification")
        if self.data.streaming and self.train.max_steps is None:
            raise ValueError("data.streaming needs train.max_steps: a stream has no known length")
        strategy = STRATEGIES.get(self.parallel.strategy)
        if strategy and self.parallel.cpu_offload and not strategy.may_offload:
            able = " and ".join(s.name for s in STRATEGIES.values() if s.may_offload)
            raise ValueError(f"parallel.cpu_offload works with strategies {able} only")
        if self.parallel.deepspeed and not (strategy and strategy.is_deepspeed):
            raise ValueError("parallel.deepspeed works with strategies zero1, zero2 and zero3 only")
        if self.parallel.shard_size != "auto" and self.parallel.strategy != "hsdp":
            raise ValueError("parallel.shard_size works with strategy hsdp only")
        if self.train.early_stop_evals and not self.train.eval_every_steps:
            raise ValueError("train.early_stop_evals needs train.eval_every_steps")
        if self.checkpoint.keep_best and not self.train.eval_every_steps:
            raise ValueError("checkpoint.keep_best needs train.eval_every_steps")
        if (self.train.eval_every_steps) and not (self.data.eval or self.data.eval_fraction):
            raise ValueError("train.eval_every_steps needs data.eval or data.eval_fraction")
        return self
