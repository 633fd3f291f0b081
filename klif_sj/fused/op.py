"""The operators: a program run over a sequence, and its gradient, for autograd, torch.compile and CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cuda, host
from .kernel import Kernel
from .layout import Geometry, empty_sequence, geometry, step_strides, with_layout
from .program import Parameter, Program

COLUMN_LIMIT = 32
"""Channels with fewer neurons than this in a row are laid side by side instead (the ``columns`` schedule)."""

_library = torch.library.Library("klif_sj", "DEF")
_tags = (torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))
_library.define(
    "forward(str program, Tensor x_seq, Tensor[] initial, float[] initial_value, Tensor[] parameters, "
    "int? channel_dim, bool checkpoint, bool record) -> Tensor[]",
    tags=_tags,
)
_library.define(
    "backward(str program, Tensor x_seq, Tensor[] initial, float[] initial_value, Tensor[] parameters, "
    "Tensor? checkpoints, Tensor? grad_spikes, Tensor?[] grad_final, Tensor?[] grad_sequences, "
    "int? channel_dim, bool need_x, bool need_initial) -> Tensor[]",
    tags=_tags,
)


def _outputs(
    program: Program, x_seq: Tensor, strides: tuple[int, ...], checkpoint: bool, record: bool
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """Uninitialised spikes, final states, checkpoints and recorded states."""
    dtype = getattr(torch, program.dtype)
    steps, states = x_seq.shape[0], len(program.states)
    spikes = empty_sequence(x_seq, steps, strides, x_seq.dtype)
    final = [empty_sequence(x_seq, 1, strides, dtype).squeeze(0) for _ in range(states)]
    saved = Kernel(program, steps, x_seq.dtype, False, record, False).segments - 1 if checkpoint else 0
    checkpoints = x_seq.new_empty((saved, states, spikes[0].numel()), dtype=dtype)
    sequences = [empty_sequence(x_seq, steps, strides, dtype) for _ in range(states if record else 0)]
    return spikes, final, checkpoints, sequences


def _fake_forward(
    program: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], channel_dim: int | None, checkpoint: bool, record: bool,
) -> list[Tensor]:  # fmt: skip
    spikes, final, checkpoints, sequences = _outputs(
        Program.decode(program), x_seq, step_strides(x_seq), checkpoint, record
    )
    return [spikes, *final, checkpoints, *sequences]


def _forward(
    program: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], channel_dim: int | None, checkpoint: bool, record: bool,
) -> list[Tensor]:  # fmt: skip
    decoded = Program.decode(program)
    launch = _Launch(decoded, x_seq, initial, initial_value, parameters, channel_dim, record, backward=False)
    spikes, final, checkpoints, sequences = _outputs(decoded, x_seq, launch.strides, checkpoint, record)
    launch.run(spikes=spikes, final=final, checkpoints=checkpoints, sequences=sequences)
    return [spikes, *final, checkpoints, *sequences]


def _gradients(
    program: Program, x_seq: Tensor, initial: Sequence[Tensor], parameters: Sequence[Tensor],
    strides: tuple[int, ...], need_x: bool, need_initial: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """Uninitialised gradients of x, of the initial states and of the learned parameters; empty where not needed."""
    dtype = getattr(torch, program.dtype)
    grad_x = [empty_sequence(x_seq, x_seq.shape[0], strides, x_seq.dtype)] if need_x else []
    grad_initial = [empty_sequence(x_seq, 1, strides, dtype).squeeze(0) for _ in program.states] if need_initial else []
    learned = [torch.empty_like(t) for t, p in zip(parameters, program.parameters, strict=True) if p.learned]
    return grad_x, grad_initial, learned


def _fake_backward(
    program: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], checkpoints: Tensor | None, grad_spikes: Tensor | None,
    grad_final: Sequence[Tensor | None], grad_sequences: Sequence[Tensor | None],
    channel_dim: int | None, need_x: bool, need_initial: bool,
) -> list[Tensor]:  # fmt: skip
    grad_x, grad_initial, learned = _gradients(
        Program.decode(program), x_seq, initial, parameters, step_strides(x_seq), need_x, need_initial
    )
    return [*grad_x, *grad_initial, *learned]


def _backward(
    program: str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], checkpoints: Tensor | None, grad_spikes: Tensor | None,
    grad_final: Sequence[Tensor | None], grad_sequences: Sequence[Tensor | None],
    channel_dim: int | None, need_x: bool, need_initial: bool,
) -> list[Tensor]:  # fmt: skip
    decoded = Program.decode(program)
    record = any(g is not None for g in grad_sequences)
    launch = _Launch(decoded, x_seq, initial, initial_value, parameters, channel_dim, record, backward=True)
    strides = launch.strides
    grad_x, grad_initial, _ = _gradients(decoded, x_seq, initial, parameters, strides, need_x, need_initial)
    if grad_spikes is None:
        grad_spikes = torch.zeros_like(x_seq)
    launch.run(
        checkpoints=checkpoints,
        grad_spikes=with_layout(grad_spikes, strides),
        grad_final=[None if g is None else launch.state(g) for g in grad_final],
        grad_sequences=[None if g is None else empty_sequence(g, g.shape[0], strides, g.dtype).copy_(g)
                        for g in grad_sequences] if record else [],
        grad_x=grad_x[0] if need_x else None,
        grad_initial=grad_initial,
    )  # fmt: skip
    return [*grad_x, *grad_initial, *launch.parameter_gradients()]


def target_of(tensor: Tensor) -> ModuleType:
    """The module that launches kernels where a tensor is."""
    return cuda if tensor.is_cuda else host


class _Launch:
    """One call of a kernel: the arguments brought into its layout, and packed."""

    def __init__(
        self, program: Program, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
        parameters: Sequence[Tensor], channel_dim: int | None, record: bool, backward: bool,
    ) -> None:  # fmt: skip
        self.program, self.initial_value = program, initial_value
        self.strides = step_strides(x_seq)
        self.x = with_layout(x_seq, self.strides)
        self.initial = [self.state(tensor) for tensor in initial]
        shape = tuple(x_seq.shape[1:])
        per_channel = any(p.per_channel for p in program.parameters)
        self.laid = geometry(shape, self.strides, channel_dim if per_channel else None)
        self.columns = self.laid.channels > 1 and self.laid.inner < COLUMN_LIMIT
        self.neighbours = self.laid.inner if self.columns else 1
        self.geometry = self.laid
        if self.columns:
            self.geometry = Geometry(self.laid.outer, self.laid.channels * self.laid.inner, 1)
        self.parameters = [
            self._spread(tensor, parameter) for tensor, parameter in zip(parameters, program.parameters, strict=True)
        ]
        self.kernel = Kernel(program, x_seq.shape[0], x_seq.dtype, self.columns, record, backward)

    def state(self, tensor: Tensor) -> Tensor:
        """A state, or the gradient of one, in the kernel's layout."""
        return with_layout(tensor.unsqueeze(0), self.strides).squeeze(0)

    def run(self, **tensors: Any) -> None:
        arguments = {
            "x": self.x,
            "x_stride": self.x.stride(0),
            "initial": self.initial,
            "initial_value": self.initial_value,
            "parameters": self.parameters,
            **self.geometry._asdict(),
            **tensors,
        }
        if self.kernel.backward:
            size = (self.kernel.grads, self.geometry.channels)
            self.grads = self.x.new_zeros(size, dtype=getattr(torch, self.program.dtype))
            arguments["grad_parameters"] = self.grads
            arguments["grad_spikes_stride"] = tensors["grad_spikes"].stride(0)
        if self.geometry.neurons:
            target_of(self.x).launch(self.kernel, self.geometry, arguments)

    def parameter_gradients(self) -> list[Tensor]:
        """The gradients of the learned parameters, in their shapes."""
        gradients, offset = [], 0
        for parameter in self.program.learned:
            count = self.kernel.steps if parameter.per_step else 1
            rows = self.grads[offset : offset + count]
            offset += count
            if parameter.per_channel:
                rows = rows.view(count, self.laid.channels, self.neighbours).sum(2) if self.neighbours > 1 else rows
            else:
                rows = rows.sum(1)
            gradients.append(rows if parameter.per_step else rows.squeeze(0))
        return [g.clone() for g in gradients]

    def _spread(self, tensor: Tensor, parameter: Parameter) -> Tensor:
        """A per-channel parameter with one value for each column, where channels lie side by side."""
        tensor = tensor.detach()
        if parameter.per_channel and self.neighbours > 1:
            return tensor.repeat_interleave(self.neighbours, dim=-1)
        return tensor.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    program, x_seq, initial, initial_value, parameters, channel_dim, _, record = inputs
    states = len(Program.decode(program).states)
    ctx.program, ctx.initial_value, ctx.channel_dim, ctx.record = program, initial_value, channel_dim, record
    ctx.counts = (len(initial), len(parameters), states)
    ctx.save_for_backward(x_seq, output[1 + states], *initial, *parameters)


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x_seq, checkpoints, *rest = ctx.saved_tensors
    n_initial, n_parameters, states = ctx.counts
    initial, parameters = rest[:n_initial], rest[n_initial:]
    program = Program.decode(ctx.program)
    need_x, need_initial = ctx.needs_input_grad[1], n_initial > 0
    found = torch.ops.klif_sj.backward(
        ctx.program, x_seq, initial, ctx.initial_value, parameters, checkpoints, grads[0], grads[1 : 1 + states],
        grads[2 + states :] if ctx.record else [], ctx.channel_dim, need_x, need_initial,
    )  # fmt: skip
    remaining = iter(found)
    grad_x = next(remaining) if need_x else None
    grad_initial = [next(remaining) for _ in range(n_initial)]
    grad_parameters = [next(remaining) if p.learned else None for p in program.parameters]
    return None, grad_x, grad_initial, None, grad_parameters, None, None, None


def _refuse_double_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise NotImplementedError(
        "fused kernels have no second derivative; use backend='torch' for a neuron whose gradient is differentiated"
    )


for _name, _implementation, _fake in (("forward", _forward, _fake_forward), ("backward", _backward, _fake_backward)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _key)
    torch.library.register_fake(f"klif_sj::{_name}", _fake, lib=_library)
torch.library.register_autograd("klif_sj::forward", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("klif_sj::backward", _refuse_double_backward, lib=_library)
