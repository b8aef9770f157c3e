"""How does a device record a pass, and do it again?"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], Tensor]  # one forward and backward pass; returns its loss, without autograd's graph

_WARM_UPS = 3


class Recorder(Protocol):
    """What a device does with a pass."""

    def plain(self, work: Work) -> Tensor: ...

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        """A call that does the work again, and the tensor in which its loss then is. May run the work meanwhile.

        Raises:
            RuntimeError: the work cannot be recorded.
        """
        ...

    def forget(self) -> None:
        """No recording that was made is replayed again."""


class CudaRecorder:
    """CUDA graphs of one memory pool, all on one stream beside the default one, which cannot be captured.

    Plain passes run on that stream, too: a node of autograd remembers the stream that it was made on.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def plain(self, work: Work) -> Tensor:
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                return work()
        finally:  # also where it fails: gradients are put back on `here`
            here.wait_stream(self._stream)

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        gc.collect()  # with cycles go nodes of autograd that know another stream
        torch.cuda.empty_cache()  # what an evaluation left: blocks of one stream are not given to another
        for _ in range(_WARM_UPS - 1):
            self.plain(work)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:  # what waits for the device is found here, in words, before it spoils a capture
            self.plain(work)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # other threads save checkpoints and watch collectives meanwhile: what they call is no fault of the pass
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                loss = work()
        except BaseException:
            torch.cuda.set_stream(here)  # a capture that fails leaves its own as the current one
            self._abandon(graph)
            raise
        return graph.replay, loss

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undo for the allocator a capture that has failed, so that the run can go on without."""
        graph.reset()
        # the state of the random numbers believes to be captured still; a copy of it does not
        generator = torch.cuda.default_generators[self._stream.device_index]
        generator.graphsafe_set_state(generator.clone_state())
        # for torch 2.11 the capture is still under way: the next shortage of memory would end the process, and the
        # pass's memory never be free (pytorch/pytorch#180395)
        device = self._stream.device_index
        try:
            torch._C._cuda_endAllocateToPool(device, self._pool)
        except RuntimeError:
            return  # it is not
        torch._C._cuda_releasePool(device, self._pool)

    def forget(self) -> None:
        torch.cuda.synchronize()  # the last replay
        self._pool = torch.cuda.graph_pool_handle()
