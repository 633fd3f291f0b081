"""The stand-in for ``self`` on which a neuron's methods run while a step is traced, and the record of what they read.

The neuron itself stays as it is. A read goes through :class:`Scope`, which returns tensors of the trace for states and
parameters, and notes every other value in :class:`Reads`. A write stays in the scope. A traced step therefore depends
only on what was noted. Such a setting may be an attribute of the neuron, of a nested module, of any other object that
the neuron holds, or of a class; or it is a global or closed-over variable of a method.
"""

from __future__ import annotations

import copy
import dis
import enum
import functools
import keyword
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .trace import StepTraceError, at, caller

PLAIN = (
    bool, int, float, complex, str, bytes, types.NoneType, types.EllipsisType, range, slice, enum.Enum, np.generic,
    torch.dtype, torch.device, torch.layout, torch.memory_format, types.ModuleType,
)  # fmt: skip
"""Types of immutable values, which are compared as they are."""

CONTAINERS = (tuple, list, dict, set, frozenset)

CALLABLES = (
    types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, type, functools.partial, np.ufunc,
    torch.jit.ScriptFunction, torch._ops.OpOverload, torch._ops.OpOverloadPacket,
)  # fmt: skip
"""Types of callables that are compared by identity."""

_FIXED_MODULES = sys.stdlib_module_names | {"torch", "numpy", "builtins"}
"""Packages whose globals count as constants."""

_CHANGING = ("datetime", "numpy.random", "os", "random", "secrets", "time", "uuid")
"""Modules whose functions return another value in every call."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_ABSENT = object()


class Effective:
    """The effective parameters of one time step, read as attributes by a neuron's equations."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"no effective parameter {name!r}; effective_parameters() is to return it")
        return self._values[name]


