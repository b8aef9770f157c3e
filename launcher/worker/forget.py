"""Recomputation by pieces: a block runs its norms again, and under `selective` the front of its MLP or the activation
alone; the rest it keeps.

A piece is a function of one tensor, run once in the forward pass and, if the backward pass asks for anything that it
left behind, once more. Left behind are two kinds of tensors: those that autograd saved inside, and the piece's output
where modules after it saved that (the input of q, k and v; the input of the MLP's last linear). Hooks on saved tensors
put handles in the place of both. Nothing is run twice within a backward pass, what was recomputed is freed as it is
read, and a product behind the piece (the MLP's last) is not run again, as a checkpoint around the MLP would.

The second run is the same code on the same numbers with the same random numbers, so that losses and gradients are
those without recomputation, bit for bit where the kernels are deterministic. Policies over single operations
(torch.utils.checkpoint's selective contexts) were not taken: they send every operation of a step through Python, whose
launches are the limit already, and refuse what is written to in place, as Liger's kernels and the frozen linears do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from decompft.adapters.base import Adapter
from decompft.adapters.joint import running
from decompft.launcher.recompute import Pieces
from decompft.launcher.worker.gated import gated_front

_Function = Callable[[Tensor], Tensor]
MlpPart = Literal["nothing", "activation", "front"]


def forget(block: nn.Module, pieces: Pieces, *, mlp: MlpPart) -> None:
    """Let a block run its norms again in the backward pass. Before anything is sharded, after kernels are chosen.

    Args:
        mlp: what of its MLP, too: what lies between its linears, or all but the last linear.
    """
    passes: list[_Pass] = []  # the forward pass that is under way, if any
    for name in pieces.norms:
        parent, _, own = name.rpartition(".")
        norm = getattr(block.get_submodule(parent), own, None)
        if norm is not None:
            # Liger's rotary writes over what the attention's own norms give, unseen by autograd: whoever saved that
            # would be given it unturned; and nobody else keeps it
            _set_forward(norm, _rerun_norm(norm, passes, is_kept=not parent))
    module = block.get_submodule(pieces.mlp)
    if mlp == "front":
        _set_forward(module, _split_mlp(module, pieces.last, passes))
    elif mlp == "activation":
        _set_forward(module, _rerun_activation(module, pieces, passes))
    _set_forward(block, _watch(block.forward, passes))


def _watch(original: Callable[..., Any], passes: list[_Pass]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        now = _Pass()
        passes.append(now)
        try:
            with saved_tensors_hooks(now.pack, _unpack):
                return original(*args, **kwargs)
        finally:
            passes.pop()
            now.end()

    return forward


def _rerun_norm(norm: nn.Module, passes: list[_Pass], *, is_kept: bool) -> _Function:
    """`is_kept`: modules after it save its output, which is left to the second run."""
    original: _Function = norm.forward
    asked: list[list[Tensor]] = []  # where a second run wants the output

    def again(x: Tensor) -> Tensor:
        # by the module's call, whose hooks bring the weight where an engine has cut it; they may change the output
        found: list[Tensor] = []
        asked.append(found)
        try:
            norm(x)
        finally:
            asked.pop()
        return found[0]

    def forward(x: Tensor) -> Tensor:
        if passes:
            return passes[-1].run(original, x, again=again, is_kept=is_kept)
        y = original(x)
        if asked:
            asked[-1].append(y)
        return y

    return forward


def _split_mlp(mlp: nn.Module, last: str, passes: list[_Pass]) -> _Function:
    """The MLP as two calls: all before its last linear, which is a piece, and that linear."""
    original: _Function = mlp.forward
    draws = any(m.config.dropout > 0 for n, m in mlp.named_modules() if isinstance(m, Adapter) and n != last)

    def front(x: Tensor) -> Tensor:
        with _exchanged(mlp, {last: nn.Identity()}), running(mlp):  # the second time nobody calls the MLP
            return original(x)

    def forward(x: Tensor) -> Tensor:
        if not passes:
            return original(x)
        end: _Function = mlp.get_submodule(last)
        return end(passes[-1].run(front, x, again=front, draws=draws))

    return forward


def _rerun_activation(mlp: nn.Module, pieces: Pieces, passes: list[_Pass]) -> _Function:
    """The MLP as three calls, of which the second, between its linears, is not kept; what it saved itself is."""
    original: _Function = mlp.forward

    def front(x: Tensor) -> tuple[Tensor, Callable[[], Tensor] | None]:
        """The activation, and how to make it again; None where more would be kept for that than it is."""
        found: list[Tensor] = []

        def seen(name: str) -> _Function:
            module: _Function = mlp.get_submodule(name)

            def call(x: Tensor) -> Tensor:
                found.append(module(x))
                return found[-1]

            return call

        with _exchanged(mlp, {**{n: seen(n) for n in pieces.inner}, pieces.last: nn.Identity()}):
            y = original(x)
        # without their nodes, or what holds this would keep itself
        given = [t.detach() for t in found]

        def again() -> Tensor:
            outputs = {n: lambda _, t=t: t for n, t in zip(pieces.inner, given, strict=True)}
            with torch.no_grad(), _exchanged(mlp, {**outputs, pieces.last: nn.Identity()}):
                return original(given[0])  # as an x, which nobody reads

        return y, again if all(map(passes[-1].keeps, given)) else None

    def forward(x: Tensor) -> Tensor:
        if not passes:
            return original(x)
        y, again = gated_front(mlp, x) or front(x)
        end: _Function = mlp.get_submodule(pieces.last)
        return end(y if again is None else passes[-1].drop(y, again))

    return forward


@contextmanager
def _exchanged(module: nn.Module, others: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Within, calls of these children are calls of others."""
    taken = {name: module._modules[name] for name in others}
    module._modules.update(others)  # type: ignore[arg-type]  # whatever can be called
    try:
        yield
    finally:
        module._modules.update(taken)


