"""What the user types: verbs, their arguments, and what each of them calls. Only prints and exits.

Heavy modules are imported in the verb that needs them: `--help` answers before pydantic could load,
and nothing here ever loads torch; verbs that touch tensors run a worker tool as a child process.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from decompft.launcher.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, DecompftError

if TYPE_CHECKING:
    from decompft.launcher.recipe import Recipe

_TOOLS = "decompft.launcher.worker.tools"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code is 0, 2 (wrong input), 3 (failed) or 75 (run me again)."""
    # pydantic asks every installed distribution for plugins; on a full site-packages that takes long
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.version:
        from importlib.metadata import version

        print(f"decompft {version('decompft')}")
        return EXIT_DONE
    if args.verb is None:
        parser.print_help()
        return EXIT_USER
    # argparse gives up on KEY=VALUE that comes after an option
    if rest and hasattr(args, "overrides") and all("=" in word and word[0] != "-" for word in rest):
        args.overrides = [*args.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except DecompftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `| head` has seen enough; Python would complain again while it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return EXIT_FAILED


# -- control verbs --


def _launch(args: argparse.Namespace) -> int:
    from rich.console import Console

    from decompft.launcher import local, planner

    path, recipe = _recipe(args, strict=not args.dry_run)
    plan = planner.make(recipe)
    for warning in plan.warnings:
        _warn(warning)
    return local.launch(
        plan,
        path.read_text(encoding="utf-8-sig"),
        run_dir=args.run_dir,
        resume=args.resume,
        console=Console(),
        typed=(args.recipe, *args.overrides),
        dry_run=args.dry_run,
    )


def _plan(args: argparse.Namespace) -> int:
    from decompft.launcher import planner

    _, recipe = _recipe(args, strict=False)
    plan = planner.make(recipe)
    if args.json:
        from decompft.launcher.plan import to_json

        print(to_json(plan), end="")
    else:
        planner.show(plan)
    return EXIT_DONE


def _sbatch(args: argparse.Namespace) -> int:
    from decompft.launcher import planner
    from decompft.slurm import render

    _, recipe = _recipe(args, strict=False)
    plan = planner.make(recipe)
    for warning in plan.warnings:
        _warn(warning)
    run_dir = str(args.run_dir or Path("runs") / plan.name)
    text = render.script(plan, recipe_path=args.recipe, run_dir=run_dir, overrides=args.overrides)
    print(text, end="")
    return EXIT_DONE


def _check(args: argparse.Namespace) -> int:
    _, recipe = _recipe(args, strict=False)
    print(f"{args.recipe}: ok ({recipe.name})")
    return EXIT_DONE


def _schema(args: argparse.Namespace) -> int:
    from decompft.launcher.source import schema_json

    print(schema_json(), end="")
    return EXIT_DONE


def _recipes(args: argparse.Namespace) -> int:
    from decompft.launcher import shipped

    if args.action == "show":
        print(shipped.find(args.name).read_text(encoding="utf-8"), end="")
    elif args.action == "copy":
        written = shipped.copy(args.name, args.to)
        for path in written:
            print(path)
        print(f"next: decompft launch {written[0]}")
    else:
        entries = shipped.shipped()
        width = max(len(entry.name) for entry in entries)
        for entry in entries:
            print(f"{entry.name:<{width}}  {entry.purpose}")
    return EXIT_DONE


def _recipe(args: argparse.Namespace, *, strict: bool) -> tuple[Path, Recipe]:
    """Read and check the RECIPE argument; warnings go to stderr."""
    from decompft.launcher import checking, shipped, source

    path = shipped.find(args.recipe)
    recipe = source.load(path, args.overrides)
    for warning in checking.check(recipe, strict=strict):
        _warn(warning)
    return path, recipe


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


# -- verbs that a worker tool answers --


def _tool(args: argparse.Namespace) -> int:
    """Run the worker tool of this verb with the arguments as typed after it."""
    import subprocess

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
    # the folders of a checkout have generic names; the tool must not import them from the current folder
    name = "import_" if args.verb == "import" else args.verb  # a keyword is no module's name
    child = subprocess.Popen(
        [sys.executable, "-m", f"{_TOOLS}.{name}", *words], env={**os.environ, "PYTHONSAFEPATH": "1"}
    )
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:  # the terminal sent it to the tool too, which ends by it
            continue
    return code if code in (EXIT_DONE, EXIT_USER) else EXIT_FAILED


def _inspect(args: argparse.Namespace) -> int:
    from decompft.launcher import shipped

    args.recipe = shipped.find(args.recipe)
    return _tool(args)


# -- arguments --


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="decompft", description="One recipe in, a trained adapter out.")
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    def verb(name: str, text: str, *, recipe: bool = False) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if recipe:
            _add_recipe(sub)
        return sub

    launch = verb("launch", "run a recipe on this machine", recipe=True)
    launch.add_argument("--resume", metavar="auto|RUN|CHECKPOINT", help="continue from a checkpoint")
    launch.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/NAME")
    launch.add_argument("--dry-run", action="store_true", help="say what would happen, write nothing")
    launch.set_defaults(run=_launch)

    plan = verb("plan", "show what would run, and the memory forecast per rank", recipe=True)
    plan.add_argument("--json", action="store_true", help="print plan.json")
    plan.set_defaults(run=_plan)

    sbatch = verb("sbatch", "print a Slurm job script that runs a recipe", recipe=True)
    sbatch.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/NAME")
    sbatch.set_defaults(run=_sbatch)

    verb("check", "validate all that can be known without a GPU", recipe=True).set_defaults(run=_check)
    verb("schema", "print the JSON Schema of a recipe").set_defaults(run=_schema)

    recipes = verb("recipes", "list, show or copy the recipes that ship")
    recipes.set_defaults(run=_recipes, action="list")
    actions = recipes.add_subparsers(dest="action", metavar="list|show|copy")
    actions.add_parser("list", help="names and purposes")
    actions.add_parser("show", help="print one").add_argument("name", metavar="NAME")
    copy = actions.add_parser("copy", help="copy one, with the data it ships with, to a folder")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("to", metavar="DIR", type=Path, nargs="?", default=Path("."), help="default: here")

    _add_tools(verb)
    return parser


def _add_tools(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    doctor = verb("doctor", "what works on this machine, and what does not")
    doctor.set_defaults(run=_tool, positional=(), flags=())

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

    inspect = verb("inspect", "look at training samples, at weights, or at an adapter")
    kinds = inspect.add_subparsers(dest="kind", metavar="data|weights|adapter", required=True)
    data = kinds.add_parser("data", help="samples as tokens, the trained ones marked")
    _add_recipe(data)
    data.add_argument("--num", type=int, metavar="N", help="samples to show")
    data.set_defaults(run=_inspect, positional=("kind", "recipe", "overrides"), flags=("num",))
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


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a file, or the name of a shipped recipe")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="e.g. adapter.rank=8")


def _add_adapter(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    text = "an adapter folder, a run that finished, or a checkpoint"
    if optional:
        text += "; without one, --base is asked as it is"
    parser.add_argument("adapter", metavar="ADAPTER", nargs="?" if optional else None, help=text)
    parser.add_argument("--base", metavar="MODEL", help="default: the model that adapter.json names")


if __name__ == "__main__":
    sys.exit(main())
