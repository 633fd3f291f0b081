"""The operators: a program run over a sequence, and its gradient, for torch.compile, exported programs and watchers.

Eager code has a shorter way to the same implementations (``autograd.py``). Programs cross an operator's boundary as
text, so that a compiled graph that outlives this process can still build its kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..codegen.kernel import Kernel
from ..codegen.program import Program
from . import cpu, cuda
from .launch import Call
from .layout import Empty, empty, empty_sequence, step_strides, with_layout
from .scan import Plan, plan_of

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

Outputs = tuple[Tensor, list[Tensor], Tensor | None, list[Tensor]]
"""Spikes, final states, checkpoints where a sequence has any, and recorded states."""

Gradients = tuple[Tensor | None, list[Tensor], list[Tensor]]
"""Of x where it is wanted, of the initial states, and of the learned parameters."""


class Target(Protocol):
    """What launches kernels on one kind of device: the modules ``cpu`` and ``cuda``."""

    def segment(self, program: Program) -> int:
        """How many steps of a program a kernel takes at a time; states are saved in between."""

    def empty(self, like: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory on the tensor's device, for a kernel to write."""

    def launch(self, kernel: Kernel, call: Call) -> None:
        """Run a kernel, compiled if it has not been yet, on the tensors of a call."""


def target_of(tensor: Tensor) -> Target:
    """What launches kernels where a tensor is. A fake kernel cannot ask: its tensors are nowhere."""
    return cuda if tensor.is_cuda else cpu


def forward(
    program: Program, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], channel_dim: int | None, checkpoints: int, record: bool, final: bool,
) -> Outputs:  # fmt: skip
    """Launch a program over a sequence ``[T, N, *]``.

    :param initial: states ``[N, *]`` to start from; where it is empty, ``initial_value`` are their numbers
    :param checkpoints: states to save for the gradient: as many as the target has segments after the first, or 0
    :param record: whether the states at every step are wanted
    :param final: whether the final states are wanted
    """
    plan, target = plan_of(program, x_seq, channel_dim, record, backward=False), target_of(x_seq)
    if checkpoints not in (0, wanted := (plan.kernel.steps - 1) // target.segment(program)):
        raise RuntimeError(
            f"klif_sj::forward: expected 0 or {wanted} checkpoints for {plan.kernel.steps} steps, got {checkpoints}; "
            "the caller was compiled by another version of klif_sj, compile it again"
        )
    outputs = _outputs(program, plan.strides, x_seq, checkpoints, record, final, target.empty)
    if plan.geometry.neurons:
        spikes, ends, saved, sequences = outputs
        call = Call(
            geometry=plan.geometry,
            x=with_layout(x_seq, plan.strides),
            parameters=[tensor.contiguous() for tensor in parameters],
            neighbours=plan.neighbours,
            initial=[plan.state(state) for state in initial],
            initial_value=initial_value,
            spikes=spikes,
            final=ends,
            checkpoints=saved,
            sequences=sequences,
        )
        target.launch(plan.kernel, call)
    return outputs


def backward(
    program: Program, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], checkpoints: Tensor | None, grad_spikes: Tensor | None,
    grad_final: Sequence[Tensor | None], grad_sequences: Sequence[Tensor | None], channel_dim: int | None, need_x: bool,
) -> Gradients:  # fmt: skip
    """Launch a program's gradient, from the gradients of what :func:`forward` returned; None stands for zeros."""
    record = any(grad is not None for grad in grad_sequences)
    plan, target = plan_of(program, x_seq, channel_dim, record, backward=True), target_of(x_seq)
    grad_x, grad_initial = _gradients(program, plan.strides, x_seq, initial, need_x, target.empty)
    neurons = plan.geometry.neurons
    sums = (x_seq.new_empty if neurons else x_seq.new_zeros)(plan.sums, dtype=plan.kernel.real)
    if neurons:
        saved = (plan.kernel.steps - 1) // target.segment(program) * len(program.states) * neurons
        if checkpoints is not None and checkpoints.numel() != saved:
            raise ValueError(f"klif_sj::backward: expected {saved} saved states, got {checkpoints.numel()}")
        x = with_layout(x_seq, plan.strides)
        call = Call(
            geometry=plan.geometry,
            x=x,
            parameters=[tensor.contiguous() for tensor in parameters],
            neighbours=plan.neighbours,
            initial=[plan.state(state) for state in initial],
            initial_value=initial_value,
            checkpoints=checkpoints,
            grad_spikes=torch.zeros_like(x) if grad_spikes is None else with_layout(grad_spikes, plan.strides),
            grad_final=[plan.state(grad) for grad in grad_final],
            grad_sequences=[_recorded(plan, grad, x) for grad in grad_sequences] if record else (),
            grad_x=grad_x,
            grad_initial=grad_initial,
            grad_parameters=sums,
        )
        target.launch(plan.kernel, call)
    return grad_x, grad_initial, plan.parameter_gradients(sums)


