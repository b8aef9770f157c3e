"""What an adapter answers to a prompt: only the continuation goes to stdout."""

from __future__ import annotations

import argparse
import sys

from decompft.launcher.errors import UserError
from decompft.launcher.worker.adapter_folder import adapter_folder
from decompft.launcher.worker.tools.main import run_tool


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="decompft generate")
    parser.add_argument("adapter", nargs="?")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--base")
    parser.add_argument("--no-adapter", action="store_true")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--format", choices=("auto", "chat", "instruction", "plain"), default="auto")
    args = parser.parse_args(argv)
    if not args.prompt.strip() or args.max_new_tokens < 1:
        raise UserError("nothing to generate", "--prompt needs some text, --max-new-tokens at least 1")
    folder = None if args.adapter is None else adapter_folder(args.adapter)
    # transformers takes seconds to import: only after the arguments were read
    from decompft.launcher.worker import generation
    from decompft.launcher.worker.inference import load
    from decompft.launcher.worker.tools.progress import Progress, say

    with Progress("loading the base") as progress:
        loaded = load(folder, base=args.base, use_adapter=not args.no_adapter, progress=progress, say=say)
    if loaded.model.task != "causal-lm":
        raise UserError(
            f"{args.adapter}: is a classifier, which writes no text", "its labels come from training"
        )
    form = generation.choose_format(loaded) if args.format == "auto" else args.format
    ids = generation.prompt_ids(args.prompt, form, loaded.tokenizer)
    (answer,) = generation.generate(loaded, [ids], max_new_tokens=args.max_new_tokens)
    print(loaded.tokenizer.decode(answer, skip_special_tokens=True).strip("\n"))


if __name__ == "__main__":
    run_tool(main, sys.argv[1:])
