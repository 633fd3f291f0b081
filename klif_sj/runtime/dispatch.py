"""From a neuron to its kernel: the parameters of a call, and the program that serves it, traced once."""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..codegen.program import Parameter, Program, build_program
from ..neuron.parameters import PerStep
from ..neuron.states import state_dtype
from .pending import PendingStates, can_wait

Kind = tuple[str, bool, bool, bool]
"""A parameter's name, and whether it is per step, per channel, and learned: the fields of ``Parameter``."""


def run(
    node: Any, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    effective: Mapping[str, Tensor | PerStep], pending: bool = False,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Callable[[], None] | None]:  # fmt: skip
    """Run a neuron's generated kernel over a sequence: spikes, final states, and the states at every step if stored.

    With ``pending`` the final states may be tensors without values, in a call that learns; the last result then is what
    computes them, else None.

    The neuron is used by what it says of itself: ``states``, ``advance``, ``channel_dim``, ``store_v_seq``.
    """
    from .op import run_program  # registering the operators inspects every loaded module: not at import

    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{type(node).__name__}: fused kernels have no rules for torch.func's transforms (grad, vmap, ...); use "
            f"torch.autograd, or backend='torch', whose rules are those of the surrogate, got {node.backend!r}"
        )
    values, kinds = _arguments(node, effective)
    dtype = state_dtype(x_seq.dtype)
    learns = torch.is_grad_enabled() and (
        x_seq.requires_grad or any(kind[3] for kind in kinds) or any(state.requires_grad for state in initial)
    )
    text, used, attributes = node.step_program(dtype, kinds, learns)
    if torch.compiler.is_compiling():
        for module, name, value in attributes:
            # Compared, so that the compiled graph is guarded by the value: a float that is only read would be an input.
            if getattr(node.get_submodule(module), name) != value:
                raise AssertionError(f"{module}.{name} changed while it was traced")
    parameters = [values[name] if name in effective else values[name].to(dtype).reshape(()) for name in used]
    device = x_seq.device
    for name, tensor in zip(used, parameters, strict=True):
        if tensor.device != device:
            raise ValueError(
                f"{type(node).__name__}: expected parameter {name!r} on the input's device {device}, got "
                f"{tensor.device}; move the neuron with .to({str(device)!r})"
            )
    pending = pending and learns and not initial and not node.store_v_seq and can_wait(x_seq)
    spikes, final, sequences = run_program(
        text, x_seq, initial, initial_value, parameters, node.channel_dim, learns, node.store_v_seq, not pending
    )
    return (
        spikes,
        dict(zip(node.states, final, strict=True)),
        dict(zip(node.states, sequences, strict=True)) if sequences else {},
        PendingStates(final, text, x_seq, initial_value, parameters, node.channel_dim) if pending else None,
    )


def cuda_source(node: Any, steps: int, dtype: torch.dtype) -> str:
    """The CUDA C++ that a neuron is trained with on a GPU, for sequences of ``steps`` in a storage dtype."""
    from ..codegen.kernel import Kernel
    from . import cuda

    _, kinds = _arguments(node, node.effective_parameters())
    program = Program.decode(node.step_program(state_dtype(dtype), kinds, True)[0])
    kernel = Kernel(program, steps, dtype, columns=False, record=False, backward=True)
    return cuda.source(kernel, cuda.vector_width(kernel))


def _arguments(node: Any, effective: Mapping[str, Tensor | PerStep]) -> tuple[dict[str, Tensor], tuple[Kind, ...]]:
    """Everything that a step may read beside x and the states, by name, and of what kind each is."""
    values = {name: value.values if isinstance(value, PerStep) else value for name, value in effective.items()}
    for name, tensor in raw_scalars(node).items():
        values[f"raw_{name}" if name in effective else name] = tensor
    gradients, kinds = torch.is_grad_enabled(), []
    for name, value in values.items():
        given = effective.get(name)
        per_step = type(given) is PerStep
        kinds.append((name, per_step, given is not None and value.ndim > per_step, gradients and value.requires_grad))
    return values, tuple(kinds)


