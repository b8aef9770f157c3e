"""Write an adapter in another library's format."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from decompft.launcher.worker.adapter_folder import adapter_folder
from decompft.launcher.worker.tools.main import run_tool


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="decompft export")
    parser.add_argument("adapter")
    parser.add_argument("--format", choices=("peft",), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base")
    args = parser.parse_args(argv)
    folder = adapter_folder(args.adapter)
    # transformers takes seconds to import: only after the arguments were read
    from decompft.adapters.formats import FORMAT_SPECS
    from decompft.launcher.worker.inference import open_adapter
    from decompft.launcher.worker.peft_export import export_peft
    from decompft.launcher.worker.tools.progress import say

    adapter = open_adapter(folder, base=args.base, say=say)
    form = export_peft(adapter, args.out)
    what = f"a plain LoRA of rank {_ranks(form.fields)}" if form.is_plain else f"PEFT's {form.peft_type}"
    print(f"{args.out}: {what}; PeftModel.from_pretrained(model, {str(args.out)!r}) loads it")
    kind = adapter.quantization.format
    if FORMAT_SPECS[kind].is_quantized:
        say(
            f"it was trained over {kind}: over the base's own weights peft computes what "
            "`decompft merge --into dense` writes, which is not to the digit what training saw"
        )


def _ranks(fields: dict[str, Any]) -> str:
    ranks = sorted({fields["r"], *fields["rank_pattern"].values()})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


if __name__ == "__main__":
    run_tool(main, sys.argv[1:])
