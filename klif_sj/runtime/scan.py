"""A scan runs a program over sequences of one form, whose shapes, layouts, dtypes and devices are checked only once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..codegen.kernel import Kernel
from ..codegen.program import Program
from . import cpu, cuda
from .launch import Pass, address
from .layout import Geometry, contiguous_strides, empty_sequence, geometry, lies_as, step_strides, with_layout

CHANNELS_INNERMOST_BELOW = 32
"""If a channel has fewer neurons than this in a row, the kernel takes the schedule for innermost channels."""

Outputs = tuple[Tensor, list[Tensor], Tensor | None, list[Tensor]]
"""Spikes, final states, checkpoints where a sequence has any, and recorded states."""

Gradients = tuple[Tensor | None, list[Tensor], list[Tensor]]
"""The gradients of x if it is wanted, of the initial states, and of the learned parameters."""

_address = Tensor.data_ptr


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


class Target(Hashable, Protocol):
    """A module that launches kernels on one type of device: ``cpu`` or ``cuda``."""

    def segment(self, program: Program) -> int:
        """How many time steps of a program a segment has. States are saved between segments."""

    def allocator(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Callable[[], Tensor]:
        """A function that makes uninitialised tensors of one form, for a kernel to write."""

    def launch(self, work: Pass, record: list[Any]) -> None:
        """Run a kernel, which is compiled first if need be. The record lacks only the target's own fields."""


TARGETS: dict[str, Target] = {"cpu": cast(Target, cpu), "cuda": cast(Target, cuda)}
"""The targets, by the type of a device."""


