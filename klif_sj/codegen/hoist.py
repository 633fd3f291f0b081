"""Hoists what a step computes from parameters alone out of the step: views, indexing, sigmoids of whole tensors.

A kernel's step reads one number of each parameter. While a step is traced, a parameter with several elements is the
tensor itself. An operation on such tensors alone runs at once and is noted. Where one of the results meets the input or
a state, a number takes its place. In every call of the neuron the noted operations run once before the kernel, and
their results are the kernel's parameters.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from .trace import StepTraceError, at, caller

_IN_PLACE = re.compile(
    r"__(setitem|i(add|sub|mul|matmul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift))__|\w*[^_]_"
)


class _Result(NamedTuple):
    """Stands for a tensor in a noted call, by the number of the parameter or result that it is."""

    number: int


@dataclass(frozen=True)
class Prologue:
    """Operations on parameters, in order, and the results that a kernel takes.

    :param paths: the paths of the parameters, which have the first numbers; each call's results have the next ones
    :param calls: for each call its function, the leaves and the tree of its arguments, and whether it has a gradient
    :param taken: the numbers of the results that are a kernel's parameters, by the parameter's name
    """

    paths: tuple[str, ...]
    calls: tuple[tuple[Callable[..., Any], tuple[Any, ...], Any, bool], ...]
    taken: Mapping[str, int]

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the kernel's parameters, by name, from the neuron's tensors, by path."""
        values: list[Any] = [tensors.get(path) for path in self.paths]  # None for one that the step does not read
        for function, leaves, tree, with_gradient in self.calls:
            arguments = (values[leaf.number] if isinstance(leaf, _Result) else leaf for leaf in leaves)
            args, kwargs = tree_unflatten(list(arguments), tree)
            with nullcontext() if with_gradient else torch.no_grad():
                values += _tensors_in(function(*args, **kwargs))
        return {name: values[number] for name, number in self.taken.items()}


class _Shape(tuple[int, ...]):
    """The shape of a stand-in for the input or a state. It can only be passed on, and compared with another."""

    def _refuse(self, *args: Any) -> Any:
        raise StepTraceError(
            "it reads the shape of its input or of a state in Python, which a kernel does not know; give parameters a "
            f"shape that broadcasts, such as [C, 1, 1]{at(caller())}"
        )

    __len__ = __getitem__ = __iter__ = __contains__ = __add__ = __radd__ = __mul__ = __rmul__ = numel = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse

    def __eq__(self, other: object) -> bool:
        return True if isinstance(other, _Shape) else self._refuse()

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]


SHAPES = {Tensor.shape.__get__, Tensor.size}  # type: ignore[attr-defined]
# Before torch 2.11, torch's parser of arguments crashes on a tuple whose class defines __len__.
_stand_in_shape = _Shape if torch.__version__ >= "2.11" else torch.Size
_TOLD = (bool, types.NoneType, str, torch.dtype, torch.device, torch.layout)
"""Answers about its input and its states that a step may have, besides tensors."""

_OF_SHAPE = {
    Tensor.is_contiguous, Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
    Tensor.H.__get__, Tensor.mT.__get__, Tensor.mH.__get__,  # type: ignore[attr-defined]
}  # fmt: skip
"""What a step may not ask, although a tensor or a bool answers: for a single number the answer tells nothing."""


