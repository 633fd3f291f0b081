"""The class that a fused neuron gets: a subclass of its own class, whose calls run on kernels."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import codegen, runtime
from .._checks import check_input
from .._compat import steps
from ..codegen import PerStep, Scope, note_methods
from ..neuron.on_kernels import OnKernels, kind_of, traceable
from ..neuron.states import NOT_KEPT, as_state, fit_state, state_dtype

SETTINGS = ("_fused_backend", "_fused_keep_state", "_fused_states")
"""The attributes that a fused neuron has in addition to those of its own class."""


class Fused(OnKernels):
    """Everything that the generated subclass adds to a neuron's class."""

    _fused_class: ClassVar[type]
    """The neuron's own class."""

    _fused_source: ClassVar[steps.StepSource]
    _fused_equations: ClassVar[codegen.Equations]
    _fused_starts_itself: ClassVar[bool]

    _fused_backend: str
    _fused_keep_state: bool
    _fused_states: tuple[str, ...]
    _memories: dict[str, Any]
    _memories_rv: dict[str, Any]

    def _kernel_equations(self) -> codegen.Equations:
        return type(self)._fused_equations

    @traceable
    def single_step_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or "s" not in type(self)._fused_source.modes:
            return super().single_step_forward(x, *args, **kwargs)  # type: ignore[misc]
        if not self._fused_keep_state and self.step_mode == "s":  # SpikingJelly's multi-step mode may call single steps
            raise ValueError(
                f"{type(self).__name__}: expected step_mode 'm' with keep_state=False, which starts every call from "
                "the reset values; fuse with keep_state=True for single steps"
            )
        backend = self._fused_serving(x, "s")
        if backend == "torch":
            return super().single_step_forward(x)  # type: ignore[misc]
        return self._fused_run(x, x.unsqueeze(0), "s", backend)[0]

    @traceable
    def multi_step_forward(self: Any, x_seq: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return super().multi_step_forward(x_seq, *args, **kwargs)  # type: ignore[misc]
        if not self._fused_keep_state:
            self._memories.update({name: self._memories_rv[name] for name in self._fused_states})
        backend = self._fused_serving(x_seq, "m")
        if backend == "torch":
            spikes = super().multi_step_forward(x_seq)  # type: ignore[misc]
        else:
            spikes = self._fused_run(x_seq, x_seq, "m", backend)
        if not self._fused_keep_state:
            self._memories.update(dict.fromkeys(self._fused_states, NOT_KEPT))
        return spikes

    def _fused_serving(self, x: Tensor, step_mode: str) -> str:
        """How a call runs: by a backend, by SpikingJelly's code (``'torch'``), or by the class's ``'equations'``."""
        check_input(x, step_mode, type(self).__name__)
        backend = runtime.serving_backend(self._fused_backend, x)
        return "equations" if backend == "torch" and type(self)._fused_source.differs else backend

    def _fused_run(self, x: Tensor, x_seq: Tensor, step_mode: str, backend: str) -> Tensor:
        steps.check_sequence(self, x_seq)
        neuron, dtype = type(self).__name__, state_dtype(x.dtype)
        memories = dict(self._memories)
        try:
            start = steps.starting_states(self, x, step_mode, dtype, type(self)._fused_starts_itself)
            states = {
                name: fit_state(neuron, name, value, x_seq.shape[1:], x.device, dtype) for name, value in start.items()
            }
            record = steps.stores_states(self, step_mode)
            if backend == "equations":
                spikes, final, sequences = self._fused_run_equations(x_seq, states, record)
            else:
                spikes, final, sequences, _ = self._run_kernel(x_seq, states, 0, 1, record, self._fused_keep_state)
        except BaseException:
            self._memories.update(memories)
            raise
        self._memories.update(steps.left_states(self, final))
        if record:
            steps.store_states(self, sequences, step_mode)
        return spikes

    def _effective_outside(self, states: Any = None) -> codegen.EffectiveParameters:
        effective = type(self)._fused_source.effective
        if effective is None:
            return {}
        return {name: PerStep(value) if per_step else value for name, (value, per_step) in effective(self).items()}

    def _kernel_neuron_step(
        self: Any, dtype: torch.dtype = torch.float32
    ) -> tuple[codegen.NeuronStep, tuple[Tensor, ...]]:
        """One time step, forward and backward, and the neuron's tensors that it reads.

        :raises StepTraceError: if no kernel can express the step; it names the operation and the line it came from
        """
        kinds = tuple(kind_of(name, value) for name, value in self._effective_outside().items())
        return codegen.step_of(self, self._kernel_equations, self._fused_states, kinds, dtype, True)

    def _fused_example_shape(self) -> tuple[int, ...]:
        """The shape of a step's input that the neuron's parameters fit."""
        channels = [value.values.shape[1:] if isinstance(value, PerStep) else value.shape
                    for value in self._effective_outside().values()]  # fmt: skip
        if any(channels):
            return 2, next(shape[0] for shape in channels if shape), 3, 3
        step, own = self._kernel_neuron_step()
        shape = list(torch.broadcast_shapes(*(tensor.shape for tensor in step.parameters(own).values())))
        if not shape or shape[0] != 1:  # a first dimension of size 1 stands for the batch
            shape.insert(0, 1)
        return (2, *(3 if size == 1 else size for size in shape[1:])) if shape[1:] else (3, 8)

    def _fused_run_equations(
        self, x_seq: Tensor, states: dict[str, Any], record: bool
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The class's own equations in eager torch, step by step."""
        dtype, equations, names = state_dtype(x_seq.dtype), type(self)._fused_equations, self._fused_states
        xs = x_seq.unbind(0)
        self._memories.update({name: as_state(value, xs[0], dtype) for name, value in states.items()})
        spikes, history = [], []
        for x in xs:
            spikes.append(equations(self, x.to(dtype)).to(x.dtype))
            history.append([self._memories[name] for name in names])
        sequences = [torch.stack(steps) for steps in zip(*history, strict=True)] if record else []
        return (
            torch.stack(spikes),
            dict(zip(names, history[-1], strict=True)),
            dict(zip(names, sequences, strict=False)),
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the neuron by its own class, because no module contains the generated class."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, args, *rest = reduced
        own = type(self)._fused_class
        return _rebuild, (own, make, tuple(own if arg is type(self) else arg for arg in args)), *rest


def _rebuild(cls: type, make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Make a copy of a fused neuron, in this process or another one."""
    node = make(*args)
    node.__class__ = fused_class(cls)
    return node


@functools.cache
def fused_class(cls: type) -> type:
    """The subclass of a class of neurons whose calls run on kernels.

    :raises NoStepError: if the class has no single step
    :raises TypeError: if the class forbids subclasses
    """
    source = steps.step_source(cls)
    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_fused_class": cls,
        "_fused_source": source,
        "_fused_equations": staticmethod(_noted(source)),
        "_fused_starts_itself": steps.starts_itself(cls),
    }
    bases = (Fused, cls, *([source.hooks] if source.hooks else []))
    return types.new_class(cls.__name__, bases, exec_body=lambda namespace: namespace.update(body))


def _noted(source: steps.StepSource) -> codegen.Equations:
    """The equations of a class. When they are traced, they also note the method that a call begins with."""

    def equations(self: Any, x: Tensor) -> Tensor:
        if type(self) is not Scope:
            return source.equations(self, x)
        note_methods(self, "single_step_forward", "single_step_functional_forward")
        with steps.plain_torch():
            return source.equations(self, x)

    return equations


def own_class(node: nn.Module) -> type:
    """The class of a neuron, fused or not."""
    return node._fused_class if isinstance(node, Fused) else type(node)