class Scan:
    """A program over sequences ``[T, N, *]`` of one shape, layout, dtype and device, with parameters and initial states
    of one form each.

    :raises ValueError: for a tensor of another size, dtype or device than the kernel expects
    """

    def __init__(
        self, target: Target, program: Program, sizes: torch.Size, strides: tuple[int, ...], dtype: torch.dtype,
        device: torch.device, channel_dim: int | None, initial: tuple[Any, ...], parameters: tuple[Any, ...],
    ) -> None:  # fmt: skip
        self.target, self.program, self.dtype, self.device = target, program, dtype, device
        self.shape = tuple(sizes)
        self.step = self.shape[1:]
        self.strides = step_strides(self.shape, strides)
        self.real: torch.dtype = getattr(torch, program.dtype)
        self.neurons = math.prod(self.step)
        self.checkpoints = (self.shape[0] - 1) // target.segment(program)
        per_channel = any(p.per_channel for p in program.parameters)
        laid = geometry(self.step, self.strides, channel_dim if per_channel else None)
        self.channels_innermost = laid.channels > 1 and laid.inner < CHANNELS_INNERMOST_BELOW
        self.channels = laid.channels
        self.geometry = Geometry(laid.outer, laid.channels * laid.inner, 1) if self.channels_innermost else laid
        self._x_lies = lies_as(self.step, strides[1:], self.strides)
        self._passes: dict[tuple[bool, bool], Pass] = {}
        sequence_shape, sequence_strides = self.shape, (self.neurons, *self.strides)
        self._new_spikes = target.allocator(sequence_shape, sequence_strides, dtype, device)
        self._new_sequence = target.allocator(sequence_shape, sequence_strides, self.real, device)
        self._new_state = target.allocator(self.step, self.strides, self.real, device)
        self._initial_lies = self._parameters_lie = True
        for shape, state_strides, *dtype_and_device in initial:
            self._check(
                "an initial state", shape == self.step, f"shape {self.step}", f"shape {tuple(shape)}", *dtype_and_device
            )
            self._initial_lies &= lies_as(self.step, state_strides, self.strides)
        for (shape, of_parameter, *dtype_and_device), p in zip(parameters, program.parameters, strict=True):
            wanted = (self.shape[0] if p.per_step else 1) * (self.channels if p.per_channel else 1)
            name, size = f"parameter {p.name!r}", math.prod(shape)
            self._check(name, size == wanted, f"{wanted} elements", f"{size}", *dtype_and_device)
            self._parameters_lie &= lies_as(shape, of_parameter, contiguous_strides(shape))

    def _check(self, name: str, fits: bool, wanted: str, got: str, dtype: torch.dtype, device: torch.device) -> None:
        if not fits or dtype != self.real:
            raise ValueError(f"{self.program.neuron}: {name}: expected {wanted} of {self.real}, got {got} of {dtype}")
        if device != self.device:
            raise ValueError(
                f"{self.program.neuron}: {name}: expected it on the input's device {self.device}, got {device}; move "
                f"the neuron with .to({str(self.device)!r})"
            )

    def _pass(self, backward: bool, record: bool) -> Pass:
        kernel = Kernel(self.program, self.shape[0], self.dtype, self.channels_innermost, record, backward)
        return self._passes.setdefault((backward, record), Pass(kernel, self.geometry, self.channels, self.device))

    def forward(
        self, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float], parameters: Sequence[Tensor],
        checkpoints: int, record: bool, final: bool,
    ) -> Outputs:  # fmt: skip
        """Launch the program.

        :param initial: states ``[N, *]`` to start from; if it is empty, states start from the numbers ``initial_value``
        :param checkpoints: how often states are saved for backward: once for each segment after the first, or never
        :param record: whether the states at every step are wanted
        :param final: whether the final states are wanted
        """
        if checkpoints not in (0, self.checkpoints):
            raise RuntimeError(
                f"klif_sj::forward: expected 0 or {self.checkpoints} checkpoints for {self.shape[0]} steps, got "
                f"{checkpoints}; the caller was compiled by another version of klif_sj, compile it again"
            )
        work = self._passes.get((False, record)) or self._pass(False, record)
        call, at = work.record.copy(), work.layout.at
        spikes, saved = self._new_spikes(), None
        call[at.spikes] = spikes.data_ptr()
        ends: list[Tensor] = []
        sequences: list[Tensor] = []
        for _ in self.program.states if final else ():
            ends.append(self._new_state())
        for _ in self.program.states if record else ():
            sequences.append(self._new_sequence())
        if checkpoints:
            saved = x_seq.new_empty((checkpoints, len(self.program.states), self.neurons), dtype=self.real)
            call[at.checkpoints] = saved.data_ptr()
        if self.neurons:
            inputs = self._write_inputs(call, at, x_seq, initial, initial_value, parameters)
            if final:
                call[at.final] = map(_address, ends)
            if record:
                call[at.sequences] = map(_address, sequences)
            self.target.launch(work, call)
            del inputs  # the record has only their addresses, so they had to live until here
        return spikes, ends, saved, sequences

    def _write_inputs(
        self, call: list[Any], at: Any, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
        parameters: Sequence[Tensor],
    ) -> tuple[Any, ...]:  # fmt: skip
        """Complete a record with the addresses of what a program reads, and return the tensors that lie there."""
        x = x_seq if self._x_lies else with_layout(x_seq, self.strides)
        call[at.x], call[at.x_stride] = address(x), x.stride(0)
        if initial:
            if not self._initial_lies:
                initial = [self._laid(state) for state in initial]
            call[at.initial] = map(_address, initial)
        else:
            call[at.initial_value] = initial_value
        if parameters:
            if not self._parameters_lie:
                parameters = [tensor.contiguous() for tensor in parameters]
            call[at.parameters] = map(_address, parameters)
        return x, initial, parameters

    def _laid(self, state: Tensor) -> Tensor:
        """A tensor of a step's shape, in the kernel's layout."""
        return with_layout(state.unsqueeze(0), self.strides).squeeze(0)

    def backward(
        self, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float], parameters: Sequence[Tensor],
        checkpoints: Tensor | None, grad_spikes: Tensor | None, grad_final: Sequence[Tensor | None],
        grad_sequences: Sequence[Tensor | None], need_x: bool,
    ) -> Gradients:  # fmt: skip
        """Launch the program's gradient, given those of what :meth:`forward` returned. None stands for zeros."""
        record = False
        for grad in grad_sequences:
            record = record or grad is not None
        work = self._passes.get((True, record)) or self._pass(True, record)
        call, at = work.record.copy(), work.layout.at
        grad_x = self._new_spikes() if need_x else None
        grad_initial: list[Tensor] = []
        for _ in initial:
            grad_initial.append(self._new_state())
        new_sums = x_seq.new_empty if self.neurons else x_seq.new_zeros
        sums = new_sums(work.sums, dtype=self.real)
        if self.neurons:
            if self.checkpoints:
                checkpoints = self._saved(checkpoints)
                call[at.checkpoints] = checkpoints.data_ptr()
            inputs = self._write_inputs(call, at, x_seq, initial, initial_value, parameters)
            if grad_spikes is None:
                grad_spikes = torch.zeros_like(inputs[0])
            self._check_gradient("the spikes", grad_spikes, self.shape, self.dtype)
            grad_spikes = with_layout(grad_spikes, self.strides)
            call[at.grad_spikes], call[at.grad_spikes_stride] = address(grad_spikes), grad_spikes.stride(0)
            final_grads = self._write_gradients(call, at.grad_final, grad_final) if grad_final else None
            recorded: list[Tensor] = []
            for grad in grad_sequences if record else ():
                recorded.append(self._recorded(grad, x_seq))
            if record:
                call[at.grad_sequences] = map(_address, recorded)
            if grad_x is not None:
                call[at.grad_x] = grad_x.data_ptr()
            if grad_initial:
                call[at.grad_initial] = map(_address, grad_initial)
            call[at.grad_parameters] = sums.data_ptr()
            self.target.launch(work, call)
            del inputs, final_grads  # the record has only their addresses, so they had to live until here
        return grad_x, grad_initial, work.parameter_gradients(sums) if work.kernel.grads else []

    def _saved(self, checkpoints: Tensor | None) -> Tensor:
        """The saved states as the kernel reads them. A hook on saved tensors may have changed their form."""
        expected = (self.checkpoints, len(self.program.states), self.neurons), self.real, self.device
        got = None if checkpoints is None else (tuple(checkpoints.shape), checkpoints.dtype, checkpoints.device)
        if checkpoints is None or got != expected:
            raise ValueError(f"{self.program.neuron}: saved states: expected {expected}, got {got}")
        return checkpoints.contiguous()

    def _check_gradient(self, of: str, grad: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if grad.shape != shape or grad.dtype != dtype or grad.device != self.device:
            raise ValueError(
                f"{self.program.neuron}: the gradient of {of}: expected shape {shape} of {dtype} on {self.device}, got "
                f"{tuple(grad.shape)} of {grad.dtype} on {grad.device}"
            )

    def _write_gradients(self, call: list[Any], field: slice, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Complete a record with the addresses of final states' gradients, and return the tensors that lie there."""
        laid: list[Tensor | None] = []
        for position, grad in enumerate(grads, field.start):
            if grad is not None:
                self._check_gradient("a final state", grad, self.step, self.real)
                grad = self._laid(grad)
                call[position] = address(grad)
            laid.append(grad)
        return laid

    def _recorded(self, grad: Tensor | None, x: Tensor) -> Tensor:
        """The gradient of a recorded state, whose steps lie one after the other; zeros if there is none."""
        full = empty_sequence(x, self.shape[0], self.strides, self.real)
        if grad is None:
            return full.zero_()
        self._check_gradient("a recorded state", grad, self.shape, self.real)
        return full.copy_(grad)


def scan_of(
    program: Program, x_seq: Tensor, initial: Sequence[Tensor], parameters: Sequence[Tensor], channel_dim: int | None
) -> Scan:
    """The scan for a program and these tensors. All tensors of the same form share a scan.

    A form includes all that a kernel relies on, so a launch never reads a tensor that was not checked.
    """
    device = x_seq.device
    return _scan_of(
        TARGETS[device.type], program, x_seq.shape, x_seq.stride(), x_seq.dtype, device, channel_dim,
        tuple(map(_form, initial)), tuple(map(_form, parameters)),
    )  # fmt: skip


_scan_of = functools.lru_cache(maxsize=4096)(Scan)
