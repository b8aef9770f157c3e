"""How every tool ends: errors as text on stderr and the exit code of their kind, no traceback for users."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import NoReturn

from decompft.launcher.errors import EXIT_FAILED, DecompftError
from decompft.launcher.worker.quiet import quiet_imports


def run_tool(main: Callable[[list[str]], None], argv: list[str]) -> NoReturn:
    """Run a tool's main and exit with the code its error stands for."""
    quiet_imports()
    try:
        main(argv)
    except DecompftError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not _is_full_disk(error):
            raise
        place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        hint = "free some space where the output and the caches of models and data lie"
        print(f"error: {place}no space left on the disk\n  hint: {hint}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    sys.exit(0)


def _is_full_disk(error: Exception) -> bool:
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in numbers
    # the tokenizers library raises a bare Exception with Rust's words
    return any(f"(os error {number})" in str(error) for number in numbers)
