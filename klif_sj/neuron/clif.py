"""CLIF (ICML 2024): a leaky integrate-and-fire neuron with a second, complementary membrane potential."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import check_bool, check_tau
from ..surrogate import Rect
from .base import FusedNode
from .parameters import soft_reset_depth


class CLIFNode(FusedNode):
    r"""Complementary leaky integrate-and-fire neuron.

    .. math::
        U[t] &= (1 - 1/\tau) V[t-1] + V_{reset}/\tau + X[t]     && \text{decay\_input: } X[t]/\tau \\
        S[t] &= \Theta(U[t] - V_{th}) \\
        M[t] &= M[t-1]\, \sigma(U[t]/\tau) + S[t] \\
        V[t] &= U[t] - S[t] (V_{th} + \sigma(M[t]))             && \text{soft reset, } V_{reset} \text{ None} \\
        V[t] &= U[t] (1 - S[t]) + V_{reset} S[t] - S[t]\, \sigma(M[t])  && \text{hard reset}

    Where :math:`V_{reset}` is None, the potential leaks towards 0.

    The complementary potential M remembers recent spikes: the more of them, the deeper the reset. It has no parameter
    and no threshold, and carries a gradient over long times because its decay :math:`\sigma(U/\tau)` follows U.

    The states are ``v`` (V, :math:`V_{reset}` or 0 at first) and ``m`` (M, 0 at first). Both carry gradients, in eval
    mode too.

    Source: Huang et al., "CLIF: Complementary leaky integrate-and-fire neuron for spiking neural networks", ICML 2024,
    with the defaults of the authors' code. SpikingJelly 2's ``ComplementaryLIFNode`` is this neuron with the soft
    reset; it has no parameters either, so checkpoints load both ways.

    :param tau: membrane time constant in time steps, above 1
    :param decay_input: whether the input decays as well
    :param v_threshold: threshold; with ``math.inf`` the neuron never fires
    :param v_reset: reset potential, or None for the paper's soft reset
    :param surrogate_function: None makes a new ``Rect(alpha=1)``, the authors' surrogate
    :param detach_reset: whether the gradient through the spike in the updates of M and V, the reset, is cut
    :param step_mode: ``'s'``, ``[N, *]``, or ``'m'``, ``[T, N, *]``
    :param backend: ``'auto'``, ``'torch'``, ``'cpp'`` or ``'cupy'``
    :param store_v_seq: keep V and M at every time step in ``v_seq`` and ``m_seq``
    :param keep_state: False does not keep the final states of multi-step calls; see :class:`FusedNode`

    :raises ValueError: for tau not above 1
    """

    states = ("v", "m")

    m: Tensor

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = False,
        v_threshold: float = 1.0,
        v_reset: float | None = None,
        surrogate_function: Callable | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str = "auto",
        store_v_seq: bool = False,
        *,
        keep_state: bool = True,
    ) -> None:
        super().__init__(
            v_threshold,
            v_reset,
            Rect(alpha=1.0) if surrogate_function is None else surrogate_function,
            detach_reset,
            step_mode,
            backend,
            store_v_seq,
            keep_state=keep_state,
        )
        self.tau = check_tau(tau)
        self.decay_input = check_bool("decay_input", decay_input)

    def neuronal_charge(self, x: Tensor) -> None:
        if self.decay_input:
            x = x / self.tau
        self.v = (1.0 - 1.0 / self.tau) * self.v + x
        if self.v_reset:
            self.v = self.v + self.v_reset / self.tau

    def neuronal_reset(self, spike: Tensor) -> None:
        if self.detach_reset:
            spike = spike.detach()
        self.m = self.m * torch.sigmoid(self.v / self.tau) + spike
        if self.v_reset is None:
            self.v = self.v - spike * (soft_reset_depth(self.v_threshold) + torch.sigmoid(self.m))
        else:
            self.v = (1.0 - spike) * self.v + spike * self.v_reset - spike * torch.sigmoid(self.m)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, decay_input={self.decay_input}, {super().extra_repr()}"
