"""How every tool ends: errors as text on stderr and the exit code of their kind, no traceback for users."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from decompft.launcher.errors import DecompftError


def run_tool(main: Callable[[list[str]], None], argv: list[str]) -> NoReturn:
    """Run a tool's main and exit with the code its error stands for."""
    try:
        main(argv)
    except DecompftError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
