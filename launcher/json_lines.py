"""What does a .jsonl file say whose writer may be at work, or was killed in the middle of a line?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects in it, None for a line that is none; a last line without end is still being written.

    There are none where there is no file.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            elif line.endswith(b"\n") and line.strip():
                yield None
