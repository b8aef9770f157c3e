"""Full recomputation with each block's input kept in host memory.

A block's input leaves the GPU while the block runs, on a stream of its own, and comes back while the block after it is
in its backward pass: two inputs are on the way at most, and products wait for a copy only where it lasts longer than a
block. transformers' own `offload` copies on the stream of the products, which wait for each.

The buffers on the host are pinned and used again by later micro batches and steps. On a CPU the input is copied all the
same, so that the mode can be tried there; it saves nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from decompft.adapters.frozen.again import contexts


def checkpoint_on_host(*, draws: bool) -> Callable[..., Any]:
    """What transformers calls in place of torch's checkpoint, for all blocks of one model; `draws`: random numbers."""
    host = HostInputs()

    def run(function: Callable[..., Any], *args: Any) -> Any:
        # not the tensor: torch holds the hook, and what it holds, until the backward pass
        address, shape = args[0].data_ptr(), args[0].shape

        def pack(tensor: Tensor) -> Any:
            # a checkpoint saves its inputs and nothing else; all but the hidden states are shared by the blocks
            if tensor.data_ptr() == address and tensor.shape == shape:
                return host.put(tensor.detach())
            return tensor if tensor.grad_fn is None else tensor.detach()

        with saved_tensors_hooks(pack, host.get):
            return checkpoint(
                function, *args, use_reentrant=False, preserve_rng_state=draws, context_fn=contexts
            )

    return run


class Away:
    """A tensor that is on the host."""

    def __init__(self, raw: Tensor, like: Tensor) -> None:
        self.raw: Tensor | None = raw  # bytes, at least as many as the tensor has; None once it was got
        self.copy = raw[: like.nbytes].view(like.dtype).view(like.shape)
        self.device = like.device
        self.source: Tensor | None = None  # on the GPU, as long as it may still be read from there
        self.left: Any = None  # event: it was read
        self.back: Tensor | None = None  # on the GPU again
        self.arrived: Any = None  # event: `back` is written


class HostInputs:
    """Tensors on the host, put in the order of the forward pass and got in that of the backward pass."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        # of what is to be got, the next one last; a graph that is dropped takes its own with it
        self._stack: list[weakref.ref[Away]] = []
        self._leaving: Away | None = None  # the newest, whose source is held
        self._stream: torch.cuda.Stream | None = None  # of the copies, once there is a GPU's tensor

    def put(self, tensor: Tensor) -> Away:
        away = Away(self._buffer(tensor), tensor)
        if tensor.is_cuda:
            self._send(tensor, away)
        else:
            away.copy.copy_(tensor)
        self._stack.append(weakref.ref(away))
        return away

    def get(self, packed: Any) -> Tensor:
        """The tensor where it was; a second time is an error."""
        if isinstance(packed, Tensor):
            return packed
        away: Away = packed
        assert away.raw is not None, "an input was asked for twice: its buffer has gone on to another"
        self._stack = [ref for ref in self._stack if ref() not in (None, away)]
        tensor = self._receive(away) if away.device.type == "cuda" else away.copy.clone()
        self._free.append(away.raw)
        away.raw = None
        return tensor

    def _buffer(self, tensor: Tensor) -> Tensor:
        for index, raw in enumerate(self._free):
            if raw.nbytes >= tensor.nbytes:
                return self._free.pop(index)
        self._free.clear()  # all too small: longer rows than before
        return torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=tensor.is_cuda)

    def _send(self, tensor: Tensor, away: Away) -> None:
        main = torch.cuda.current_stream(tensor.device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        if self._leaving is not None and self._leaving.source is not None:
            # it had a whole block's time; after this its memory may be written to again
            main.wait_event(self._leaving.left)
            self._leaving.source = None
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            away.copy.copy_(tensor, non_blocking=True)
        away.source, away.left = tensor, self._stream.record_event()
        self._leaving = away

    def _receive(self, away: Away) -> Tensor:
        main = torch.cuda.current_stream(away.device)
        if away.source is not None:  # the last block's: it need not come back
            main.wait_event(away.left)
            tensor, away.source = away.source, None
        else:
            if away.back is None:
                self._fetch(away)
            assert away.back is not None
            main.wait_event(away.arrived)
            tensor, away.back = away.back, None
        following = self._stack[-1]() if self._stack else None
        if following is not None and following.source is None and following.back is None:
            self._fetch(following)
        return tensor

    def _fetch(self, away: Away) -> None:
        """Begin to copy one back, while what was launched so far is being computed and what is launched next."""
        assert self._stream is not None
        main = torch.cuda.current_stream(away.device)
        # memory of the stream of the products, which waits for the copy before it reads or frees it
        away.back = torch.empty_like(away.copy, device=away.device, pin_memory=False)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            away.back.copy_(away.copy, non_blocking=True)
        away.arrived = self._stream.record_event()
