"""Verbs that touch tensors: their arguments, which a worker tool in a process of its own takes as they were typed.

Nothing here loads torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from decompft.launcher.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, UserError

_TOOLS = "decompft.launcher.worker.tools"


def add_tools(
    verb: Callable[[str, str], argparse.ArgumentParser], add_recipe: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Add the verbs.

    Args:
        verb: makes the parser of a verb from its name and a line of help.
        add_recipe: adds RECIPE and its overrides to a parser.
    """
    doctor = verb("doctor", "what works on this machine, and what does not")
    doctor.add_argument(
        "--slurm",
        metavar="PROFILE",
        nargs="?",
        const="",
        help="check a profile of a Slurm site against the cluster",
    )
    doctor.add_argument("--json", action="store_true", help="with --slurm: print the findings as JSON")
    doctor.set_defaults(run=_doctor, positional=(), flags=())

    fetch = verb(
        "fetch", "download a recipe's model and data where there is a network, and pin them for a run"
    )
    add_recipe(fetch)
    fetch.add_argument("--run-dir", metavar="DIR", help="default: runs/NAME")
    fetch.set_defaults(run=_with_recipe, positional=("recipe", "overrides"), flags=("run_dir",))

    merge = verb("merge", "write the base with the adapter folded in, as a plain model")
    _add_adapter(merge)
    merge.add_argument(
        "--into",
        required=True,
        choices=("dense", "dequantized", "requantized"),
        help="the base's own weights; what was trained on; or the first quantized again",
    )
    merge.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    merge.add_argument(
        "--check-data",
        metavar="FILE",
        help="held-out records to compare on; default: the run's evaluation split",
    )
    merge.add_argument(
        "--check-tokens", type=int, metavar="N", help="compare N tokens at most; default: 4096"
    )
    merge.add_argument("--no-check", action="store_true", help="do not compare with the unmerged model")
    merge.set_defaults(
        run=_tool,
        positional=("adapter",),
        flags=("into", "out", "base", "check_data", "check_tokens", "no_check"),
    )

    export = verb("export", "write an adapter for another library")
    _add_adapter(export)
    export.add_argument("--format", required=True, choices=("peft",), help="peft: a PEFT adapter")
    export.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    export.set_defaults(run=_tool, positional=("adapter",), flags=("format", "out", "base"))

    imported = verb("import", "read an adapter that peft saved")
    imported.add_argument("folder", metavar="PEFT_DIR", help="a folder that peft's save_pretrained wrote")
    imported.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    imported.add_argument("--base", metavar="MODEL", help="default: the model that the PEFT config names")
    imported.set_defaults(run=_tool, positional=("folder",), flags=("out", "base"))

    combine = verb("combine", "make one adapter, or model, of several over the same base")
    _add_combine(combine)

    evaluate = verb("eval", "score an adapter on tasks")
    _add_adapter(evaluate, optional=True)
    evaluate.add_argument("--task", required=True, nargs="+", metavar="FILE", help="JSONL files of records")
    evaluate.add_argument("--no-adapter", action="store_true", help="score the bare base")
    evaluate.add_argument("--limit", type=int, metavar="N", help="only the first N records of a task")
    evaluate.add_argument(
        "--scorer",
        choices=("likelihood", "first-match", "both"),
        help="by the likelihood of each label (default), or by the first label that is written",
    )
    evaluate.add_argument(
        "--batch-size", type=int, metavar="N", help="sequences a forward pass at most; default by length"
    )
    evaluate.add_argument("--json", action="store_true", help="print the scores as JSON")
    evaluate.set_defaults(
        run=_tool,
        positional=("adapter",),
        flags=("task", "base", "no_adapter", "limit", "scorer", "batch_size", "json"),
    )

    generate = verb("generate", "answer a prompt")
    _add_adapter(generate, optional=True)
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--no-adapter", action="store_true", help="ask the bare base")
    generate.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 256")
    generate.add_argument(
        "--format",
        choices=("auto", "chat", "instruction", "plain"),
        help="how the prompt is wrapped; auto (default): as the adapter's training data was",
    )
    generate.set_defaults(
        run=_tool,
        positional=("adapter",),
        flags=("prompt", "base", "no_adapter", "max_new_tokens", "format"),
    )

    inspect = verb("inspect", "look at training samples, weights, an adapter, or checkpoints")
    kinds = inspect.add_subparsers(dest="kind", metavar="data|weights|adapter|checkpoint", required=True)
    data = kinds.add_parser("data", help="samples as tokens, the trained ones marked")
    add_recipe(data)
    data.add_argument("--num", type=int, metavar="N", help="samples to show")
    data.set_defaults(run=_with_recipe, positional=("kind", "recipe", "overrides"), flags=("num",))
    weights = kinds.add_parser("weights", help="how a model's linear weights are distributed")
    weights.add_argument("model", metavar="MODEL", help="a folder, a hub id, or a GGUF file")
    weights.add_argument("--tuned", metavar="MODEL2", help="compare with a tuned model, or with an adapter")
    weights.add_argument(
        "--layers", nargs="+", metavar="PATTERN", help="only these, named as in adapter.targets"
    )
    _add_view(weights)
    weights.set_defaults(
        run=_tool, positional=("kind", "model"), flags=("tuned", "layers", "all", "json", "out")
    )
    adapter = kinds.add_parser("adapter", help="what an adapter learned, without its base")
    adapter.add_argument("adapter", metavar="ADAPTER", help="an adapter folder, a run, or a checkpoint")
    _add_view(adapter)
    adapter.set_defaults(run=_tool, positional=("kind", "adapter"), flags=("all", "json", "out"))
    checkpoint = kinds.add_parser("checkpoint", help="list and verify checkpoints, or compare two")
    checkpoint.add_argument("path", metavar="PATH", help="a checkpoint, a run, or a folder of checkpoints")
    checkpoint.add_argument("other", metavar="PATH2", nargs="?", help="compare with this one")
    checkpoint.add_argument("--json", action="store_true", help="print all of it as JSON")
    checkpoint.set_defaults(run=_inspect_checkpoint)