def _set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """On the instance, so that hooks of engines stay around it."""
    module.forward = forward


class _Pass:
    """One forward pass of a block: the outputs of its pieces, which are not to be kept."""

    def __init__(self) -> None:
        # by address; the tensors are held, so that no other takes an address of theirs before the pass is over
        self._outputs: dict[int, tuple[Tensor, _Source]] = {}
        self._kept: set[int] = set()  # where the memory begins that is saved as it is

    def run(
        self,
        function: _Function,
        x: Tensor,
        *,
        again: _Function,
        draws: bool = False,
        is_kept: bool = True,
    ) -> Tensor:
        """`function` of x.

        Args:
            again: the same function in the backward pass.
            draws: random numbers.
            is_kept: modules after it save its output as it is.
        """
        piece = _Piece(again, self.pack(x), x, draws=draws)
        y = piece.run(function, x)
        if is_kept and y.data_ptr():
            self._outputs[y.data_ptr()] = (y, piece)
        return y

    def drop(self, y: Tensor, again: Callable[[], Tensor]) -> Tensor:
        """y itself, which is not kept where modules after this save it: `again` makes it."""
        if y.data_ptr():
            self._outputs[y.data_ptr()] = (y, _Remade(again))
        return y

    def keeps(self, tensor: Tensor) -> bool:
        """Whether its memory is saved already: Liger's activation saves copies of what is not contiguous (phi3)."""
        return tensor.data_ptr() in self._kept

    def end(self) -> None:
        """Let go of the outputs: the graph holds this object through its hook."""
        self._outputs.clear()
        self._kept.clear()

    def pack(self, tensor: Tensor) -> Any:
        found = self._outputs.get(tensor.data_ptr())
        if found is not None:
            y, piece = found
            if tensor.numel() == y.numel() and tensor.dtype == y.dtype and _same_order(tensor, y):
                return _Output(piece, tensor.shape)
        self._kept.add(tensor.data_ptr())
        # without its node, or a node that saves its own output would keep itself alive
        return tensor if tensor.grad_fn is None else tensor.detach()


