"""MAP (Si et al., 2025, arXiv:2505.23094; eps and init of its 2026 revision), and "LoMAP", MAP over LoRA.

    W* = a W / (N(W) + eps) + b D / (N(D) + eps),    D = s B A

N is the Frobenius norm of the whole matrix; a and b are one trained scalar each. Of a quantized
base, W is what is really used: the dequantized weight, and N(W) is taken of that. Other methods'
D are in decompft.adapters.map_over.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, Facts, Settling, kaiming_uniform
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.factors import Factors
from decompft.adapters.kernels import norm, norm_many
from decompft.adapters.lora import scaling
from decompft.adapters.spec import AdapterConfig
from decompft.adapters.specs.base import inner_config


def make_map(base: FrozenLinear, config: AdapterConfig) -> Map:
    """MAP over the method that the options name."""
    if config.options.over == "lora":
        return MapLinear(base, config)
    from decompft.adapters.map_over import make_map_over  # which needs this module

    return make_map_over(base, config)


def state_of(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Of each a number that counts torch's writes to it, and its address."""
    return tuple(n for t in tensors for n in (t._version, t.data_ptr()))


class Map(Adapter):
    """The magnitudes a, which starts at N(W), and b, at `b_init`.

    After the first optimizer step the update has norm b whatever the learning rate; `b_warmup_steps`
    softens that. `base_norm` is in the adapter's file: a merge elsewhere must divide by the norm
    that a was trained with.
    """

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    base_norm: Tensor

    def __init__(self, base: FrozenLinear, config: AdapterConfig) -> None:
        super().__init__(base, config)
        # while it rises a tensor (), whose value may change in a recorded pass
        self._warmup: Tensor | float = 1.0
        self._update_norm: Tensor | None = None

    def magnitudes(self, facts: Facts) -> dict[str, Tensor]:
        """a, b and `base_norm` at the start; over a weight of zeros a is eps, so that a / (N(W) + eps) is 1, too."""
        norm = torch.tensor([float(facts["frobenius_norm"])], dtype=torch.float32)
        b = torch.tensor([self.config.options.b_init], dtype=torch.float32)
        return {"a": norm.clamp_min(self.config.options.eps), "b": b, "base_norm": norm}

    @property
    def warmup(self) -> float:
        return float(self._warmup)

    def on_step(self, step: int) -> None:
        if not self.config.options.b_warmup_steps:
            return
        share = (step + 1) / self.config.options.b_warmup_steps
        if share >= 1:
            self._warmup = 1.0
        elif isinstance(self._warmup, Tensor):
            self._warmup.fill_(share)
        else:  # float64: as exact as a number of Python's, and without dimensions it widens nothing
            self._warmup = torch.tensor(share, dtype=torch.float64, device=self.base_norm.device)


class MapLinear(Map):
    """y = (a / (N(W) + eps)) W x + (b s / (N(D) + eps)) B A x + bias.

    Starts at B = 0: the base up to eps. N(D) is s sqrt(tr((B^T B)(A A^T))), two rank x rank products
    in float32; the norm is not detached.
    """

    A: torch.nn.Parameter
    B: torch.nn.Parameter

    def __init__(self, base: FrozenLinear, config: AdapterConfig) -> None:
        super().__init__(base, config)
        inner = inner_config(config)
        self.scaling = scaling(inner)
        self.lr_ratio = config.options.lr_ratio * inner.options.lr_ratio
        # by map_scales.py for the passes of a step; and `state_of` the tensors that it is of, apart from it: a recorded
        # pass looks at what holds tensors, and must not be recorded anew for versions
        self.made_ahead: norm_many.Made | None = None
        self.made_of: tuple[int, ...] = ()

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        """row = a / (N(W) + eps), q = w b s / (N(D) + eps) = w b / (n + eps/s), with N(D) = s n,
        n = sqrt(tr((B^T B)(A A^T))) (METHODS 1.3, identity 1) and w the warm-up of b."""
        A, B, a, b = trained
        eps, s, warmup = self.config.options.eps, self.scaling, self._warmup
        ahead = None if isinstance(warmup, Tensor) else self.made_ahead
        # which nothing differentiates
        if ahead is not None and self.made_of == state_of(trained) and not torch.is_grad_enabled():
            grams, scalars, up = ahead
            found = norm.views(grams, scalars)
            self._update_norm = found.n
            return Factors(up=up, down=A, row=found.row, keep=(grams, scalars))
        if norm.fits(A, B) and not isinstance(warmup, Tensor):
            grams, scalars = norm.scales(A, B, a, b, fixed[0], eps=eps, s=s)
            found = norm.views(grams, scalars)
            self._update_norm = found.n
            # q in B: one launch here, instead of eight where tokens are multiplied by q, and summed for its slope
            return Factors(up=B * found.q, down=A, row=found.row, keep=(grams, scalars))
        found = norm.plain(A, B, a, b, fixed[0], eps=eps, s=s, warmup=warmup)
        self._update_norm = found.n.detach()  # over s
        return Factors(up=B, down=A, q=found.q, row=found.row, keep=tuple(found))

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """As in kernels/norm.py; dA and dB are those of the product, with the norm's added."""
        A, B, _, _ = trained
        assert grads.row is not None and grads.up is not None and grads.down is not None
        dA, dB = grads.down.contiguous(), grads.up.contiguous()
        if len(found.keep) == 2:
            grams, scalars = found.keep
            dq = torch.dot(dB.view(-1), B.view(-1))
            da, db = norm.pull_(A, B, grams, scalars, dq, grads.row, dA, dB)
        else:
            assert isinstance(grads.q, Tensor)
            noted = norm.Scales(*found.keep)
            da, db = norm.plain_pull_(A, B, noted, grads.q, grads.row, dA, dB, warmup=self._warmup)
        return dA, dB, da, db

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        start = {"A": kaiming_uniform(self.shapes["A"], generator), "B": torch.zeros(self.shapes["B"])}
        return start | self.magnitudes(facts)

    def lr_scales(self) -> dict[str, float]:
        ratio = self.config.options.magnitude_lr_ratio
        return {"B": self.lr_ratio, "a": ratio, "b": ratio}

    def settling(self) -> dict[str, Settling]:
        """At B = 0 the slope of D / (N(D) + eps) is 1/eps, a million times LoRA's, and one step
        later a hundred times. Unscaled, that one gradient would fill AdamW's second moment and
        hold B still for thousands of steps, and would shrink every other gradient by clipping."""
        options, s = self.config.options, self.scaling
        if not options.settle_norm or self._update_norm is None:
            return {}
        return {"B": Settling(size=self._update_norm, offset=options.eps / s, limit=options.settle_norm / s)}
