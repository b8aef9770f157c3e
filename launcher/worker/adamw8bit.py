"""AdamW with 8-bit moments over the rows that live on this rank: bitsandbytes, and its moments in and out.

bitsandbytes refuses sharded tensors, torchao's AdamW8bit crashes on a rank that holds no row of a
tensor (torch 2.13, CPU) and compiles for minutes. Moments belong to rows alone, so bitsandbytes is
handed the local rows as plain tensors; under an engine that shards nothing they are the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.optim import AdamW8bit as WholeAdamW8bit
from torch import Tensor, nn

from decompft.launcher.worker.engines.base import Engine

_OWN_NAMES = {"exp_avg": "1", "exp_avg_sq": "2"}  # state1, absmax1, qmap1
_BLOCK = 256  # numbers that share a scale


class AdamW8bit(WholeAdamW8bit):  # type: ignore[misc]  # bitsandbytes has no types
    """bitsandbytes' AdamW8bit; tensors of fewer than 4096 local numbers keep float32 moments."""

    def __init__(self, groups: list[dict[str, Any]], engine: Engine, **common: Any) -> None:
        self._engine = engine
        self._rows = {p: self._local(p) for group in groups for p in group["params"]}
        mine = [
            {**g, "params": [self._rows[p] for p in g["params"] if self._rows[p].numel()]} for g in groups
        ]
        super().__init__(mine, **common)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for parameter, rows in self._rows.items():
            if rows is not parameter:
                if not self.initialized:  # FSDP2 moves rows that it has to pad at its first forward pass
                    rows.data = self._engine.local(parameter).detach()
                rows.grad = None if parameter.grad is None else self._engine.local(parameter.grad)
        super().step(closure)

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """This rank's rows of both moments in float32, and the step count; empty before the first step."""
        rows = self._rows[parameter]
        state = self.state.get(rows, {})
        if not state:
            return {}
        values = {name: _read(state, own).view(rows.shape) for name, own in _OWN_NAMES.items()}
        return {**values, "step": torch.tensor([float(state["step"])])}

    def set_moments(self, parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
        """Set this rank's rows of both moments, quantized again, and the step count."""
        rows = self._rows[parameter]
        for g, group in enumerate(self.param_groups):
            for p, member in enumerate(group["params"]):
                if member is rows:
                    self.init_state(group, rows, g, p)
                    self.state[rows]["step"] = int(moments["step"])
                    for name, own in _OWN_NAMES.items():
                        _write(self.state[rows], own, moments[name])

    def raw(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """This rank's 8-bit moments as they are: codes (numbers,) and absmax (blocks,); {} where they are float32."""
        state = self.state.get(self._rows[parameter], {})
        found = {}
        for name, own in _OWN_NAMES.items():
            if state and state[f"state{own}"].dtype != torch.float32:
                found[f"{name}.codes"] = state[f"state{own}"].reshape(-1)
                found[f"{name}.absmax"] = state[f"absmax{own}"].reshape(-1)
        return found

    def set_raw(self, parameter: nn.Parameter, raw: Mapping[str, Tensor]) -> None:
        """Set what `raw` gave, bit for bit; after `set_moments`."""
        state = self.state[self._rows[parameter]]
        for name, own in _OWN_NAMES.items():
            state[f"state{own}"].view(-1).copy_(raw[f"{name}.codes"])
            state[f"absmax{own}"].view(-1).copy_(raw[f"{name}.absmax"])

    def _local(self, parameter: nn.Parameter) -> nn.Parameter:
        rows = self._engine.local(parameter)
        return parameter if rows is parameter else nn.Parameter(rows.detach())


def _read(state: Mapping[str, Any], own: str) -> Tensor:
    stored: Tensor = state[f"state{own}"]
    if stored.dtype == torch.float32:
        return stored
    return dequantize_blockwise(
        stored, absmax=state[f"absmax{own}"], code=state[f"qmap{own}"], blocksize=_BLOCK
    )


def _write(state: Mapping[str, Any], own: str, moment: Tensor) -> None:
    """Quantize so that a moment which was 8 bits before gets the same codes again.

    bitsandbytes scales a block by its largest magnitude, but the map of signed codes ends at
    -0.993: a block with a negative extreme would shrink by 0.7 % with every save and load.
    """
    stored: Tensor = state[f"state{own}"]
    if stored.dtype == torch.float32:
        stored.copy_(moment.view(stored.shape))
        return
    qmap: Tensor = state[f"qmap{own}"]
    flat = moment.to(stored.device).flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    scale = blocks.amax(1) / qmap[-1]
    if qmap[0] < 0:
        scale = torch.maximum(scale, blocks.amin(1) / qmap[0])
    scale.clamp_min_(torch.finfo(torch.float32).tiny)
    nearest = torch.bucketize(blocks / scale[:, None], (qmap[1:] + qmap[:-1]) / 2)
    stored.copy_(nearest.flatten()[: len(flat)].view(stored.shape))
    state[f"absmax{own}"].copy_(scale)
