"""The operators that run a program, and its gradient, for torch.compile, exported programs and profilers.

Eager code calls the same implementations directly (``autograd.py``). Programs cross an operator's boundary as text, so
a compiled graph that outlives this process can still build its kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..codegen.program import Program
from .layout import empty, step_strides
from .scan import Outputs, scan_of

_library = torch.library.Library("klif_sj", "DEF")
_tags = (torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))
_library.define(
    "forward(str program, Tensor x_seq, Tensor[] initial, float[] initial_value, Tensor[] parameters, "
    "int? channel_dim, SymInt checkpoints, bool record, bool final) -> Tensor[]",
    tags=_tags,
)
_library.define(
    "backward(str program, Tensor x_seq, Tensor[] initial, float[] initial_value, Tensor[] parameters, "
    "Tensor checkpoints, Tensor? grad_spikes, Tensor?[] grad_final, Tensor?[] grad_sequences, "
    "int? channel_dim, bool need_x) -> Tensor[]",
    tags=_tags,
)


def _outputs(
    program: Program, strides: tuple[int, ...], x_seq: Tensor, saved: int, record: bool, final: bool
) -> Outputs:
    """The uninitialised outputs of a forward launch that saves ``saved`` checkpoints. Sizes may be symbolic."""
    dtype, states = getattr(torch, program.dtype), len(program.states)
    shape = tuple(x_seq.shape)
    step, neurons = shape[1:], math.prod(shape[1:])
    spikes = empty(x_seq, shape, (neurons, *strides), x_seq.dtype)
    ends = [empty(x_seq, step, strides, dtype) for _ in range(states)] if final else []
    none = isinstance(saved, int) and saved == 0  # a symbolic number is not compared
    checkpoints = None if none else x_seq.new_empty((saved, states, neurons), dtype=dtype)
    sequences = [empty(x_seq, shape, (neurons, *strides), dtype) for _ in range(states)] if record else []
    return spikes, ends, checkpoints, sequences


def listed(program: Program, x_seq: Tensor, outputs: Outputs) -> list[Tensor]:
    """Outputs as the operator returns them: checkpoints that are None become an empty tensor."""
    spikes, ends, checkpoints, sequences = outputs
    if checkpoints is None:
        shape = (0, len(program.states), math.prod(x_seq.shape[1:]))
        checkpoints = x_seq.new_empty(shape, dtype=getattr(torch, program.dtype))
    return [spikes, *ends, checkpoints, *sequences]


def unlisted(outputs: list[Tensor], ends: int) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """Split what the operator returns, which has ``ends`` final states, into the four kinds of outputs."""
    return outputs[0], outputs[1 : 1 + ends], outputs[1 + ends], outputs[2 + ends :]


def _forward_operator(text: str, x_seq: Tensor, *arguments: Any) -> list[Tensor]:
    program = Program.decode(text)
    initial, initial_value, parameters, channel_dim, *settings = arguments
    scan = scan_of(program, x_seq, initial, parameters, channel_dim)
    return listed(program, x_seq, scan.forward(x_seq, initial, initial_value, parameters, *settings))


def _fake_forward(
    text: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], channel_dim: int | None, checkpoints: int, record: bool, final: bool,
) -> list[Tensor]:  # fmt: skip
    program, strides = Program.decode(text), step_strides(x_seq.shape, x_seq.stride())
    return listed(program, x_seq, _outputs(program, strides, x_seq, checkpoints, record, final))


def _backward_operator(
    text: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], checkpoints: Tensor, grad_spikes: Tensor | None,
    grad_final: Sequence[Tensor | None], grad_sequences: Sequence[Tensor | None], channel_dim: int | None, need_x: bool,
) -> list[Tensor]:  # fmt: skip
    grad_x, grad_initial, grad_parameters = scan_of(
        Program.decode(text), x_seq, initial, parameters, channel_dim
    ).backward(
        x_seq, initial, initial_value, parameters, checkpoints, grad_spikes, grad_final, grad_sequences, need_x
    )  # fmt: skip
    copies = [grad.clone() for grad in grad_parameters]  # what an operator returns must not share memory
    return [*([] if grad_x is None else [grad_x]), *grad_initial, *copies]


def _fake_backward(
    text: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], checkpoints: Tensor, grad_spikes: Tensor | None,
    grad_final: Sequence[Tensor | None], grad_sequences: Sequence[Tensor | None], channel_dim: int | None, need_x: bool,
) -> list[Tensor]:  # fmt: skip
    program, strides = Program.decode(text), step_strides(x_seq.shape, x_seq.stride())
    step = tuple(x_seq.shape[1:])
    grad_x = [empty(x_seq, tuple(x_seq.shape), (math.prod(step), *strides), x_seq.dtype)] if need_x else []
    grad_initial = [empty(x_seq, step, strides, getattr(torch, program.dtype)) for _ in initial]
    pairs = zip(parameters, program.parameters, strict=True)
    return [*grad_x, *grad_initial, *(tensor.new_empty(tensor.shape) for tensor, p in pairs if p.learned)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    text, x_seq, initial, initial_value, parameters, channel_dim, _, _, final = inputs
    ctx.ends = (len(initial) + len(initial_value)) * final
    ctx.settings = text, len(initial), initial_value, channel_dim
    ctx.save_for_backward(x_seq, output[1 + ctx.ends], *initial, *parameters)


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    text, n_initial, initial_value, channel_dim = ctx.settings
    x_seq, checkpoints, *tensors = ctx.saved_tensors
    results = iter(
        torch.ops.klif_sj.backward(
            text, x_seq, tensors[:n_initial], initial_value, tensors[n_initial:], checkpoints, grads[0],
            grads[1 : 1 + ctx.ends], grads[2 + ctx.ends :], channel_dim, ctx.needs_input_grad[1],
        )
    )  # fmt: skip
    grad_x = next(results) if ctx.needs_input_grad[1] else None
    grad_initial = [next(results) for _ in range(n_initial)]
    grad_parameters = [next(results) if p.learned else None for p in Program.decode(text).parameters]
    # torch compares the structure of the gradients with that of the inputs: an empty list of numbers counts as a list.
    return None, grad_x, grad_initial, None if initial_value else [], grad_parameters, *(None,) * 4


def _refuse_double_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise NotImplementedError(
        "fused kernels have no second derivative; use backend='torch' for a neuron whose gradient is differentiated"
    )


for _name, _implementation, _fake in (
    ("forward", _forward_operator, _fake_forward),
    ("backward", _backward_operator, _fake_backward),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _key)
    _library.impl(_name, _fake, "Meta")  # register_fake would look through every loaded module for its caller
torch.library.register_autograd("klif_sj::forward", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("klif_sj::backward", _refuse_double_backward, lib=_library)
