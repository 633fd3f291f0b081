"""The operators: a program run over a sequence, and its gradient, for autograd, torch.compile and CUDA graphs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cuda, host
from .call import Call
from .kernel import Kernel
from .layout import Empty, Geometry, empty, empty_sequence, geometry, step_strides, with_layout
from .program import Program

COLUMN_LIMIT = 32
"""Channels with fewer neurons than this in a row are laid side by side instead (the ``columns`` schedule)."""

_library = torch.library.Library("klif_sj", "DEF")
_tags = (torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))
_library.define(
    "forward(str program, Tensor x_seq, Tensor[] initial, float[] initial_value, Tensor[] parameters, "
    "int? channel_dim, bool checkpoint, bool record, bool final) -> Tensor[]",
    tags=_tags,
)
_library.define(
    "backward(str program, Tensor x_seq, Tensor[] initial, float[] initial_value, Tensor[] parameters, "
    "Tensor checkpoints, Tensor? grad_spikes, Tensor?[] grad_final, Tensor?[] grad_sequences, "
    "int? channel_dim, bool need_x) -> Tensor[]",
    tags=_tags,
)


@dataclass(frozen=True)
class _Plan:
    """What a launch needs to know that depends on shapes alone."""

    kernel: Kernel
    strides: tuple[int, ...]
    geometry: Geometry
    channels: int
    neighbours: int

    def sequence(self, like: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
        return empty_sequence(like, steps, self.strides, dtype)

    def state(self, tensor: Tensor | None) -> Tensor | None:
        """A state, or the gradient of one, in the kernel's layout."""
        return None if tensor is None else with_layout(tensor.unsqueeze(0), self.strides).squeeze(0)

    def parameter_gradients(self, grads: Tensor) -> list[Tensor]:
        """The kernel's sums ``[grads, channels]`` as gradients in the shapes of the learned parameters."""
        learned = self.kernel.program.learned
        counts = [self.kernel.steps if parameter.per_step else 1 for parameter in learned]
        # Copies, as what an operator returns must not share memory; all in one operation.
        parts: list[Tensor] = [grads] * len(learned)
        if len(learned) > 1:
            parts = list(torch.split_with_sizes_copy(grads, counts))  # type: ignore[func-returns-value, call-overload]
        gradients = []
        for rows, count, parameter in zip(parts, counts, learned, strict=True):
            if not parameter.per_channel and self.channels > 1:
                rows = rows.sum(1)
            shape = (*(count,) * parameter.per_step, *(self.channels,) * parameter.per_channel)
            gradients.append(rows.view(shape))
        return gradients


def _plan(text: str, x_seq: Tensor, channel_dim: int | None, record: bool, backward: bool) -> _Plan:
    return _planned(text, tuple(x_seq.shape), x_seq.stride(), x_seq.dtype, channel_dim, record, backward)


@functools.lru_cache(maxsize=4096)
def _planned(
    text: str, shape: tuple[int, ...], x_strides: tuple[int, ...], dtype: torch.dtype, channel_dim: int | None,
    record: bool, backward: bool,
) -> _Plan:  # fmt: skip
    program, strides = Program.decode(text), step_strides(shape, x_strides)
    per_channel = any(p.per_channel for p in program.parameters)
    laid = geometry(shape[1:], strides, channel_dim if per_channel else None)
    columns = laid.channels > 1 and laid.inner < COLUMN_LIMIT
    return _Plan(
        kernel=Kernel(program, shape[0], dtype, columns, record, backward),
        strides=strides,
        geometry=Geometry(laid.outer, laid.channels * laid.inner, 1) if columns else laid,
        channels=laid.channels,
        neighbours=laid.inner if columns else 1,
    )


def _outputs(
    program: Program, strides: tuple[int, ...], x_seq: Tensor, checkpoint: bool, record: bool, final: bool,
    empty: Empty = empty,
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:  # fmt: skip
    """Uninitialised spikes, final states, checkpoints and recorded states. Sizes may be symbolic."""
    dtype, steps, states = getattr(torch, program.dtype), x_seq.shape[0], len(program.states)
    spikes = empty_sequence(x_seq, steps, strides, x_seq.dtype, empty)
    ends = [empty(x_seq, x_seq.shape[1:], strides, dtype) for _ in range(states if final else 0)]
    saved = (steps - 1) // target_of(x_seq).segment(program) if checkpoint else 0
    checkpoints = x_seq.new_empty((saved, states, math.prod(x_seq.shape[1:])), dtype=dtype)
    sequences = [empty_sequence(x_seq, steps, strides, dtype, empty) for _ in range(states if record else 0)]
    return spikes, ends, checkpoints, sequences


def _fake_forward(
    program: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], channel_dim: int | None, checkpoint: bool, record: bool, final: bool,
) -> list[Tensor]:  # fmt: skip
    decoded, strides = Program.decode(program), step_strides(x_seq.shape, x_seq.stride())
    spikes, ends, checkpoints, sequences = _outputs(decoded, strides, x_seq, checkpoint, record, final)
    return [spikes, *ends, checkpoints, *sequences]


