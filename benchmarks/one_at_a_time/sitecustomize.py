"""On PYTHONPATH: a process that wants the GPU waits until no other holds the file GPU_LOCK, and holds it to its end.

So the next run of a benchmark can plan, prepare and import, half a minute, while one is timed.
"""

import fcntl
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import TextIO

MODULE, FUNCTION = "torch.cuda", "_lazy_init"  # through which torch, its C++ side too, comes to the GPU
PATIENCE_S = 200.0  # then it goes on: better two at once than none
_held: list[object] = []


def _taken(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _Waiting(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the module as it is, and puts the wait before its function."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != MODULE:
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path, target)
        if found is not None and found.loader is not None:
            self._loader, found.loader = found.loader, self
        return found

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        original = getattr(module, FUNCTION)

        def wait() -> object:
            if not _held:
                _held.append(lock := open(os.environ["GPU_LOCK"], "w"))
                end = time.monotonic() + PATIENCE_S
                while not _taken(lock) and time.monotonic() < end:
                    time.sleep(0.05)
            return original()

        setattr(module, FUNCTION, wait)


if "GPU_LOCK" in os.environ:
    sys.meta_path.insert(0, _Waiting())
