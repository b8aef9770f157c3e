"""Rows of a checkpoint that bitsandbytes quantized, as our frozen formats store them; nothing is lost.

4 bits: codes (out * in / 2 bytes), absmax a block in float32, or, nested, in bytes that stand for

    absmax[i] = nested_quant_map[byte[i]] * nested_absmax[i // nested_blocksize] + nested_offset

which is computed here once, in float32, as bitsandbytes does at every use. 8 bits: codes and the
rows' absmax (`SCB`). Blocks do not cross rows, as every width is a multiple of the block size.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.fourbit import FourBitLinear
from decompft.adapters.frozen.int8 import Int8Linear
from decompft.launcher.errors import ModelError
from decompft.launcher.quantized_checkpoint import STATE, quant_state
from decompft.launcher.worker.tensorfile import DTYPES
from decompft.launcher.worker.tensors import SafetensorsSource, bytes_of

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class BitsAndBytesSource(SafetensorsSource):
    """A folder whose linear weights bitsandbytes packed; the other tensors are as in its base class.

    Names, shapes and dtypes are those of the weights before they were quantized.

    Raises:
        ModelError: as SafetensorsSource; a part of a weight is missing, or a layout that we lack.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._states: dict[str, dict[str, Any]] = {}  # of 4-bit weights
        for name, stored in self._stored.items():
            weight, is_state, _ = name.partition(STATE)
            if is_state:
                self._states[weight] = quant_state(stored)
        self._scales = {
            f"{n.removesuffix('.SCB')}.weight": n for n in self._stored if n.endswith(".SCB")
        }  # of int8 weights
        self._tables: dict[str, Tensor] = {}  # small whole tensors that many rows need
        for name in (*self._states, *self._scales):
            self._check(name)

    def names(self) -> Iterable[str]:
        return [n for n in self._stored if not self._is_part(n)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._states[name]["shape"]) if name in self._states else super().shape(name)

    def dtype(self, name: str) -> torch.dtype:
        if name in self._states:
            return DTYPES[self._states[name]["dtype"]][0]
        return torch.float16 if name in self._scales else super().dtype(name)

    def is_packed(self, name: str) -> bool:
        return name in self._states or name in self._scales

    def packed(
        self, name: str, layer: FrozenLinear, start: int, stop: int, *, buffer: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        if isinstance(layer, FourBitLinear) and self._states.get(name, {}).get("quant_type") == layer.code:
            codes = bytes_of(buffer, (stop - start) * layer.in_features // 2)
            self.read(name, start * layer.in_features // 2, codes)
            return layer.store(codes.view(stop - start, -1), self._absmax(name, layer, start, stop))
        if isinstance(layer, Int8Linear) and name in self._scales:
            codes = bytes_of(buffer, (stop - start) * layer.in_features)
            self.read(name, start * layer.in_features, codes)
            absmax = self._part(self._scales[name], start, stop)
            return layer.store(codes.view(torch.int8).view(stop - start, -1), absmax.view(-1, 1))
        raise ModelError(
            f"{name} is stored otherwise than the checkpoint's config.json says", "fetch the model again"
        )

    def rows(
        self, name: str, start: int, stop: int, *, transposed: bool = False, buffer: Tensor | None = None
    ) -> Tensor:
        """As the base class; of a packed weight the dequantized rows, in float32."""
        if not self.is_packed(name):
            return super().rows(name, start, stop, transposed=transposed, buffer=buffer)
        height, width = self.shape(name)
        layer: FrozenLinear
        with torch.device("meta"):
            if name in self._scales:
                layer = Int8Linear(width, height, bias_dtype=None)
            else:
                layer = _four_bit(self._states[name], width, height)
        return layer.unpack(self.packed(name, layer, start, stop, buffer=buffer), torch.float32)

    def _check_levels(self, name: str, kind: str) -> None:
        """bitsandbytes' operators know the 16 levels of a format; a file may bring others."""
        from bitsandbytes.functional import get_4bit_type  # 3 s, so only where it is used

        if f"{name}.quant_map" not in self._stored:
            return
        if kind not in self._tables:
            self._tables[kind] = get_4bit_type(kind, device="cpu")
        if not torch.equal(self._part(f"{name}.quant_map", 0, 16), self._tables[kind]):
            raise ModelError(
                f"{name}: is quantized to other levels than those of {kind}", "name the original checkpoint"
            )

    def _absmax(self, name: str, layer: FourBitLinear, start: int, stop: int) -> Tensor:
        """float32 (rows, blocks a row)."""
        first, last = start * layer.num_blocks, stop * layer.num_blocks
        found = self._part(f"{name}.absmax", first, last)
        state = self._states[name]
        if "nested_blocksize" in state:
            nested = self._whole(f"{name}.nested_absmax")
            blocks = torch.arange(first, last) // int(state["nested_blocksize"])
            found = self._whole(f"{name}.nested_quant_map")[found.long()] * nested[blocks]
            found += state["nested_offset"]
        return found.view(stop - start, layer.num_blocks)

    def _part(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flat uint8 or float tensor, floats as float32."""
        stored = self.stored(name)
        dtype = _FLOATS.get(stored.dtype, torch.uint8)
        cut = torch.empty((stop - start) * dtype.itemsize, dtype=torch.uint8)
        self.read(name, start * dtype.itemsize, cut)
        found = cut.view(dtype)
        return found.float() if dtype.is_floating_point else found

    def _whole(self, name: str) -> Tensor:
        if name not in self._tables:
            self._tables[name] = self._part(name, 0, self.stored(name).shape[0])
        return self._tables[name]

    def _is_part(self, name: str) -> bool:
        """Whether a tensor of the files is a part of a quantized weight."""
        if name.endswith((".SCB", ".weight_format")):
            return True
        weight, dot, _ = name.partition(".weight.")
        return bool(dot) and f"{weight}.weight" in self._states

    def _check(self, name: str) -> None:
        """Every part is there, of the size that its weight asks for, in a layout that is ours."""
        if name in self._scales:
            height, _ = self.shape(name) if len(self.shape(name)) == 2 else (-1, -1)
            sizes = {name: self.stored(name).num_bytes, self._scales[name]: 4 * height}
            layout = name.removesuffix("weight") + "weight_format"
            if layout in self._stored and self._part(layout, 0, 1).item() != 0:
                raise ModelError(
                    f"{name}: its int8 rows are stored out of order", "save it again, in row order"
                )
            if self.stored(name).dtype != "I8" or self.stored(self._scales[name]).dtype != "F32":
                raise ModelError(
                    f"{name}: not int8 with float32 scales", "the file is damaged; fetch it again"
                )
        else:
            state = self._states[name]
            if state["quant_type"] not in ("nf4", "fp4") or len(state["shape"]) != 2:
                raise ModelError(f"{name}: {state['quant_type']} {state['shape']} is no 4-bit matrix of ours")
            height, width = state["shape"]
            if width % state["blocksize"]:
                raise ModelError(
                    f"{name}: its width {width} is no multiple of its block size {state['blocksize']}: "
                    "blocks cross rows",
                    "name the original checkpoint, which decompft quantizes while loading",
                )
            if state["dtype"] not in DTYPES:
                raise ModelError(f"{name}: was made of {state['dtype']}, which decompft does not read")
            blocks = height * width // state["blocksize"]
            is_nested = "nested_blocksize" in state
            self._check_levels(name, state["quant_type"])
            sizes = {name: height * width // 2, f"{name}.absmax": blocks * (1 if is_nested else 4)}
            if is_nested:
                nested = -(-blocks // state["nested_blocksize"])
                sizes |= {f"{name}.nested_absmax": 4 * nested, f"{name}.nested_quant_map": 4 * 256}
        for part, size in sizes.items():
            if part not in self._stored:
                raise ModelError(
                    f"the checkpoint lacks {part}, a part of a quantized weight", "fetch it again"
                )
            if self.stored(part).num_bytes != size:
                raise ModelError(
                    f"{part} has {self.stored(part).num_bytes} bytes, its weight's shape asks for {size}",
                    "the file is damaged; fetch it again",
                )


def _four_bit(state: dict[str, Any], width: int, height: int) -> FourBitLinear:
    from decompft.adapters.frozen.fourbit import Fp4Linear, Nf4Linear

    kind = Nf4Linear if state["quant_type"] == "nf4" else Fp4Linear
    return kind(width, height, block_size=state["blocksize"], double_quant=False, bias_dtype=None)