def _forward(
    program: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], channel_dim: int | None, checkpoint: bool, record: bool, final: bool,
) -> list[Tensor]:  # fmt: skip
    plan, target = _plan(program, x_seq, channel_dim, record, False), target_of(x_seq)
    spikes, ends, checkpoints, sequences = _outputs(
        plan.kernel.program, plan.strides, x_seq, checkpoint, record, final, target.empty
    )
    if plan.geometry.neurons:
        call = Call(
            geometry=plan.geometry,
            x=with_layout(x_seq, plan.strides),
            parameters=[tensor.contiguous() for tensor in parameters],
            neighbours=plan.neighbours,
            initial=[plan.state(state) for state in initial],
            initial_value=initial_value,
            spikes=spikes,
            final=ends,
            checkpoints=checkpoints if checkpoints.numel() else None,
            sequences=sequences,
        )
        target.launch(plan.kernel, call)
    return [spikes, *ends, checkpoints, *sequences]


def _gradients(
    program: Program, strides: tuple[int, ...], x_seq: Tensor, initial: Sequence[Tensor], need_x: bool,
    empty: Empty = empty,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Uninitialised gradients of x and of the initial states; empty where not needed. Sizes may be symbolic."""
    dtype = getattr(torch, program.dtype)
    grad_x = [empty_sequence(x_seq, x_seq.shape[0], strides, x_seq.dtype, empty)] if need_x else []
    return grad_x, [empty(x_seq, x_seq.shape[1:], strides, dtype) for _ in initial]


def _fake_backward(
    program: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], checkpoints: Tensor, grad_spikes: Tensor | None,
    grad_final: Sequence[Tensor | None], grad_sequences: Sequence[Tensor | None], channel_dim: int | None, need_x: bool,
) -> list[Tensor]:  # fmt: skip
    decoded = Program.decode(program)
    grad_x, grad_initial = _gradients(decoded, step_strides(x_seq.shape, x_seq.stride()), x_seq, initial, need_x)
    pairs = zip(parameters, decoded.parameters, strict=True)
    return [*grad_x, *grad_initial, *(torch.empty_like(tensor) for tensor, p in pairs if p.learned)]


def _backward(
    program: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], checkpoints: Tensor, grad_spikes: Tensor | None,
    grad_final: Sequence[Tensor | None], grad_sequences: Sequence[Tensor | None], channel_dim: int | None, need_x: bool,
) -> list[Tensor]:  # fmt: skip
    record = any(grad is not None for grad in grad_sequences)
    plan, target = _plan(program, x_seq, channel_dim, record, True), target_of(x_seq)
    dtype = getattr(torch, plan.kernel.program.dtype)
    grad_x, grad_initial = _gradients(plan.kernel.program, plan.strides, x_seq, initial, need_x, target.empty)
    neurons, sums = plan.geometry.neurons, (plan.kernel.grads, plan.channels)
    grads = (x_seq.new_empty if neurons else x_seq.new_zeros)(sums, dtype=dtype)
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
            grad_sequences=[_recorded(plan, grad, x, dtype) for grad in grad_sequences] if record else (),
            grad_x=grad_x[0] if need_x else None,
            grad_initial=grad_initial,
            grad_parameters=grads,
        )
        target.launch(plan.kernel, call)
    return [*grad_x, *grad_initial, *plan.parameter_gradients(grads)]


def _recorded(plan: _Plan, grad: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a recorded state, steps one after the other; zeros where there is none."""
    full = plan.sequence(x, x.shape[0], dtype)
    return full.zero_() if grad is None else full.copy_(grad)


def target_of(tensor: Tensor) -> ModuleType:
    """The module that launches kernels where a tensor is."""
    return cuda if tensor.is_cuda else host


def run_program(
    text: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float], parameters: Sequence[Tensor],
    channel_dim: int | None, learns: bool, record: bool, final: bool,
) -> list[Tensor]:  # fmt: skip
    """Spikes, final states, checkpoints, and the recorded states: the forward operator, with its gradient.

    Without ``final`` the final states have no values, nor memory: only their shape, and their place in the graph.
    """
    if torch.compiler.is_compiling():
        return torch.ops.klif_sj.forward(
            text, x_seq, initial, initial_value, parameters, channel_dim, learns, record, final
        )
    asked = (text, initial_value, channel_dim, learns, record, final, len(initial))
    return list(_Eager.apply(asked, x_seq, *initial, *parameters))


