"""Final states that a training call leaves to be computed when they are read: mostly nobody does before the reset."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from operator import attrgetter

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import _disable_current_modes

_saved_tensor_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: True)
"""Whether what autograd saves goes elsewhere. An older torch cannot say, so there they might always be."""

WORTHWHILE = 1 << 22
"""Elements of x from which on states wait: to put off those of a smaller call takes longer than to write them."""

_version = attrgetter("_version")  # it only ever grows


def can_wait(x_seq: Tensor) -> bool:
    """Whether the input of a call will still be what it is when its final states are read.

    So it must be a result that only this graph has. A leaf, or a view of one, may be a buffer that is filled anew; a
    Python function, such as a compiled or CUDA-graphed part of a network, may return memory that it uses again. Nor
    should x be kept where autograd's saved tensors are not, as in activation checkpointing.
    """
    if x_seq.numel() < WORTHWHILE or _saved_tensor_hooks(True) or torch._C._len_torch_dispatch_stack():
        return False
    whole = _whole(x_seq)
    if type(x_seq) is not Tensor or whole.is_leaf or isinstance(whole.grad_fn, BackwardCFunction):
        return False
    return not (x_seq.is_cuda and torch.cuda.is_current_stream_capturing())


def _whole(tensor: Tensor) -> Tensor:
    """The tensor that this one is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


class PendingStates:
    """Gives the final states of a call their values: runs its kernel again, on the same inputs.

    The states are the call's own outputs, so they have their place in the graph whether they are computed or not.
    """

    __slots__ = ("_inputs", "_states", "_stream", "_versions")

    def __init__(
        self, states: Sequence[Tensor], program: str, x_seq: Tensor, initial_value: Sequence[float],
        parameters: Sequence[Tensor], channel_dim: int | None,
    ) -> None:  # fmt: skip
        self._states = states
        # A leaf may be a parameter before the optimizer's step: what it is now counts.
        parameters = [p.detach().clone() if _whole(p).is_leaf else p for p in parameters]
        self._inputs = program, x_seq, initial_value, parameters, channel_dim
        self._versions = sum(map(_version, (x_seq, *parameters)))
        self._stream = torch.cuda.current_stream(x_seq.device) if x_seq.is_cuda else None

    def __call__(self) -> None:
        """Compute.

        :raises RuntimeError: if an input of the call has been changed in place, or a CUDA graph is being captured
        """
        _, x_seq, _, parameters, _ = self._inputs
        if sum(map(_version, (x_seq, *parameters))) != self._versions:
            raise RuntimeError(
                "a neuron's states after a training call are computed when they are first read, but the input of that "
                "call has been changed in place since; read the states before, reset them, or change a copy"
            )
        from .op import final_states  # by then it is

        with ExitStack() as contexts:
            for context in (torch.inference_mode(False), torch.no_grad(), _disable_current_modes()):
                contexts.enter_context(context)
            if self._stream is not None:
                if torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        "a neuron's states after a training call are computed when they are first read, which a CUDA "
                        "graph cannot capture; read them, or reset the neuron, before the capture"
                    )
                contexts.enter_context(torch.cuda.stream(self._stream))
            found = final_states(*self._inputs)
            for state, value in zip(self._states, found, strict=True):
                state.data = value
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