def _same_order(tensor: Tensor, y: Tensor) -> bool:
    return tensor.is_contiguous() and y.is_contiguous()


class _Piece:
    """One call of a function, of which only the input is kept."""

    def __init__(self, again: _Function, packed: Any, x: Tensor, *, draws: bool) -> None:
        self._again, self._packed, self._needs_grad = again, packed, x.requires_grad
        self._random = _random_states(x.device) if draws else None
        self._num_saved = 0
        self._num_uses = 0
        self._saved: dict[int, Tensor] = {}
        self._output: Tensor | None = None

    def run(self, function: _Function, x: Tensor) -> Tensor:
        with saved_tensors_hooks(self._pack, _unpack):
            return function(x)

    def use_output(self) -> None:
        self._num_uses += 1

    def saved(self, index: int) -> Tensor:
        if index not in self._saved:
            self._run_again()
            if self._num_uses <= 0:  # nobody will ask for it
                self._output = None
        return self._saved.pop(index)

    def output(self) -> Tensor:
        if self._output is None:
            self._run_again()
        assert self._output is not None
        y = self._output
        self._num_uses -= 1
        if self._num_uses <= 0:
            self._output = None
        return y

    def _pack(self, tensor: Tensor) -> _Saved:
        self._num_saved += 1
        return _Saved(self, self._num_saved - 1)

    def _run_again(self) -> None:
        found: list[Tensor] = []

        def pack(tensor: Tensor) -> None:
            # an engine may move a parameter's data about: the parameter follows, a detached one would not
            found.append(tensor if tensor.grad_fn is None else tensor.detach())

        x = _unpack(self._packed).detach().requires_grad_(self._needs_grad)
        with torch.enable_grad(), saved_tensors_hooks(pack, _never), _drawing_from(self._random):
            y = self._again(x)
        assert len(found) == self._num_saved, f"{len(found)} tensors saved again, {self._num_saved} at first"
        self._saved = dict(enumerate(found))
        self._output = y.detach()


class _Remade:
    """An output that follows from tensors which others keep."""

    def __init__(self, again: Callable[[], Tensor]) -> None:
        self._again = again
        self._num_uses = 0
        self._output: Tensor | None = None

    def use_output(self) -> None:
        self._num_uses += 1

    def output(self) -> Tensor:
        y = self._again() if self._output is None else self._output
        self._num_uses -= 1
        self._output = y if self._num_uses > 0 else None
        return y


_Source = _Piece | _Remade


class _Saved:
    """In place of a tensor that was saved inside a piece."""

    __slots__ = ("index", "piece")

    def __init__(self, piece: _Piece, index: int) -> None:
        self.piece, self.index = piece, index


class _Output:
    """In place of a piece's output, saved outside it."""

    __slots__ = ("piece", "shape")

    def __init__(self, piece: _Source, shape: torch.Size) -> None:
        self.piece, self.shape = piece, shape
        piece.use_output()


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _Saved):
        return packed.piece.saved(packed.index)
    if isinstance(packed, _Output):
        return packed.piece.output().view(packed.shape)
    assert isinstance(packed, Tensor)
    return packed


def _never(_: Any) -> Tensor:
    raise AssertionError("the graph of a second run is thrown away, nobody goes through it")


_States = tuple[list[torch.device], list[Tensor]]


def _random_states(device: torch.device) -> _States:
    devices = [device] if device.type == "cuda" else []
    return devices, [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]


@contextmanager
def _drawing_from(states: _States | None) -> Iterator[None]:
    """Random numbers come once more from where they stood, and go on afterwards as if they had not."""
    if states is None:
        yield
        return
    devices, (cpu, *others) = states
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(cpu)
        for device, state in zip(devices, others, strict=True):
            torch.cuda.set_rng_state(state, device)
        yield