def final_states(
    text: str, x_seq: Tensor, initial_value: Sequence[float], parameters: Sequence[Tensor], channel_dim: int | None
) -> list[Tensor]:
    """The final states that :func:`run_program` without ``final`` left out, from the same kernel; outside autograd."""
    inputs: tuple[Any, ...] = (text, x_seq, [], initial_value, parameters, channel_dim, False, False, True)
    return _call(_forward, torch.ops.klif_sj.forward, inputs, (x_seq, *parameters))[1:-1]


class _Eager(torch.autograd.Function):
    """What ``register_autograd`` does for the forward operator, at a fraction of its cost a call."""

    @staticmethod
    def forward(ctx: Any, asked: tuple[Any, ...], x_seq: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        # One argument, as torch looks at each.
        text, initial_value, channel_dim, learns, record, final, n_initial = asked
        initial, parameters = list(tensors[:n_initial]), list(tensors[n_initial:])
        inputs: tuple[Any, ...] = (
            text, x_seq, initial, initial_value, parameters, channel_dim, learns, record, final
        )  # fmt: skip
        output = _call(_forward, torch.ops.klif_sj.forward, inputs, (x_seq, *tensors))
        if not final:
            program, shape = Program.decode(text), x_seq.shape[1:]
            dtype, strides = getattr(torch, program.dtype), (0,) * len(shape)
            output[1:1] = [empty(x_seq, shape, strides, dtype) for _ in program.states]
        ctx.set_materialize_grads(False)
        if learns:
            _save(ctx, inputs, output)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grad_x, grad_initial, grad_parameters = _gradients_of(ctx, grads, ctx.needs_input_grad[1])
        return None, grad_x, *grad_initial, *grad_parameters


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def _call(
    implementation: Callable[..., list[Tensor]], operator: Any, inputs: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
) -> list[Tensor]:  # fmt: skip
    """The operator, below autograd; its implementation itself where nobody watches operators, at half the cost.

    ``tensors`` are those among the inputs: a subclass has its own idea of an operator, and perhaps no memory.
    """
    watched = torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled()
    if not watched and _PLAIN.issuperset(map(type, tensors)) and inputs[1].device.type in ("cpu", "cuda"):
        return implementation(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    program, x_seq, initial, initial_value, parameters, channel_dim, _, record, _ = inputs
    states = len(output) - 2 - (len(Program.decode(program).states) if record else 0)
    ctx.program, ctx.initial_value, ctx.channel_dim, ctx.record = program, initial_value, channel_dim, record
    ctx.counts = (len(initial), states)
    ctx.save_for_backward(x_seq, output[1 + states], *initial, *parameters)


def _gradients_of(
    ctx: Any, grads: Sequence[Tensor | None], need_x: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:
    """Gradients of x, of the initial states, and of the parameters, from those of the forward operator's outputs."""
    x_seq, checkpoints, *rest = ctx.saved_tensors
    n_initial, states = ctx.counts
    inputs = (
        ctx.program, x_seq, rest[:n_initial], ctx.initial_value, rest[n_initial:], checkpoints, grads[0],
        list(grads[1 : 1 + states]), list(grads[2 + states :]) if ctx.record else [], ctx.channel_dim, need_x,
    )  # fmt: skip
    if torch.is_grad_enabled():  # create_graph: the operator's own autograd refuses if it is differentiated
        found = torch.ops.klif_sj.backward(*inputs)
    else:
        found = _call(_backward, torch.ops.klif_sj.backward, inputs, (x_seq, checkpoints, *rest, *grads))
    remaining = iter(found)
    grad_x = next(remaining) if need_x else None
    grad_initial = [next(remaining) for _ in range(n_initial)]
    parameters = Program.decode(ctx.program).parameters
    return grad_x, grad_initial, [next(remaining) if p.learned else None for p in parameters]


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    grad_x, grad_initial, grad_parameters = _gradients_of(ctx, grads, ctx.needs_input_grad[1])
    # torch compares the structure of what comes back with the inputs': an empty list of numbers counts as a list.
    return None, grad_x, grad_initial, None if ctx.initial_value else [], grad_parameters, *(None,) * 4


def _refuse_double_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise NotImplementedError(
        "fused kernels have no second derivative; use backend='torch' for a neuron whose gradient is differentiated"
    )


for _name, _implementation, _fake in (("forward", _forward, _fake_forward), ("backward", _backward, _fake_backward)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _key)
    _library.impl(_name, _fake, "Meta")  # register_fake would do, but looks through every loaded module for its caller
torch.library.register_autograd("klif_sj::forward", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("klif_sj::backward", _refuse_double_backward, lib=_library)