def raw_scalars(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """One-element parameters and buffers of a neuron and its submodules (a surrogate's, say) by dotted name."""
    found = {}
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and type(tensor) not in _UNINITIALIZED and tensor.numel() == 1:
                found[prefix + name] = tensor
    for name, child in module._modules.items():
        if child is not None:
            found.update(raw_scalars(child, f"{prefix}{name}."))
    return found


_INTERNAL_ATTRIBUTES = (frozenset(nn.Module().__dict__) - {"training"}) | {
    "_memories", "_memories_rv", "_step_mode", "_backend", "_store_v_seq", "_sequence", "_states_read", "effective",
    "lava_s_cale", "forward_kernel", "backward_kernel", "_neuron_precision",
}  # fmt: skip
_UNINITIALIZED = (UninitializedParameter, UninitializedBuffer)
_PLAIN = (bool, int, float, str, type(None))
_kept_alive: list[Any] = []

Found = tuple[str, tuple[str, ...], tuple[tuple[str, str, Any], ...]]
_programs: dict[Any, Found] = {}


@dataclass
class _Known:
    """The programs of a neuron, for as long as nothing that its equations may read has changed."""

    methods: tuple[Any, ...]
    modules: list[tuple[dict[str, Any], int, Callable[[dict[str, Any]], Any], Any]]
    programs: dict[Any, Found]

    def holds(self, node: Any) -> bool:
        try:
            return self.methods == _methods(node) and all(
                len(attributes) == size and read(attributes) == values
                for attributes, size, read, values in self.modules
            )
        except (RuntimeError, ValueError):  # a tensor or an array was replaced: they have no truth value
            return False


_known: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()


def program_of(node: Any, dtype: torch.dtype, kinds: tuple[Kind, ...], backward: bool) -> Found:
    """A neuron's encoded program, the names of its parameters in order, and the attributes that it depends on.

    Traced once for each distinct set of equations: the class, its three methods, and every attribute of the neuron and
    its submodules. So a changed ``tau``, surrogate or method gives another program.
    """
    known = _known.get(node)
    if known is None or not known.holds(node):
        known = _known[node] = _Known(_methods(node), _watch(node), {})
    asked = (dtype, kinds, backward)
    if asked not in known.programs:
        constants = _constants(node)
        key = (type(node), known.methods, constants, *asked)
        if key not in _programs:
            _programs[key] = _build(node, constants, *asked)
        known.programs[asked] = _programs[key]
    return known.programs[asked]


def _build(
    node: Any, constants: tuple[tuple[str, str, Any], ...], dtype: torch.dtype, kinds: tuple[Kind, ...],
    backward: bool,
) -> Found:  # fmt: skip
    program = build_program(
        _title(node), functools.partial(_step, node), node.states, [Parameter(*kind) for kind in kinds],
        dtype, backward,
    )  # fmt: skip
    attributes = tuple(constant for constant in constants if isinstance(constant[2], _PLAIN))
    return program.encode(), tuple(p.name for p in program.parameters), attributes


def _methods(node: Any) -> tuple[Any, ...]:
    return type(node).neuronal_charge, type(node).neuronal_fire, type(node).neuronal_reset


def _watch(module: nn.Module) -> list[tuple[dict[str, Any], int, Callable[[dict[str, Any]], Any], Any]]:
    """Every attribute of a module and its submodules that its equations may read, with its value now."""
    watched: list[tuple[dict[str, Any], int, Callable[[dict[str, Any]], Any], Any]] = []
    names = [name for name in module.__dict__ if name not in _INTERNAL_ATTRIBUTES and not name.endswith("_seq")]
    for attributes, keys in ((module.__dict__, names), (module._modules, list(module._modules))):
        if keys:
            read = itemgetter(*keys)
            watched.append((attributes, len(attributes), read, _copied(read(attributes))))
    for child in module._modules.values():
        if child is not None:
            watched += _watch(child)
    return watched


def _copied(value: Any) -> Any:
    """Containers as they are now, as one that changes in place would always equal itself."""
    if isinstance(value, tuple | list):
        return type(value)(map(_copied, value))
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return value


def _constants(module: nn.Module, prefix: str = "") -> tuple[tuple[str, str, Any], ...]:
    """Every attribute of a module and its submodules that its equations may read, as hashable values."""
    found = [(prefix, "", type(module))]
    for name, value in module.__dict__.items():
        if name in _INTERNAL_ATTRIBUTES or name.endswith("_seq"):
            continue
        if not isinstance(value, _PLAIN):
            value = _hashable(value)
        found.append((prefix, name, value))
    for name, child in module._modules.items():
        if child is not None:
            found += _constants(child, f"{prefix}.{name}" if prefix else name)
    return tuple(found)


def _hashable(value: Any) -> Any:
    """A value that equals only what would trace the same: itself, or the identity of what cannot be compared."""
    if isinstance(value, tuple | list):
        return (type(value), *map(_hashable, value))
    if isinstance(value, dict):
        return (dict, *((name, _hashable(item)) for name, item in value.items()))
    if isinstance(value, _PLAIN):
        return value
    if not any(value is kept for kept in _kept_alive):
        _kept_alive.append(value)
    return (type(value), id(value))


def _step(
    node: Any, x: Tensor, states: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of a neuron on the given tensors, in place of its own parameters."""
    held = []
    for name in raw_scalars(node):
        owner, _, attribute = name.rpartition(".")
        module = node.get_submodule(owner)
        tensors = module._parameters if attribute in module._parameters else module._buffers
        held.append((tensors, attribute, tensors[attribute]))
        tensors[attribute] = parameters.get(f"raw_{name}", parameters.get(name))
    try:
        return node.advance(x, states, parameters)
    finally:
        for tensors, attribute, tensor in held:
            tensors[attribute] = tensor


def _title(node: nn.Module) -> str:
    """The neuron on one line, without what makes no difference to its equations, such as where an object lies."""
    surrogate = getattr(node, "surrogate_function", None)
    settings = ", ".join(
        part for part in node.extra_repr().split(", ") if not part.startswith(("step_mode", "backend"))
    )
    title = re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(node).__name__}({settings}) with {surrogate}")
    return " ".join(title.split())
