"""LoRA-Dash (Si et al., 2024, arXiv:2409.01035).

    steps 0 .. t-1:  W* = W + s B A
    then:            W* = W + s B A + sum_{i in T} c_i u_i v_i^T,   T: the s_dir directions that score highest

c starts at 0: the switch changes nothing by itself. The term carries no scaling; dropout on its input is that of A's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from decompft.adapters.frozen.factors import Factors
from decompft.adapters.launched import LaunchedAdapter
from decompft.adapters.lora import scaling


class LoraDashLinear(LaunchedAdapter):
    """y = (W + s B A + U_T diag(c) V_T^T) x + bias. U_T and V_T are 0 before the switch: c then has no slope."""

    c: torch.nn.Parameter
    U_T: Tensor
    V_T: Tensor

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        A, B, c = trained
        U_T, V_T = fixed[0], fixed[1]
        return Factors(up=torch.cat([scaling(self.config) * B, U_T * c], dim=1), down=torch.cat([A, V_T.T]))

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        assert grads.up is not None and grads.down is not None
        r = self.config.rank
        dc = torch.sum(grads.up[:, r:] * fixed[0], dim=0)
        return grads.down[:r], grads.up[:, :r] * scaling(self.config), dc

    def launched(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**super().launched(found), "U_T": found["U"].T, "V_T": found["V"].T}

    def restarts(self) -> dict[str, int]:
        return {"c": self.start_step}

    def asleep(self, step: int) -> tuple[str, ...]:
        return ("c",) if step < self.start_step else ()

    def lr_scales(self) -> dict[str, float]:
        return {"c": self.config.options.coordinate_lr_ratio}