class Hoisting(TorchFunctionMode):
    """Notes what a step computes from ``tensors`` alone, and refuses to tell the shape of the input and the states.

    :param tensors: the neuron's own tensors, by path
    :param names: the names of the effective parameters, which a result must not have
    :param numbers: the numbers that stand for results, by name; None in a run that finds out which results are taken
    :param passes_shapes: whether a shape may be passed on, as to ``x.new_zeros(x.shape)``
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], names: Collection[str], numbers: Mapping[str, Tensor] | None = None,
        passes_shapes: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self._passes_shapes = passes_shapes
        self._names = names
        self._gradients = torch.is_grad_enabled()
        self._paths = tuple(tensors)
        self._values = list(tensors.values())
        self._number_of = {id(tensor): number for number, tensor in enumerate(self._values)}
        self._origin = dict(enumerate(self._paths))
        self._calls: list[tuple[Any, ...]] = []
        self._numbers = numbers
        self._taken: dict[str, int] = {}
        self._stand_ins: dict[int, Tensor] = {}

    def prologue(self) -> Prologue:
        return Prologue(self._paths, tuple(self._calls), dict(self._taken))

    def taken(self) -> dict[str, Tensor]:
        """The results that the step takes, by name."""
        return {name: self._values[number] for name, number in self._taken.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            leaves, tree = tree_flatten((args, kwargs or {}))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            ours = [self._is_ours(tensor) for tensor in tensors]
            if not any(ours):
                if func in SHAPES:
                    passed_on = len(leaves) == 1 and self._passes_shapes
                    return _stand_in_shape() if passed_on else _Shape()._refuse()
                result = func(*args, **(kwargs or {}))
                if func in _OF_SHAPE or not (isinstance(result, _TOLD) or _tensors_in(result)):
                    _Shape()._refuse()
                return result
            if all(ours):
                return self._compute(func, leaves, tree)
            mixed = [self._stand_in(leaf) if self._is_ours(leaf) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(mixed, tree)
            return func(*args, **kwargs)

    def _is_ours(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and id(leaf) in self._number_of

    def _compute(self, func: Any, leaves: Sequence[Any], tree: Any) -> Any:
        name = getattr(func, "__name__", "")
        first = next(self._number_of[id(leaf)] for leaf in leaves if self._is_ours(leaf))
        origin = self._origin[first]
        if name in ("item", "tolist", "numpy", "__array__"):
            raise StepTraceError(_in_python(origin))
        if _in_autograd_function():
            raise StepTraceError(
                f"it gives the parameter {origin!r} alone to an autograd function, of which a kernel has the gradient "
                f"neuron by neuron; give it the parameter + torch.zeros_like(x){at(caller())}"
            )
        if _IN_PLACE.fullmatch(name):
            raise StepTraceError(
                f"it changes {origin!r} in place{at(caller())}; a step may change states alone: register {origin!r} "
                "with register_memory"
            )
        if name == "to":  # a traced x is on the CPU, wherever the neuron is
            leaves = [leaf for leaf in leaves if not isinstance(leaf, torch.device)]
        args, kwargs = tree_unflatten(leaves, tree) if name != "to" else _arguments(leaves)
        with _disable_current_modes(), Guard(origin):
            result = func(*args, **kwargs)
        results = _tensors_in(result)
        if results:
            noted, tree = tree_flatten((args, kwargs))
            noted = [_Result(self._number_of[id(leaf)]) if self._is_ours(leaf) else leaf for leaf in noted]
            without_gradient = self._gradients and not torch.is_grad_enabled()  # the step itself says no_grad
            self._calls.append((func, tuple(noted), tree, not without_gradient))
        for tensor in results:
            number = len(self._values)
            self._values.append(tensor)
            self._number_of.setdefault(id(tensor), number)
            self._origin[number] = origin
        return result

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """The number that takes the place of a parameter or result."""
        number = self._number_of[id(tensor)]
        if number not in self._stand_ins:
            is_parameter = number < len(self._paths)
            name = self._origin[number] if is_parameter else f"{self._origin[number]}_{number}"
            name = f"raw_{name}" if name in self._names else name
            self._taken[name] = number
            scalar = (self._numbers or {}).get(name)
            scalar = torch.full((), 0.5) if scalar is None else scalar
            self._stand_ins[number] = scalar != 0 if tensor.dtype == torch.bool else scalar
        return self._stand_ins[number]


def _in_autograd_function() -> bool:
    """Whether a call comes from the forward of an autograd function; from torch 2.15 on, of one that takes ctx."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        arguments = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        first = frame.f_locals.get(arguments[0]) if arguments else None
        if frame.f_code is _APPLY or isinstance(first, torch.autograd.function.FunctionCtx):
            return True
        frame = frame.f_back
    return False


_APPLY = getattr(getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None)


def _arguments(leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``Tensor.to``, reduced to the tensor and a dtype."""
    dtype = next((leaf for leaf in leaves if isinstance(leaf, torch.dtype)), None)
    tensor = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
    return (tensor, tensor.dtype if dtype is None else dtype), {}


class Guard(TorchDispatchMode):
    """Refuses operations on parameters that draw random numbers or read a tensor's value in Python."""

    def __init__(self, origin: str) -> None:
        super().__init__()
        self._origin = origin

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise StepTraceError(f"{func._schema.name} draws random numbers{at(caller())}")
        if func._schema.name in ("aten::_local_scalar_dense", "aten::equal"):
            raise StepTraceError(_in_python(self._origin))
        return func(*args, **(kwargs or {}))


def _in_python(origin: str) -> str:
    return (
        f"it reads the value of {origin!r} in Python (.item(), if, float()){at(caller())}, which would stay as it is "
        "now; compute with the tensor instead"
    )


def _tensors_in(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
