"""What the user types: verbs, their arguments, and what each of them calls. Only prints and exits.

Heavy modules are imported in the verb that needs them: `--help` answers before pydantic could load,
and nothing here ever loads torch; verbs that touch tensors run a worker tool as a child process.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from decompft.launcher.cli_runs import add_run_verbs
from decompft.launcher.cli_tools import add_tools
from decompft.launcher.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, DecompftError, UserError
from decompft.launcher.say import to_stderr, warn

if TYPE_CHECKING:
    from decompft.launcher.plan import Plan
    from decompft.launcher.recipe import Recipe
    from decompft.slurm.profile import Profile


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
    # nor can it tell an override behind --slurm from the profile's name
    if "=" in (getattr(args, "slurm", None) or ""):
        args.overrides, args.slurm = [*args.overrides, args.slurm], ""
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
    _refuse_idle_chain(args)
    if recipe.sweep is not None:
        from decompft.launcher.cli_sweep import launch_sweep

        return launch_sweep(args, path, recipe, lambda plan: _profile(args, plan))
    plan = planner.make(recipe)
    for warning in plan.warnings:
        warn(warning)
    if args.slurm is not None:
        return _submit(args, plan, path.read_text(encoding="utf-8-sig"))
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
    from decompft.launcher import planner, scale

    _, recipe = _recipe(args, strict=False)
    machine = scale.planned_machine(recipe, args.gpu, args.network)
    if args.scale is not None:
        scale.show(scale.scale(recipe, machine, scale.parse_counts(args.scale)), recipe, machine)
        return EXIT_DONE
    if recipe.sweep is not None:
        warn(
            "this is the plan of the recipe without its sweep; `decompft launch --dry-run` shows each task's"
        )
    plan = planner.make(recipe, machine=machine)
    if args.network is not None and plan.time is None:
        warn(
            "--network says nothing here: no speed was measured for this device, so that no time is forecast"
        )
    if args.json:
        from decompft.launcher.plan import to_json

        print(to_json(plan), end="")
    else:
        planner.show(plan)
    return EXIT_DONE


def _submit(args: argparse.Namespace, plan: Plan, recipe_text: str) -> int:
    from decompft.slurm.chain import read_chain, submit_chain

    run_dir = args.run_dir or Path("runs") / plan.name
    profile = _profile(args, plan)
    chain = read_chain(args.chain, profile, merge_into=args.chain_merge, eval_tasks=args.chain_eval)
    if args.dry_run:
        from decompft.slurm.render import train_script

        print(train_script(plan, profile, run_dir=str(run_dir)), end="")
        return EXIT_DONE
    jobs = submit_chain(plan, recipe_text, profile, chain, run_dir=run_dir, resume=args.resume, say=to_stderr)
    for job in jobs:
        after = f", after job {job.after[0]}" if job.after else ""
        if job.kind == "train":
            print(f"job {job.job_id}: {plan.name} on {plan.recipe.parallel.nodes} nodes, in {run_dir}{after}")
        else:
            print(f"job {job.job_id}: {job.kind}{after}")
    print(f"follow: decompft status {run_dir} | decompft logs {run_dir} --follow | decompft cancel {run_dir}")
    return EXIT_DONE


def _sbatch(args: argparse.Namespace) -> int:
    from decompft.launcher import planner
    from decompft.slurm.render import train_script

    _, recipe = _recipe(args, strict=False)
    if recipe.sweep is not None:
        raise UserError(
            f"{args.recipe}: a sweep is submitted by decompft, which makes a folder for each task",
            "decompft launch RECIPE --slurm; with --dry-run it prints the script",
        )
    plan = planner.make(recipe)
    for warning in plan.warnings:
        warn(warning)
    run_dir = str(args.run_dir or Path("runs") / plan.name)
    text = train_script(plan, _profile(args, plan), run_dir=run_dir, recipe=(args.recipe, *args.overrides))
    print(text, end="")
    return EXIT_DONE


def _profile(args: argparse.Namespace, plan: Plan) -> Profile:
    """The site: what --slurm names, else the recipe, else what holds everywhere."""
    from decompft.slurm import profile

    if plan.world.device == "cpu" and os.environ.get("DECOMPFT_DEVICE") != "cpu":
        warn(
            "this machine has no GPU, so the job asks for none; for nodes that have them set parallel.gpu_memory_gib "
            "and parallel.gpus_per_node in the recipe, and DECOMPFT_DEVICE=cpu if none are meant"
        )
    name = args.slurm or plan.recipe.slurm.profile
    return profile.load(profile.find(name, cwd=Path.cwd())) if name else profile.default()


def _check(args: argparse.Namespace) -> int:
    path, recipe = _recipe(args, strict=False)
    if recipe.sweep is not None:
        from decompft.launcher.sweep import check_tasks, tasks_of

        tasks = tasks_of(path, args.overrides)
        check_tasks(tasks, strict=False)
        print(f"{args.recipe}: ok ({recipe.name}, a sweep of {len(tasks)} tasks)")
        return EXIT_DONE
    print(f"{args.recipe}: ok ({recipe.name})")
    return EXIT_DONE


def _schema(args: argparse.Namespace) -> int:
    if args.profile:
        from decompft.slurm.profile import schema_json
    else:
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


def _drill(args: argparse.Namespace) -> int:
    from rich.console import Console

    from decompft.launcher.drill import drill

    return drill(
        args.kind,
        args.recipe,
        args.overrides,
        run_dir=args.run_dir,
        steps=args.steps,
        keep=args.keep,
        json_path=args.json,
        console=Console(),
    )


def _report(args: argparse.Namespace) -> int:
    from decompft.launcher.report import write_report

    print(write_report(args.runs, args.out))
    return EXIT_DONE


def _recipe(args: argparse.Namespace, *, strict: bool) -> tuple[Path, Recipe]:
    """Read and check the RECIPE argument; warnings go to stderr."""
    from decompft.launcher import checking, fetched, shipped, source

    path = shipped.find(args.recipe)
    recipe = source.load(path, args.overrides)
    if "run_dir" in args:  # what `fetch` pinned for the run
        recipe = fetched.pinned(recipe, args.run_dir or Path("runs") / str(recipe.name))
    for warning in checking.check(recipe, strict=strict):
        warn(warning)
    return path, recipe


def _refuse_idle_chain(args: argparse.Namespace) -> None:
    if args.slurm is None and (args.chain or args.chain_merge or args.chain_eval):
        raise UserError("--chain: jobs follow each other in Slurm", "add --slurm")


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

    launch = verb("launch", "run a recipe on this machine, or submit it to Slurm", recipe=True)
    launch.add_argument(
        "--slurm",
        metavar="PROFILE",
        nargs="?",
        const="",
        help="submit a job; PROFILE: a name, or a path ending in .yaml",
    )
    launch.add_argument(
        "--chain",
        metavar="STEP,...",
        help="with --slurm: jobs one after the other, of prepare,train,merge,eval",
    )
    launch.add_argument(
        "--chain-merge",
        choices=("dense", "dequantized", "requantized"),
        help="as merge --into; default: dense",
    )
    launch.add_argument(
        "--chain-eval", metavar="FILE", action="append", default=[], help="as eval --task; may be repeated"
    )
    launch.add_argument("--resume", metavar="auto|RUN|CHECKPOINT", help="continue from a checkpoint")
    launch.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/NAME")
    launch.add_argument("--dry-run", action="store_true", help="say what would happen, write nothing")
    launch.set_defaults(run=_launch)

    plan = verb("plan", "show what would run, the memory forecast per rank, and the time", recipe=True)
    plan.add_argument("--json", action="store_true", help="print plan.json")
    plan.add_argument(
        "--gpu", metavar="NAME", help="plan for nodes of this GPU, e.g. H200, and not for this machine"
    )
    plan.add_argument("--network", type=float, metavar="GBIT", help="of a node, Gbit/s; default: 400 a GPU")
    plan.add_argument("--scale", metavar="N,N", help="a table of more GPUs, e.g. 8,64,1024")
    plan.set_defaults(run=_plan)

    sbatch = verb("sbatch", "print a Slurm job script that runs a recipe", recipe=True)
    sbatch.add_argument("--slurm", metavar="PROFILE", help="the site: a name, or a path ending in .yaml")
    sbatch.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/NAME")
    sbatch.set_defaults(run=_sbatch)

    verb("check", "validate all that can be known without a GPU", recipe=True).set_defaults(run=_check)
    schema = verb("schema", "print the JSON Schema of a recipe, for editors")
    schema.add_argument("--profile", action="store_true", help="of a profile of a Slurm site")
    schema.set_defaults(run=_schema)

    recipes = verb("recipes", "list, show or copy the recipes that ship")
    recipes.set_defaults(run=_recipes, action="list")
    actions = recipes.add_subparsers(dest="action", metavar="list|show|copy")
    actions.add_parser("list", help="names and purposes")
    actions.add_parser("show", help="print one").add_argument("name", metavar="NAME")
    copy = actions.add_parser("copy", help="copy one, with the data it ships with, to a folder")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("to", metavar="DIR", type=Path, nargs="?", default=Path("."), help="default: here")

    _add_drill(verb("drill", "prove on this machine that a run of a recipe survives"))
    report = verb("report", "write a page of plots about a run, or about several side by side")
    report.add_argument("runs", metavar="RUN", nargs="+", help="a folder, or a name under ./runs")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html; of several: here")
    report.set_defaults(run=_report)

    add_run_verbs(verb)
    add_tools(verb, _add_recipe)
    return parser


def _add_drill(drill: argparse.ArgumentParser) -> None:
    drill.add_argument("kind", metavar="kill|resume|preempt", choices=("kill", "resume", "preempt"))
    _add_recipe(drill)
    drill.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="scratch folder; default: runs/drill-NAME-KIND-TIME"
    )
    drill.add_argument("--steps", type=int, default=12, metavar="N", help="of each run; default: 12")
    drill.add_argument("--keep", action="store_true", help="leave the scratch folder when all claims hold")
    drill.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts as JSON too")
    drill.set_defaults(run=_drill)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a file, or the name of a shipped recipe")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="e.g. adapter.rank=8")


if __name__ == "__main__":
    sys.exit(main())
