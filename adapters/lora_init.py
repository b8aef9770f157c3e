"""LoRA-Init and LoRA-TSD (Si et al., 2024, arXiv:2409.01035): a reading, since only a figure says what they are.

    steps 0 .. t-1:  W* = W + s B A
    then:            W* = W_res + s B A,   W_res = W - s B0 A0,   s B0 A0 = sum_{i in T} S_i u_i v_i^T
                     A and B start again at A0 = diag(sqrt(S_T / s)) V_T^T and B0 = U_T diag(sqrt(S_T / s));
                     T: the r directions that score highest
    LoRA-TSD:        W* = W_res + s B A + sum_{i in T'} c_i u_i v_i^T,   T': the s_dir first of T

Open in the source, and decided so here: what B A learned before t is thrown away (the layer is its base again
at t; near it, where W_res was quantized), T' overlaps T, and both terms begin at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from decompft.adapters.frozen.factors import Factors
from decompft.adapters.launched import LaunchedAdapter
from decompft.adapters.lora import scaling


class LoraInitLinear(LaunchedAdapter):
    """`base: exact`: y = (W + s B A - s B0 A0) x + bias over an untouched base, thin rank 2 r.

    `base: residual`: y = (W_res + s B A) x + bias, where W_res is stored in the base's format.
    """

    A0: Tensor
    B0: Tensor

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        A, B = trained[:2]
        up, down = self._parts(A, B, fixed)
        return Factors(up=torch.cat(up, dim=1), down=torch.cat(down), q=scaling(self.config))

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        assert grads.up is not None and grads.down is not None
        return grads.down[: self.config.rank], self._of_B(grads.up)

    def launched(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r = self.config.rank
        root = (found["S"][:r] / scaling(self.config)).sqrt()
        B0, A0 = found["U"][:r].T * root, root[:, None] * found["V"][:r]
        return {**super().launched(found), "A": A0, "B": B0, "A0": A0, "B0": B0}

    def restarts(self) -> dict[str, int]:
        return {"A": self.start_step, "B": self.start_step}

    def no_decay(self) -> tuple[str, ...]:
        """From the restart on A and B hold a part of W; a tensor's decay is the same in all of a run."""
        return ("A", "B")

    @property
    def rewrites_base(self) -> bool:
        return bool(self.config.options.base == "residual")

    def base_rows(self, rows: Tensor, first: int, values: Mapping[str, Tensor]) -> Tensor:
        """W_res = W - s B0 A0 once the second phase has begun; before it, the rows as they are."""
        if not self.rewrites_base or not bool(values["phase"]):
            return rows
        A0, B0 = (values[n].to(rows.device) for n in ("A0", "B0"))
        return rows.float() - scaling(self.config) * (B0[first : first + rows.shape[0]] @ A0)

    @torch.no_grad()
    def change_of_checkpoint(self) -> tuple[Tensor, Tensor] | None:
        found = self.effective(torch.empty(0))
        assert found.up is not None and found.down is not None
        up, down = found.q * found.up, found.down
        if not self.rewrites_base or not bool(self.phase):
            return up, down
        return torch.cat([up, -scaling(self.config) * self.B0], dim=1), torch.cat([down, self.A0])

    def _parts(self, A: Tensor, B: Tensor, fixed: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Columns of `up` and rows of `down`, both to be scaled by s."""
        if self.rewrites_base:
            return [B], [A]
        A0, B0 = fixed[:2]
        # B A - B0 A0 from differences in float32: as two products rounded apart, a small step would be lost
        return [B, B - B0], [A - A0, A0]

    def _of_B(self, up: Tensor) -> Tensor:
        """The gradient of B from that of the columns of `_parts`."""
        r = self.config.rank
        return up[:, :r] if self.rewrites_base else up[:, :r] + up[:, r : 2 * r]


class LoraTsdLinear(LoraInitLinear):
    """LoRA-Init with the dash term U_T diag(c) V_T^T beside it."""

    c: torch.nn.Parameter
    U_T: Tensor
    V_T: Tensor

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        A, B, c = trained
        up, down = self._parts(A, B, fixed)
        U_T, V_T = fixed[2:4]
        scaled = [scaling(self.config) * part for part in up]
        return Factors(up=torch.cat([*scaled, U_T * c], dim=1), down=torch.cat([*down, V_T.T]))

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        assert grads.up is not None and grads.down is not None
        k = trained[2].shape[0]
        dc = torch.sum(grads.up[:, -k:] * fixed[2], dim=0)
        return grads.down[: self.config.rank], self._of_B(grads.up) * scaling(self.config), dc

    def launched(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        k = self.shapes["c"][0]
        dash = {"U_T": found["U"][:k].T, "V_T": found["V"][:k].T, "c": torch.zeros(k)}
        return {**super().launched(found), **dash}

    def restarts(self) -> dict[str, int]:
        return {**super().restarts(), "c": self.start_step}

    def asleep(self, step: int) -> tuple[str, ...]:
        return ("c",) if step < self.start_step else ()

    def lr_scales(self) -> dict[str, float]:
        return {"c": self.config.options.coordinate_lr_ratio}
