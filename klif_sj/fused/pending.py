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


def can_wait(x_seq: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether the inputs of a call will still be what they are when its final states are read.

    So they must be results that only this graph has. A leaf, or a view of one, may be a buffer that is filled anew or a
    parameter before the optimizer's step; a Python function, such as a compiled or CUDA-graphed part of a network, may
    return memory that it uses again. Nor should x be kept where autograd's saved tensors are not, as in activation
    checkpointing.
    """
    if x_seq.numel() < WORTHWHILE or _saved_tensor_hooks(True) or torch._C._len_torch_dispatch_stack():
        return False
    for tensor in (*parameters, x_seq):
        base = tensor._base
        whole = tensor if base is None else base
        if whole.is_leaf or type(tensor) is not Tensor:
            return False
    return not isinstance(whole.grad_fn, BackwardCFunction) and not (
        x_seq.is_cuda and torch.cuda.is_current_stream_capturing()
    )


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