class Scope:
    """``self`` of one step. It takes a name from ``values`` or else from ``owner``, whose attributes are noted.

    :param owner: a neuron, or an object that it holds at ``path``
    :param values: states, parameters and what the step writes, by dotted name
    :param states: the names that a step may write
    :param reads: the record in which reads are noted
    """

    __slots__ = ("_scope_owner", "_scope_path", "_scope_reads", "_scope_states", "_scope_values")

    def __init__(
        self, owner: Any, values: dict[str, Any], states: tuple[str, ...], reads: Reads, path: str = ""
    ) -> None:
        for name, value in zip(Scope.__slots__, (owner, path, reads, states, values), strict=True):
            object.__setattr__(self, name, value)
        reads.note_owner(path, owner)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The owner's class, so that ``super()`` and ``isinstance`` take the scope for the owner."""
        return type(self._scope_owner)

    def __getattr__(self, name: str) -> Any:
        owner, key, reads = self._scope_owner, self._scope_path + name, self._scope_reads
        if key in self._scope_values:
            value = self._scope_values[key]
            if key not in self._scope_states and isinstance(value, Tensor):
                reads.tensors[key] = None
            return value
        if key == "_memories":  # SpikingJelly's dict of states
            return _Memories(self)
        if name == "__dict__":
            raise StepTraceError(f"it reads all attributes of {type(owner).__name__} at once; read them by name")
        member = next((base.__dict__[name] for base in type(owner).__mro__ if name in base.__dict__), None)
        if isinstance(member, property | functools.cached_property):
            function = member.fget if isinstance(member, property) else member.func
            reads.note_method(type(owner), name, self._scope_path)
            return function(self)  # type: ignore[misc]
        attributes = getattr(owner, "__dict__", {})
        if isinstance(member, types.FunctionType | classmethod | staticmethod) and name not in attributes:
            reads.note_method(type(owner), name, self._scope_path)
            return member.__get__(self, type(owner))
        try:
            value = getattr(owner, name)
        except AttributeError:
            reads.note_absence(self._scope_path, name)
            raise
        return self._wrap(name, value)

    def _wrap(self, name: str, value: Any) -> Any:
        """Return what the step gets for a value of the owner, and note the value unless it is a tensor."""
        reads, key = self._scope_reads, self._scope_path + name
        if isinstance(value, Tensor):
            return value  # it is no tensor of the trace, so the tracer refuses to compute with it
        if isinstance(value, types.MethodType):
            reads.note_owner(f"{key}.", value)
            reads.note(f"{key}.", "__func__", value.__func__)
            if value.__self__ is self._scope_owner:
                reads.note_own_method(self._scope_path, name)
                return types.MethodType(value.__func__, self)
            owner = Scope(value.__self__, self._scope_values, (), reads, f"{key}.__self__.")
            return types.MethodType(value.__func__, owner)
        if isinstance(value, (*PLAIN, *CONTAINERS, *CALLABLES, np.ndarray)):
            return reads.note(self._scope_path, name, value)
        if hasattr(value, "__dict__"):
            return Scope(value, self._scope_values, (), reads, f"{key}.")
        raise StepTraceError(
            f"it reads {key!r}, of type {type(value).__name__}, whose changes cannot be seen; keep numbers there, or "
            "tensors that are registered as parameters or buffers"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._scope_states:
            raise StepTraceError(
                f"it sets {self._scope_path + name!r}, which is no state; register it with register_memory (a "
                f"FusedNode's own go into `states`) if the next step reads it, else use a local variable{at(caller())}"
            )
        self._scope_values[name] = value

    def __delattr__(self, name: str) -> None:
        raise StepTraceError(f"it deletes {self._scope_path + name!r}{at(caller())}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self._scope_owner
        if not isinstance(owner, nn.Module):
            self._scope_reads.note_method(type(owner), "__call__", self._scope_path)
            return type(owner).__call__(self, *args, **kwargs)
        self._scope_reads.note_call(self._scope_path)
        if any(getattr(owner, hooks) for hooks in _HOOKS):
            raise StepTraceError(f"hooks are registered on {self._scope_path.rstrip('.')!r}, which no kernel can run")
        return self.forward(*args, **kwargs)

    def __getitem__(self, index: Any) -> Any:
        if f"{self._scope_path}{index}" in self._scope_values:
            return getattr(self, str(index))
        return self._wrap(str(index), self._scope_owner[index])

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        return len(self._scope_owner)


class _Memories(MutableMapping[str, Any]):
    """The states of a scope by name, as SpikingJelly's own code reads and writes them."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def __getitem__(self, name: str) -> Any:
        if name not in self._scope._scope_states:
            raise KeyError(name)
        return getattr(self._scope, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._scope, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self._scope, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._scope._scope_states)

    def __len__(self) -> int:
        return len(self._scope._scope_states)


def note_methods(scope: Scope, *names: str) -> None:
    """Note methods of a scope's owner that are called without being read from the scope."""
    cls = type(scope._scope_owner)
    for name in names:
        if hasattr(cls, name):
            scope._scope_reads.note_method(cls, name, scope._scope_path)


@dataclass
class _Owner:
    """What a step read of one object: the neuron, or an object that it holds."""

    cls: type
    settings: dict[str, tuple[Any, type]] = field(default_factory=dict)
    """By name, the value in comparable form, and its type, because 1, 1.0 and True are equal."""
    methods: dict[str, Any] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    own_methods: set[str] = field(default_factory=set)
    is_called: bool = False


class Reads:
    """What the trace of a step read of a neuron and its surroundings, and the values that it found there."""

    def __init__(self) -> None:
        self.tensors: dict[str, None] = {}
        """The neuron's own parameters and buffers that were read, by dotted name, in order."""
        self._owners: dict[str, _Owner] = {}
        self._given: list[tuple[str, Any, Any]] = []  # containers that the step got and must not change
        self._bases: dict[type, dict[str, Any]] = {}
        self._variables: dict[tuple[int, str], _Variable] = {}
        self._analysed: set[types.CodeType] = set()
        self._constants: dict[str, Any] = {}

    # These methods note reads while a step is traced.

    def note(self, path: str, name: str, value: Any) -> Any:
        """Note a setting of the object at a path, and return what the step gets: a copy if the value can change."""
        key = path + name
        comparable = _comparable(value, key)
        self._owners[path].settings[name] = comparable, type(value)
        if isinstance(value, bool | int | float | str | types.NoneType):
            self._constants[key] = value
        if isinstance(value, types.FunctionType):
            self._analyse(value)
        if isinstance(value, functools.partial):
            self._analyse(value.func)
        if not isinstance(value, (list, dict, set, np.ndarray)):
            return value
        given = copy.deepcopy(value)
        self._given.append((key, comparable, given))
        return given

    def note_owner(self, path: str, owner: Any) -> None:
        if path not in self._owners:
            self._owners[path] = _Owner(type(owner))

    def note_own_method(self, path: str, name: str) -> None:
        """Note a method that is set on the object itself and takes the place of its class's method."""
        self._owners[path].own_methods.add(name)

    def note_call(self, path: str) -> None:
        """Note that a module is called, which runs its hooks."""
        self._owners[path].is_called = True

    def note_absence(self, path: str, name: str) -> None:
        self._owners[path].absent.add(name)

    def note_method(self, cls: type, name: str, path: str) -> None:
        """Note a class's method, and the definitions in its bases that this method takes the place of and may call."""
        self._owners[path].methods[name] = getattr(cls, name)
        for position, base in enumerate(base for base in cls.__mro__ if name in base.__dict__):
            if _is_fixed(base.__module__):
                continue
            member = base.__dict__[name]
            if position:
                self._bases.setdefault(base, {})[name] = member
            for function in _functions_of(member):
                self._analyse(function, cls)

    def _analyse(self, function: Any, cls: type | None = None) -> None:
        """Note a function's globals, its closed-over variables and, if it reads ``__class__``, the class attributes."""
        function = _unwrapped(function)
        if not isinstance(function, types.FunctionType) or _is_fixed(function.__module__):
            return
        # Closed-over variables are read from the function. The reference to it is weak, because what it closes over
        # may lead back to the neuron.
        reference = weakref.ref(function)
        cells = {name: f"().__closure__[{i}].cell_contents" for i, name in enumerate(function.__code__.co_freevars)}
        for name in ("__defaults__", "__kwdefaults__"):
            if getattr(function, name) is not None:  # where there are none, the caller passes every argument
                self._note_variable(reference, f"().{name}", [], f"{function.__name__}.{name}")
        self._analyse_code(function.__code__, function, reference, cells, cls)

    def _analyse_code(
        self, code: types.CodeType, function: types.FunctionType, reference: weakref.ref[Any], cells: Mapping[str, str],
        cls: type | None,
    ) -> None:  # fmt: skip
        if code in self._analysed:
            return
        self._analysed.add(code)
        if cls is not None and "__class__" in code.co_names:
            for base in cls.__mro__:
                plain = {n: v for n, v in vars(base).items() if isinstance(v, PLAIN) and not n.startswith("__")}
                if plain and not _is_fixed(base.__module__):
                    self._bases.setdefault(base, {}).update(plain)
        instructions = list(dis.get_instructions(code))
        for position, instruction in enumerate(instructions):
            name = instruction.argval
            if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                raise StepTraceError(f"{code.co_name} sets the global {name!r}, which a kernel would do once at most")
            if instruction.opname == "STORE_DEREF" and name in cells:
                raise StepTraceError(f"{code.co_name} sets the variable {name!r} of the function around it")
            if instruction.opname == "IMPORT_NAME":
                _refuse_changing(sys.modules.get(name), name)
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and name in function.__globals__:
                where: tuple[Any, str] = function.__globals__, f"[{name!r}]"
            elif instruction.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF") and name in cells:
                where = reference, cells[name]
            else:
                continue
            attributes = []
            for following in instructions[position + 1 :]:
                if following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                    break
                attributes.append(following.argval)
            self._note_variable(*where, attributes, name)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._analyse_code(constant, function, reference, cells, cls)

    def _note_variable(self, home: Any, expression: str, attributes: list[str], name: str) -> None:
        """Note a variable of a method, or the value to which a chain of attributes leads from there.

        :param home: the globals, or a weak reference to the function that closes over the variable
        :param expression: Python that, written after ``home``, reads the variable
        """
        value: Any = _Variable(home, expression, name).read()
        for attribute in attributes:
            _refuse_changing(value, name)
            if isinstance(value, (*PLAIN, *CONTAINERS, Tensor)) and not isinstance(value, types.ModuleType):
                break
            following = getattr(value, attribute, _ABSENT)
            if _is_fixed(_home(value)) and not isinstance(following, types.ModuleType):
                return
            value, name, expression = following, f"{name}.{attribute}", f"{expression}.{attribute}"
        _refuse_changing(value, name)
        if isinstance(value, (types.ModuleType, Tensor)) or value is _ABSENT:
            return
        if isinstance(value, types.MethodType):
            self._analyse_autograd_function(value.__self__)
        elif isinstance(value, CALLABLES):
            if isinstance(value, type) or _is_fixed(_home(value)):
                return
            self._analyse(value)
        by_attributes = not isinstance(value, (*PLAIN, *CONTAINERS, *CALLABLES, np.ndarray, types.MethodType))
        if by_attributes and not hasattr(value, "__dict__"):
            return
        variable = _Variable(home, expression, name, by_attributes)
        variable.value = _comparable(variable.read(), name, hold=True)
        self._variables[id(home), expression] = variable

    def _analyse_autograd_function(self, cls: Any) -> None:
        """Analyse the methods of a user's torch.autograd.Function, because its ``apply`` calls them."""
        if isinstance(cls, type) and issubclass(cls, torch.autograd.Function) and not _is_fixed(cls.__module__):
            for name in ("forward", "setup_context", "backward"):
                self._analyse(getattr(cls, name))

    def refuse_side_effects(self) -> None:
        """:raises StepTraceError: if the step has changed a container, a variable or an attribute that it read"""
        changed = [key for key, comparable, given in self._given if comparable != given]
        changed += [variable.name for variable in self._variables.values() if variable.value != variable.read()]
        for cls, members in self._bases.items():
            changed += [f"{cls.__name__}.{name}" for name in members if vars(cls).get(name, _ABSENT) != members[name]]
        if changed:
            raise StepTraceError(f"it changes {changed[0]!r}, which a kernel would do once at most")

    # These properties serve the comparison in every call.

    @functools.cached_property
    def find(self) -> Callable[[Any], tuple[Tensor, ...] | None]:
        """A function that returns a neuron's tensors that were read, in order; or None if another value has changed.

        It runs in every call, so it is generated as one flat function with a comparison for each value that was read.
        """
        return _Guard(self._owners, self._bases, self._variables.values(), self.tensors).compiled()

    @functools.cached_property
    def constants(self) -> list[tuple[str, Any]]:
        """The numbers and strings that were read, by dotted name. They guard a compiled graph."""
        return list(self._constants.items())


@dataclass
class _Variable:
    """A global, a default or a closed-over variable of a method.

    :param home: the globals, or a weak reference to the function, where the variable is read
    :param expression: Python that, written after ``home``, reads the variable
    :param name: the variable's name in messages
    :param by_attributes: whether the object's plain attributes are compared, because it may be of any class
    :param value: the value that was found, in comparable form
    """

    home: Any
    expression: str
    name: str
    by_attributes: bool = False
    value: Any = None

    def read(self) -> Any:
        try:
            value = eval(f"home{self.expression}", {"home": self.home})
        except (AttributeError, KeyError, ValueError):  # it is gone, or not yet set
            return _ABSENT
        return _plain_attributes(value) if self.by_attributes else value


class _Guard:
    """Writes the text of :attr:`Reads.find`, and holds the values that it compares with."""

    def __init__(
        self, owners: Mapping[str, _Owner], bases: Mapping[type, Mapping[str, Any]],
        variables: Iterable[_Variable], tensors: Iterable[str],
    ) -> None:  # fmt: skip
        self._values: dict[str, Any] = {"tensor": _tensor_at, "plain": _plain_attributes}
        self._objects = {"": "node"}
        lines = [line for path, owner in owners.items() if path for line in self._find_object(path, owner, owners)]
        conditions = [f"type({self._objects[path]}) is {self._value(owner.cls)}" for path, owner in owners.items()]
        for path, owner in owners.items():
            conditions += self._of_object(self._objects[path], owner)
        for cls, members in bases.items():
            attributes = self._value(cls.__dict__)
            conditions += [self._same(f"{attributes}[{name!r}]", value) for name, value in members.items()]
        for variable in variables:
            access = f"{self._value(variable.home)}{variable.expression}"
            conditions.append(self._same(f"plain({access})" if variable.by_attributes else access, variable.value))
        paths = list(tensors)
        conditions += [self._tensor(path, number) for number, path in enumerate(paths)]
        result = "".join(f"t{number}, " for number in range(len(paths)))
        body = (*lines, f"if {' and '.join(conditions or ['True'])}:", f"    return ({result})")
        self._text = "".join(f"        {line}\n" for line in body)

    def compiled(self) -> Callable[[Any], tuple[Tensor, ...] | None]:
        gone = "(AttributeError, KeyError, ValueError)"
        text = f"def find(node):\n    try:\n{self._text}    except {gone}:\n        pass\n    return None\n"
        exec(compile(text, "<what a traced step read>", "exec"), self._values)
        find: Callable[[Any], tuple[Tensor, ...] | None] = self._values["find"]
        return find

    def _value(self, value: Any) -> str:
        """Hold a value, and return its name in the text."""
        name = f"v{len(self._values)}"
        self._values[name] = value
        return name

    def _find_object(self, path: str, owner: _Owner, owners: Mapping[str, _Owner]) -> Iterator[str]:
        parent_path, _, name = path.rstrip(".").rpartition(".")
        parent = self._objects[f"{parent_path}." if parent_path else ""]
        holder = self._objects[path] = f"o{len(self._objects)}"
        attribute = _attribute(parent, name)
        if all(issubclass(cls, nn.Module) for cls in (owner.cls, owners[f"{parent_path}." if parent_path else ""].cls)):
            attribute = f"{parent}._modules[{name!r}] if {name!r} in {parent}._modules else {attribute}"
        yield f"{holder} = {attribute}"

    def _of_object(self, holder: str, owner: _Owner) -> Iterator[str]:
        for name, (value, cls) in owner.settings.items():
            yield self._same(_attribute(holder, name), value, cls)
        for name, method in owner.methods.items():
            yield self._same(_attribute(self._value(owner.cls), name), method)
        if owner.methods:
            yield f"{holder}.__dict__.keys().isdisjoint({self._value(frozenset(owner.methods))})"
        if owner.is_called:
            yield f"not ({' or '.join(f'{holder}.{hooks}' for hooks in _HOOKS)})"
        for name in owner.own_methods:
            yield f"{holder}.{name}.__self__ is {holder}"
        for name in owner.absent:
            yield f"not hasattr({holder}, {name!r})"

    def _same(self, expression: str, value: Any, cls: type | None = None) -> str:
        """The condition that an expression gives the same object as before, or an equal one of the same type."""
        if isinstance(value, _Same):
            return f"{self._value(value.get)}() is {expression}"
        constant = self._value(value)
        of_type = "" if cls is None else f"type(v) is {self._value(cls)} and "
        return f"((v := {expression}) is {constant} or {of_type}{constant} == v)"

    def _tensor(self, path: str, number: int) -> str:
        """The condition that there is a tensor at a path. In a module's ``_parameters`` there are tensors and None."""
        owner, _, name = path.rpartition(".")
        holder = self._objects[f"{owner}." if owner else ""]
        parameters = f"{holder}._parameters"
        elsewhere = f"tensor({holder}, {name!r})"
        return f"(t{number} := {parameters}[{name!r}] if {name!r} in {parameters} else {elsewhere}) is not None"


def _tensor_at(holder: Any, name: str) -> Tensor | None:
    value = getattr(holder, name)
    return value if isinstance(value, Tensor) else None


def _attribute(holder: str, name: str) -> str:
    plain = name.isidentifier() and not keyword.iskeyword(name)
    return f"{holder}.{name}" if plain else f"getattr({holder}, {name!r})"


class _Same:
    """Equals one object alone, which it does not keep alive if the object allows a weak reference."""

    def __init__(self, value: Any) -> None:
        try:
            self.get: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self.get = lambda: value

    def __eq__(self, other: object) -> bool:
        return self.get() is other

    __hash__ = None  # type: ignore[assignment]


class _Array:
    """Equals an array of the same type, shape and values."""

    def __init__(self, value: np.ndarray) -> None:
        self._value = value.copy()

    def __eq__(self, other: object) -> bool:
        return type(other) is np.ndarray and other.dtype == self._value.dtype and np.array_equal(other, self._value)

    __hash__ = None  # type: ignore[assignment]


def _comparable(value: Any, key: str, hold: bool = False) -> Any:
    """A copy that equals the value as long as a trace would be the same. Functions are compared by identity.

    :param hold: whether a function may be kept alive, as those of modules may
    :raises StepTraceError: for a container that holds what cannot be compared
    """
    if isinstance(value, np.ndarray):
        return _Array(value)
    if isinstance(value, PLAIN) or value is _ABSENT:
        return value
    if isinstance(value, (*CALLABLES, types.MethodType)):
        return value if hold else _Same(value)
    if isinstance(value, dict):
        return {name: _comparable(item, f"{key}[{name!r}]", hold) for name, item in value.items()}
    if isinstance(value, tuple):
        items = [_comparable(item, f"{key}[{index}]", hold) for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_comparable(item, f"{key}[{index}]", hold) for index, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return copy.copy(value)
    raise StepTraceError(
        f"it reads {key}, a {type(value).__name__} in a container, whose changes cannot be seen; register modules in "
        "an nn.ModuleList and tensors as parameters or buffers"
    )


def _plain_attributes(value: Any) -> dict[str, Any]:
    """The attributes of immutable types and the arrays of an object that a method finds in a variable."""
    attributes = {n: v for n, v in vars(value).items() if isinstance(v, (*PLAIN, np.ndarray)) and n != "training"}
    for name, module in getattr(value, "_modules", {}).items():
        attributes |= {f"{name}.{n}": v for n, v in _plain_attributes(module).items()}
    return attributes


def _functions_of(member: Any) -> list[Any]:
    """The functions behind a class's method, property or cached property."""
    if isinstance(member, property):
        return [member.fget]
    if isinstance(member, functools.cached_property):
        return [member.func]
    return [getattr(member, "__func__", member)]


def _unwrapped(function: Any) -> Any:
    """The function beneath decorators that use functools.wraps."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _home(value: Any) -> str | None:
    """The name of a module, or of the module that defines a class or function; empty for any other object."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    return getattr(value, "__module__", None) if isinstance(value, CALLABLES) else ""


def _refuse_changing(value: Any, name: str) -> None:
    """:raises StepTraceError: for a value that returns something else in every call, such as a clock"""
    owner = getattr(value, "__self__", None) if isinstance(value, types.BuiltinFunctionType) else None
    if isinstance(value, types.ModuleType):
        home = value.__name__
    elif owner is None or isinstance(owner, types.ModuleType):
        home = (value if isinstance(value, CALLABLES) else type(value)).__module__ or ""
    else:
        home = type(owner).__module__
    if any(f"{home}.".startswith(f"{module}.") for module in _CHANGING) or hasattr(type(value), "__next__"):
        raise StepTraceError(
            f"it uses {name!r}, which gives another value in every call, where a kernel would have the first one; "
            "compute such a value before the call and keep it as a setting, a parameter or a buffer"
        )


def _is_fixed(module: str | None) -> bool:
    return module is None or module.partition(".")[0] in _FIXED_MODULES