def _add_combine(combine: argparse.ArgumentParser) -> None:
    combine.add_argument("adapters", metavar="ADAPTER", nargs="+", help="two or more, over the same base")
    combine.add_argument(
        "--method",
        required=True,
        choices=("nan", "average", "task-arithmetic", "ties", "dare"),
        help="nan: an average with NAN's coefficients",
    )
    combine.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    combine.add_argument("--into", choices=("dense",), help="write a plain model instead of an adapter")
    combine.add_argument("--rank", type=int, metavar="R", help="of the adapter that is written")
    combine.add_argument("--coefficients", metavar="equal|nan|A,B,...", help="one a part")
    combine.add_argument("--norm-of", choices=("task_vector", "full"), help="what NAN takes the norm of")
    combine.add_argument("--granularity", choices=("tensor", "model"), help="NAN's coefficients, one a what")
    combine.add_argument("--scale", metavar="X", help="times the coefficients")
    combine.add_argument("--density", type=float, metavar="D", help="ties, dare: fraction that is kept")
    combine.add_argument("--seed", type=int, metavar="N", help="dare: of what is dropped")
    combine.add_argument("--base", metavar="MODEL", help="default: the model that adapter.json names")
    combine.add_argument("--task", nargs="+", metavar="FILE", help="score parts and result on these")
    combine.add_argument("--limit", type=int, metavar="N", help="only the first N records of a task")
    combine.add_argument("--batch-size", type=int, metavar="N", help="sequences a forward pass at most")
    combine.add_argument("--json", action="store_true", help="print what was done as JSON")
    combine.set_defaults(
        run=_tool,
        positional=("adapters",),
        flags=(
            "method", "out", "into", "rank", "coefficients", "norm_of", "granularity", "scale", "density",
            "seed", "base", "task", "limit", "batch_size", "json",
        ),
    )  # fmt: skip


def _add_view(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="a line a layer instead of a line a kind")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    parser.add_argument("--out", metavar="DIR", help="write JSON, and plots as PNG and SVG, into this folder")


def _add_adapter(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    text = "an adapter folder, a run that finished, or a checkpoint"
    if optional:
        text += "; without one, --base is asked as it is"
    parser.add_argument("adapter", metavar="ADAPTER", nargs="?" if optional else None, help=text)
    parser.add_argument("--base", metavar="MODEL", help="default: the model that adapter.json names")


def _tool(args: argparse.Namespace) -> int:
    """Run the worker tool of this verb with the arguments as typed after it."""
    given = vars(args)
    words: list[str] = []
    for name in args.positional:
        if given[name] is not None:
            words += given[name] if isinstance(given[name], list) else [str(given[name])]
    for name in args.flags:
        value, flag = given[name], f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None and value is not False:
            # with =, a value may begin with a dash
            words.append(f"{flag}={value}")
    return _run("import_" if args.verb == "import" else args.verb, words)  # a keyword is no module's name


def _run(tool: str, words: Sequence[str]) -> int:
    """Run a worker tool to its end; its exit code, or 3 for a code that is not its own."""
    import subprocess

    # the folders of a checkout have generic names; the tool must not import them from the current folder
    child = subprocess.Popen(
        [sys.executable, "-m", f"{_TOOLS}.{tool}", *words], env={**os.environ, "PYTHONSAFEPATH": "1"}
    )
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:  # the terminal sent it to the tool too, which ends by it
            continue
    return code if code in (EXIT_DONE, EXIT_USER) else EXIT_FAILED


def _doctor(args: argparse.Namespace) -> int:
    """A cluster is asked from here; what this machine can do needs torch."""
    if args.slurm is not None:
        from decompft.slurm.check_profile import doctor

        return doctor(args.slurm, as_json=args.json)
    if args.json:
        raise UserError("doctor: --json goes with --slurm", "decompft doctor --slurm PROFILE --json")
    return _tool(args)


def _with_recipe(args: argparse.Namespace) -> int:
    from decompft.launcher import shipped

    args.recipe = shipped.find(args.recipe)
    return _tool(args)


def _inspect_checkpoint(args: argparse.Namespace) -> int:
    """Listing and verifying need no tensors; comparing does."""
    from decompft.launcher.inspect_checkpoint import inspect_checkpoint, pair_to_compare

    if args.other is None:
        return inspect_checkpoint(args.path, as_json=args.json)
    pair = pair_to_compare(args.path, args.other)
    if pair is None:
        return EXIT_FAILED
    return _run("compare_checkpoints", [*map(str, pair), *(["--json"] if args.json else [])])