def _outputs(
    program: Program, strides: tuple[int, ...], x_seq: Tensor, saved: int, record: bool, final: bool,
    empty: Empty = empty,
) -> Outputs:  # fmt: skip
    """The outputs of a forward launch, with so many checkpoints, uninitialised. Sizes may be symbolic."""
    dtype, states = getattr(torch, program.dtype), len(program.states)
    shape = tuple(x_seq.shape)
    step, neurons = shape[1:], math.prod(shape[1:])
    spikes = empty(x_seq, shape, (neurons, *strides), x_seq.dtype)
    ends = [empty(x_seq, step, strides, dtype) for _ in range(states)] if final else []
    none = isinstance(saved, int) and saved == 0  # a symbolic number is not looked at
    checkpoints = None if none else x_seq.new_empty((saved, states, neurons), dtype=dtype)
    sequences = [empty(x_seq, shape, (neurons, *strides), dtype) for _ in range(states)] if record else []
    return spikes, ends, checkpoints, sequences


def _gradients(
    program: Program, strides: tuple[int, ...], x_seq: Tensor, initial: Sequence[Tensor], need_x: bool,
    empty: Empty = empty,
) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
    """Uninitialised gradients of x and of the initial states. Sizes may be symbolic."""
    shape, step = tuple(x_seq.shape), tuple(x_seq.shape[1:])
    grad_x = empty(x_seq, shape, (math.prod(step), *strides), x_seq.dtype) if need_x else None
    return grad_x, [empty(x_seq, step, strides, getattr(torch, program.dtype)) for _ in initial]


def _recorded(plan: Plan, grad: Tensor | None, x: Tensor) -> Tensor:
    """The gradient of a recorded state, steps one after the other; zeros where there is none."""
    full = empty_sequence(x, x.shape[0], plan.strides, plan.kernel.real)
    return full.zero_() if grad is None else full.copy_(grad)


# The operators, which take text and return lists.


def listed(program: Program, x_seq: Tensor, outputs: Outputs) -> list[Tensor]:
    """Outputs as the operator returns them: none of them missing."""
    spikes, ends, checkpoints, sequences = outputs
    if checkpoints is None:
        shape = (0, len(program.states), math.prod(x_seq.shape[1:]))
        checkpoints = x_seq.new_empty(shape, dtype=getattr(torch, program.dtype))
    return [spikes, *ends, checkpoints, *sequences]


def unlisted(found: list[Tensor], ends: int) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """What the operator returns, told apart: with so many final states."""
    return found[0], found[1 : 1 + ends], found[1 + ends], found[2 + ends :]


def _forward_operator(text: str, x_seq: Tensor, *rest: Any) -> list[Tensor]:
    program = Program.decode(text)
    return listed(program, x_seq, forward(program, x_seq, *rest))


def _fake_forward(
    text: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], channel_dim: int | None, checkpoints: int, record: bool, final: bool,
) -> list[Tensor]:  # fmt: skip
    program, strides = Program.decode(text), step_strides(x_seq.shape, x_seq.stride())
    return listed(program, x_seq, _outputs(program, strides, x_seq, checkpoints, record, final))


def _backward_operator(text: str, *rest: Any) -> list[Tensor]:
    grad_x, grad_initial, grad_parameters = backward(Program.decode(text), *rest)
    copies = [grad.clone() for grad in grad_parameters]  # what an operator returns must not share memory
    return [*([] if grad_x is None else [grad_x]), *grad_initial, *copies]


def _fake_backward(
    text: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], checkpoints: Tensor, grad_spikes: Tensor | None,
    grad_final: Sequence[Tensor | None], grad_sequences: Sequence[Tensor | None], channel_dim: int | None, need_x: bool,
) -> list[Tensor]:  # fmt: skip
    program = Program.decode(text)
    grad_x, grad_initial = _gradients(program, step_strides(x_seq.shape, x_seq.stride()), x_seq, initial, need_x)
    pairs = zip(parameters, program.parameters, strict=True)
    grad_parameters = [tensor.new_empty(tensor.shape) for tensor, p in pairs if p.learned]
    return [*([] if grad_x is None else [grad_x]), *grad_initial, *grad_parameters]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    text, x_seq, initial, initial_value, parameters, channel_dim, _, _, final = inputs
    ctx.ends = (len(initial) + len(initial_value)) * final
    ctx.settings = text, len(initial), initial_value, channel_dim
    ctx.save_for_backward(x_seq, output[1 + ctx.ends], *initial, *parameters)


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    text, n_initial, initial_value, channel_dim = ctx.settings
    x_seq, checkpoints, *tensors = ctx.saved_tensors
    found = iter(
        torch.ops.klif_sj.backward(
            text, x_seq, tensors[:n_initial], initial_value, tensors[n_initial:], checkpoints, grads[0],
            grads[1 : 1 + ctx.ends], grads[2 + ctx.ends :], channel_dim, ctx.needs_input_grad[1],
        )
    )  # fmt: skip
    grad_x = next(found) if ctx.needs_input_grad[1] else None
    grad_initial = [next(found) for _ in range(n_initial)]
    grad_parameters = [next(found) if p.learned else None for p in Program.decode(text).parameters]
    # torch compares the structure of what comes back with the inputs': an empty list of numbers counts as a list.
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
    _library.impl(_name, _fake, "Meta")  # register_fake would do, but looks through every loaded module for its caller
torch.library.register_autograd("klif_sj::forward", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("klif_sj::backward", _refuse_double_backward, lib=_library)
