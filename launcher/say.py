"""Words to the user while a verb works: on stderr, so that stdout holds its result alone."""

from __future__ import annotations

import sys
from collections.abc import Callable

Say = Callable[[str], None]  # given one line


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    to_stderr(f"warning: {text}")
