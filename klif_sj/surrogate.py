"""Surrogate functions for any SpikingJelly neuron, in both SpikingJelly lines.

Forward, a surrogate gives the spike ``1[x >= 0]``; backward, it replaces the derivative of the spike by another one.
With ``spiking=False`` it gives the primitive function of that derivative instead, which is continuous.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from spikingjelly.activation_based import surrogate as upstream
from torch import Tensor, nn

from . import _compat
from ._checks import check_number, check_positive
from .neuron.parameters import check_bounds, clamped_through

__all__ = ["LearnableATan", "Rect"]


class LearnableATan(upstream.SurrogateFunctionBase):
    r"""ATan surrogate whose slope and width are learned.

    .. math::
        S = \Theta(k x), \qquad
        \frac{\partial S}{\partial x} = k\, g'(k x), \qquad
        \frac{\partial S}{\partial k} = x\, g'(k x), \qquad
        g'(u) = \frac{\alpha}{2 (1 + (\frac{\pi}{2} \alpha u)^2)}

    As k is positive, the spikes are those of :math:`\Theta(x)`: k only shapes the gradient (compare Eq. 9 of the KLIF
    paper, arXiv 2302.09238, where k scales the membrane potential as well).

    Give every neuron its own instance: a shared one would learn one k for all.

    :param alpha: slope of the fixed ATan, positive
    :param k: initial value of the learnable scale, within ``k_bounds``
    :param k_bounds: (low, high) with 0 < low < high; k never leaves them in the forward pass
    :param spiking: False gives the primitive :math:`g(kx) = \frac{1}{\pi}\arctan(\frac{\pi}{2}\alpha k x) + \frac12`

    Shape: any shape and floating-point dtype; the output has those of the input.
    """

    k: nn.Parameter
    alpha: float

    def __init__(
        self, alpha: float = 2.0, k: float = 1.0, *, k_bounds: tuple[float, float] = (0.5, 5.0), spiking: bool = True
    ) -> None:
        alpha, k = check_positive("alpha", alpha), check_number("k", k)
        low, high = check_bounds("k_bounds", k_bounds)
        if not low <= k <= high:
            raise ValueError(f"k: expected a value within k_bounds [{low}, {high}], got {k!r}")
        _compat.init_surrogate(self, spiking, alpha=alpha, k=nn.Parameter(torch.tensor(k)))
        self.k_bounds = (low, high)

    def forward(self, x: Tensor) -> Tensor:
        # At infinity the derivative with respect to k, x g'(kx), is 0. The clamp makes x finite, as infinity times 0
        # would be NaN.
        finfo = torch.finfo(x.dtype)
        scaled = clamped_through(self.k, *self.k_bounds) * x.clamp(finfo.min, finfo.max)
        function = self.spiking_function if self.spiking else self.primitive_function
        return function(scaled, self.alpha)

    @staticmethod
    def spiking_function(x: Tensor, alpha: float) -> Tensor:
        return upstream.ATan.spiking_function(x, alpha)

    @staticmethod
    def primitive_function(x: Tensor, alpha: float) -> Tensor:
        return torch.atan(math.pi / 2 * alpha * x) / math.pi + 0.5

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, k_bounds={self.k_bounds}, spiking={self.spiking}"

    def cuda_code(self, x: str, y: str, dtype: str = "fp32") -> str:
        """Refuse: SpikingJelly 0.0.0.0.14 calls this for its own CuPy neurons, whose kernels have no gradient for k."""
        raise self._no_upstream_kernel()

    def cuda_codes(self, y: str, x: str, dtype: str) -> str:
        """Refuse as :meth:`cuda_code` does."""
        raise self._no_upstream_kernel()

    @staticmethod
    def _no_upstream_kernel() -> Exception:
        return NotImplementedError(
            "LearnableATan cannot serve SpikingJelly's own CuPy neurons: their kernels would silently drop the "
            "gradient of k. Use backend='torch' for this neuron, or a klif_sj neuron, whose kernels compute it."
        )


class _RectFire(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * (ctx.alpha * (x.abs() < 0.5 / ctx.alpha).to(x)), None


class Rect(upstream.SurrogateFunctionBase):
    r"""Rectangular surrogate, the same function as SpikingJelly 2's ``Rect``, which 0.0.0.0.14 lacks.

    .. math::
        g'(x) = \alpha \;\text{ if } |x| < \tfrac{1}{2\alpha}, \text{ else } 0, \qquad
        g(x) = \mathrm{clip}(\alpha x + \tfrac12, 0, 1)

    With :math:`\alpha = 1` it is the rectangle of the CLIF authors, except at the points exactly on its edges.

    :param alpha: height of the window and inverse of its width, positive
    :param spiking: False gives the primitive function

    Shape: any shape and floating-point dtype; the output has those of the input.
    """

    alpha: float

    def __init__(self, alpha: float = 1.0, spiking: bool = True) -> None:
        _compat.init_surrogate(self, spiking, alpha=check_positive("alpha", alpha))

    @staticmethod
    def spiking_function(x: Tensor, alpha: float) -> Tensor:
        return _RectFire.apply(x, alpha)

    @staticmethod
    def primitive_function(x: Tensor, alpha: float) -> Tensor:
        return torch.clamp(alpha * x + 0.5, 0.0, 1.0)
