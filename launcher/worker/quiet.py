"""Which packages say at their import what nobody here can use?"""

from __future__ import annotations

import logging

_LOUD = ("bitsandbytes", "torchao", "torch.utils._pytree")


def quiet_imports() -> None:
    """Leave their errors, not their warnings: they tell of kernels that nothing here uses.

    A rank that is killed says nothing itself, and these would be the end of its log.
    """
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
