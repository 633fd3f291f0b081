"""The operators: a program run over a sequence, and its gradient, for autograd, torch.compile and CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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


def _listed(program: Program, x_seq: Tensor, outputs: Outputs) -> list[Tensor]:
    """Outputs as the operator returns them: none of them missing."""
    spikes, ends, checkpoints, sequences = outputs
    if checkpoints is None:
        shape = (0, len(program.states), math.prod(x_seq.shape[1:]))
        checkpoints = x_seq.new_empty(shape, dtype=getattr(torch, program.dtype))
    return [spikes, *ends, checkpoints, *sequences]


def _fake_forward(
    program: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], channel_dim: int | None, checkpoints: int, record: bool, final: bool,
) -> list[Tensor]:  # fmt: skip
    decoded, strides = Program.decode(program), step_strides(x_seq.shape, x_seq.stride())
    return _listed(decoded, x_seq, _outputs(decoded, strides, x_seq, checkpoints, record, final))


def _forward(
    program: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], channel_dim: int | None, checkpoints: int, record: bool, final: bool,
) -> Outputs:  # fmt: skip
    plan, target = plan_of(program, x_seq, channel_dim, record, backward=False), target_of(x_seq)
    if checkpoints not in (0, wanted := (plan.kernel.steps - 1) // target.segment(plan.kernel.program)):
        raise RuntimeError(
            f"klif_sj::forward: expected 0 or {wanted} checkpoints for {plan.kernel.steps} steps, got {checkpoints}; "
            "the caller was compiled by another version of klif_sj, compile it again"
        )
    outputs = _outputs(plan.kernel.program, plan.strides, x_seq, checkpoints, record, final, target.empty)
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


def _forward_operator(program: str, x_seq: Tensor, *rest: Any) -> list[Tensor]:
    return _listed(Program.decode(program), x_seq, _forward(program, x_seq, *rest))


Gradients = tuple[Tensor | None, list[Tensor], list[Tensor]]
"""Of x where it is wanted, of the initial states, and of the learned parameters."""


def _gradients(
    program: Program, strides: tuple[int, ...], x_seq: Tensor, initial: Sequence[Tensor], need_x: bool,
    empty: Empty = empty,
) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
    """Uninitialised gradients of x and of the initial states. Sizes may be symbolic."""
    shape, step = tuple(x_seq.shape), tuple(x_seq.shape[1:])
    grad_x = empty(x_seq, shape, (math.prod(step), *strides), x_seq.dtype) if need_x else None
    return grad_x, [empty(x_seq, step, strides, getattr(torch, program.dtype)) for _ in initial]


def _fake_backward(
    program: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], checkpoints: Tensor, grad_spikes: Tensor | None,
    grad_final: Sequence[Tensor | None], grad_sequences: Sequence[Tensor | None], channel_dim: int | None, need_x: bool,
) -> list[Tensor]:  # fmt: skip
    decoded = Program.decode(program)
    grad_x, grad_initial = _gradients(decoded, step_strides(x_seq.shape, x_seq.stride()), x_seq, initial, need_x)
    pairs = zip(parameters, decoded.parameters, strict=True)
    grad_parameters = [tensor.new_empty(tensor.shape) for tensor, p in pairs if p.learned]
    return [*([] if grad_x is None else [grad_x]), *grad_initial, *grad_parameters]


def _backward(
    program: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], checkpoints: Tensor | None, grad_spikes: Tensor | None,
    grad_final: Sequence[Tensor | None], grad_sequences: Sequence[Tensor | None], channel_dim: int | None, need_x: bool,
) -> Gradients:  # fmt: skip
    record = any(grad is not None for grad in grad_sequences)
    plan, target = plan_of(program, x_seq, channel_dim, record, backward=True), target_of(x_seq)
    grad_x, grad_initial = _gradients(plan.kernel.program, plan.strides, x_seq, initial, need_x, target.empty)
    neurons = plan.geometry.neurons
    sums = (x_seq.new_empty if neurons else x_seq.new_zeros)(plan.sums, dtype=plan.dtype)
    if neurons:
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


def _backward_operator(*inputs: Any) -> list[Tensor]:
    grad_x, grad_initial, grad_parameters = _backward(*inputs)
    copies = [grad.clone() for grad in grad_parameters]  # what an operator returns must not share memory
    return [*([] if grad_x is None else [grad_x]), *grad_initial, *copies]


def _recorded(plan: Plan, grad: Tensor | None, x: Tensor) -> Tensor:
    """The gradient of a recorded state, steps one after the other; zeros where there is none."""
    full = empty_sequence(x, x.shape[0], plan.strides, plan.dtype)
    return full.zero_() if grad is None else full.copy_(grad)


def target_of(tensor: Tensor) -> ModuleType:
    """The module that launches kernels where a tensor is. A fake kernel cannot ask: its tensors are nowhere."""
    return cuda if tensor.is_cuda else cpu


def _segment(target: ModuleType, text: str) -> int:
    steps: int = target.segment(Program.decode(text))
    return steps


_segment._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run_program(
    text: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float], parameters: Sequence[Tensor],
    channel_dim: int | None, learns: bool, record: bool, final: bool,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:  # fmt: skip
    """Spikes, final states and recorded states: the forward operator, with its gradient.

    Without ``final`` the final states have no values, nor memory: only their shape, and their place in the graph.
    """
    checkpoints = (x_seq.shape[0] - 1) // _segment(target_of(x_seq), text) if learns else 0
    inputs = (text, x_seq, initial, initial_value, parameters, channel_dim, checkpoints, record, final)
    states = len(initial) + len(initial_value)
    if torch.compiler.is_compiling():
        spikes, ends, _, sequences = _unlisted(torch.ops.klif_sj.forward(*inputs), states * final)
    elif not learns and forward_ad._current_level < 0:
        spikes, ends, _, sequences = _run_forward(*inputs)
    else:
        # One argument for all that is no tensor, as torch looks at each.
        spikes, *others = _apply((inputs, len(initial)), x_seq, *initial, *parameters)
        ends, sequences = others[:states], others[states:]
    return spikes, ends, sequences


def final_states(
    text: str, x_seq: Tensor, initial_value: Sequence[float], parameters: Sequence[Tensor], channel_dim: int | None
) -> list[Tensor]:
    """The final states that :func:`run_program` without ``final`` left out, from the same kernel; outside autograd."""
    return _run_forward(text, x_seq, [], initial_value, parameters, channel_dim, 0, False, True)[1]


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def _unwatched(x_seq: Tensor, *tensors: Tensor | None) -> bool:
    """Whether nobody minds that an operator's implementation is called itself, at half the cost.

    A subclass of Tensor has its own idea of an operator, and perhaps no memory.
    """
    watched = (
        torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled() or torch._C._get_tracing_state()
    )
    return not watched and _PLAIN.issuperset(map(type, (x_seq, *tensors))) and (x_seq.is_cpu or x_seq.is_cuda)


def _run_forward(
    program: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], channel_dim: int | None, checkpoints: int, record: bool, final: bool,
) -> Outputs:  # fmt: skip
    """The forward operator, below autograd."""
    inputs = (program, x_seq, initial, initial_value, parameters, channel_dim, checkpoints, record, final)
    if _unwatched(x_seq, *initial, *parameters):
        return _forward(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        listed = torch.ops.klif_sj.forward(*inputs)
    spikes, ends, saved, sequences = _unlisted(listed, (len(initial) + len(initial_value)) * final)
    # As without a watcher: activation checkpointing counts what is saved, and may watch but one of two passes.
    return spikes, ends, saved if checkpoints else None, sequences


def _unlisted(listed: list[Tensor], ends: int) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """What the operator returns, told apart: with so many final states."""
    return listed[0], listed[1 : 1 + ends], listed[1 + ends], listed[2 + ends :]


class _Eager(torch.autograd.Function):
    """What ``register_autograd`` does for the forward operator, at a fraction of its cost a call."""

    @staticmethod
    def forward(ctx: Any, asked: tuple[Any, ...], x_seq: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        (program, _, _, initial_value, _, channel_dim, checkpoints, record, final), n_initial = asked
        # Those that torch hands on: it tells the graph's inputs by them.
        initial, parameters = tensors[:n_initial], tensors[n_initial:]
        spikes, ends, saved, sequences = _run_forward(
            program, x_seq, initial, initial_value, parameters, channel_dim, checkpoints, record, final
        )
        if not final:
            decoded, shape = Program.decode(program), x_seq.shape[1:]
            dtype, strides = getattr(torch, decoded.dtype), (0,) * len(shape)
            ends = [empty(x_seq, shape, strides, dtype) for _ in decoded.states]
        ctx.set_materialize_grads(False)
        ctx.about = program, initial_value, channel_dim, n_initial, len(ends)
        ctx.save_for_backward(x_seq, saved, *tensors)
        return spikes, *ends, *sequences

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ends = 1 + ctx.about[-1]
        grad_x, grad_initial, grad_parameters = _gradients_of(ctx, grads[0], grads[1:ends], grads[ends:])
        return None, grad_x, *grad_initial, *grad_parameters


# torch.autograd.Function's own also looks at every argument for torch.func, within whose transforms no kernel runs.
_apply = super(torch.autograd.Function, _Eager).apply


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    program, x_seq, initial, initial_value, parameters, channel_dim, _, _, final = inputs
    ends = (len(initial) + len(initial_value)) * final
    ctx.about = program, initial_value, channel_dim, len(initial), ends
    ctx.save_for_backward(x_seq, output[1 + ends], *initial, *parameters)


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    ends = 1 + ctx.about[-1]
    grad_x, grad_initial, grad_parameters = _gradients_of(ctx, grads[0], grads[1:ends], grads[ends + 1 :])
    # torch compares the structure of what comes back with the inputs': an empty list of numbers counts as a list.
    initial_value = ctx.about[1]
    return None, grad_x, grad_initial, None if initial_value else [], grad_parameters, *(None,) * 4


def _gradients_of(
    ctx: Any, grad_spikes: Tensor | None, grad_final: Sequence[Tensor | None], grad_sequences: Sequence[Tensor | None]
) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:
    """Gradients of x, of the initial states, and of the parameters, from those of the forward operator's outputs."""
    program, initial_value, channel_dim, n_initial, _ = ctx.about
    saved = ctx.saved_tensors  # once: activation checkpointing computes them again
    x_seq, checkpoints, *tensors = saved
    need_x = ctx.needs_input_grad[1]
    inputs = (
        program, x_seq, tensors[:n_initial], initial_value, tensors[n_initial:], checkpoints, grad_spikes, grad_final,
        grad_sequences, channel_dim, need_x,
    )  # fmt: skip
    if not torch.is_grad_enabled() and _unwatched(*saved, grad_spikes, *grad_final, *grad_sequences):
        grad_x, grad_initial, found = _backward(*inputs)
    else:
        grad_x, grad_initial, found = _watched_backward(*inputs)
    grads = iter(found)
    parameters = Program.decode(program).parameters
    return grad_x, grad_initial, [next(grads) if p.learned else None for p in parameters]


def _watched_backward(
    program: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], checkpoints: Tensor | None, *rest: Any,
) -> Gradients:  # fmt: skip
    """The backward operator: below autograd, except with ``create_graph``, where its own refuses a derivative."""
    if checkpoints is None:
        checkpoints = x_seq.new_empty(0)
    inputs = (program, x_seq, initial, initial_value, parameters, checkpoints, *rest)
    with nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd():
        found = iter(torch.ops.klif_sj.backward(*inputs))
    return next(found) if rest[-1] else None, [next(found) for _ in initial], list(found)


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
