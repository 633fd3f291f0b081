"""KLIF (arXiv 2302.09238): a leaky integrate-and-fire neuron whose potential is scaled by a learnable k."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_bool, check_choice, check_number, check_tau
from .base import EffectiveParameters, FusedNode
from .parameters import bounded, check_bounds

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "celu": F.celu,
    "leaky_relu": F.leaky_relu,
    "identity": lambda v: v,
}


class KLIFNode(FusedNode):
    r"""k-based leaky integrate-and-fire neuron.

    .. math::
        H[t] &= V[t-1] + (X[t] - (V[t-1] - V_{reset})) / \tau   && \text{decay\_input (Eq. 2)} \\
        H[t] &= V[t-1] - (V[t-1] - V_{reset}) / \tau + X[t]     && \text{not decay\_input} \\
        F[t] &= \mathrm{ReLU}(k H[t])                           && \text{(Eq. 5)} \\
        S[t] &= \Theta(F[t] - V_{th})                           && \text{(Eq. 6)} \\
        V[t] &= F[t] (1 - S[t]) + V_{reset} S[t]                && \text{hard reset (Eq. 7)} \\
        V[t] &= F[t] - V_{th} S[t]                              && \text{soft reset, } V_{reset} \text{ None}

    KLIF* (``scale_reset``, Eq. 10) takes k out of the carried potential: :math:`F/k` in place of :math:`F` in the hard
    reset, :math:`(F - V_{th} S)/k` in the soft one. k is learned by full backpropagation through time, one per layer.

    Source: Jiang and Zhang, "KLIF: An optimized spiking neuron unit for tuning surrogate gradient slope and membrane
    potential", arXiv 2302.09238. The paper's neuron fires at F > V_th; this neuron fires at F >= V_th, as
    SpikingJelly's neurons do.

    :param scale_reset: whether the neuron is KLIF*
    :param tau: membrane time constant in time steps, above 1
    :param decay_input: whether the input decays as well
    :param v_threshold: threshold; with ``math.inf`` the neuron never fires
    :param v_reset: reset potential, or None for a soft reset
    :param surrogate_function: None makes a new ``ATan(alpha=2)``, the paper's surrogate
    :param detach_reset: whether the gradient through the reset's spike is cut
    :param step_mode: ``'s'``, ``[N, *]``, or ``'m'``, ``[T, N, *]``
    :param backend: ``'auto'``, ``'torch'``, ``'cpp'`` or ``'cupy'``
    :param store_v_seq: keep V at every time step in ``v_seq``
    :param activation: what replaces ReLU (Table 5): ``'relu'``, ``'celu'`` (alpha 1), ``'leaky_relu'`` (slope 0.01),
        ``'identity'`` ("only k")
    :param learn_k: False keeps k fixed ("only ReLU"); it stays in the state dict
    :param k_bounds: bounds to which k is clamped in the forward pass; beyond them its gradient never pushes it further
        out. None leaves k unbounded. The paper keeps k in [0.5, 5] and does not say how.
    :param init_k: initial k
    :param keep_state: False does not keep the final states of multi-step calls; see :class:`FusedNode`

    :raises ValueError: for tau not above 1, an unknown activation, invalid bounds, or an initial k outside them
    """

    k: nn.Parameter

    def __init__(
        self,
        scale_reset: bool = False,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str = "auto",
        store_v_seq: bool = False,
        *,
        activation: str = "relu",
        learn_k: bool = True,
        k_bounds: tuple[float, float] | None = (0.5, 5.0),
        init_k: float = 1.0,
        keep_state: bool = True,
    ) -> None:
        super().__init__(
            v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, store_v_seq,
            keep_state=keep_state,
        )  # fmt: skip
        self.scale_reset = check_bool("scale_reset", scale_reset)
        self.tau = check_tau(tau)
        self.decay_input = check_bool("decay_input", decay_input)
        self.activation = check_choice("activation", activation, tuple(ACTIVATIONS))
        self.k_bounds = None if k_bounds is None else check_bounds("k_bounds", k_bounds)
        init_k = check_number("init_k", init_k)
        if self.k_bounds and not self.k_bounds[0] <= init_k <= self.k_bounds[1]:
            raise ValueError(f"init_k: expected a value within k_bounds {self.k_bounds}, got {init_k!r}")
        self.k = nn.Parameter(torch.tensor(init_k), requires_grad=check_bool("learn_k", learn_k))

    def effective_parameters(self) -> EffectiveParameters:
        return {"k": bounded(self.k, *self.k_bounds) if self.k_bounds else self.k}

    def neuronal_charge(self, x: Tensor) -> None:
        v_reset = self.v_reset or 0.0
        if self.decay_input:
            self.v = self.v + (x - (self.v - v_reset)) / self.tau
        else:
            self.v = self.v - (self.v - v_reset) / self.tau + x
        self.v = ACTIVATIONS[self.activation](self.effective.k * self.v)

    def neuronal_reset(self, spike: Tensor) -> None:
        if not self.scale_reset:
            super().neuronal_reset(spike)
        elif self.v_reset is None:
            super().neuronal_reset(spike)
            self.v = self.v / self.effective.k
        else:
            self.v = self.v / self.effective.k
            super().neuronal_reset(spike)

    def extra_repr(self) -> str:
        return (
            f"scale_reset={self.scale_reset}, tau={self.tau}, decay_input={self.decay_input}, {super().extra_repr()}, "
            f"activation={self.activation}, learn_k={self.k.requires_grad}, k_bounds={self.k_bounds}"
        )
