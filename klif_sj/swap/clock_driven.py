"""Names of SpikingJelly 0.0.0.0.12, such as ``clock_driven.neuron.MultiStepLIFNode``, for code that was never ported.

Later, the package ``clock_driven`` was renamed to ``activation_based``, and the two classes of a layer became one class
with a step mode. 0.0.0.0.14 still ships the old package beside the new one, with classes of its own; 2.x no longer has
it. Within :func:`old_names`, the old package means the new one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

import spikingjelly
from torch import nn

from .. import _compat
from .neuron_settings import constructor_parameters

OLD, NEW = "spikingjelly.clock_driven", "spikingjelly.activation_based"

MODULES = ("base", "encoding", "functional", "layer", "monitor", "neuron", "rnn", "surrogate")
"""The modules whose names mean the same in both packages, except the names in ``RENAMED`` and a few that are gone."""

OTHERS = ("ann2snn", "cu_kernel_opt", "examples", "lava_exchange", "model", "neuron_kernel", "spike_op", "tensor_cache")
"""The old package's other parts. Those of 0.0.0.0.14 are used as they are; in 2.x they are gone or have changed."""

RENAMED: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "neuron": {
        f"MultiStep{name}": (name, {"step_mode": "m"}) for name in ("IFNode", "LIFNode", "ParametricLIFNode", "EIFNode")
    },
    "layer": {
        "MultiStepDropout": ("Dropout", {"step_mode": "m"}),
        "MultiStepDropout2d": ("Dropout2d", {"step_mode": "m", "p": 0.5}),
        "MultiStepTemporalWiseAttention": ("TemporalWiseAttention", {}),
        **{f"MultiStepThresholdDependentBatchNorm{d}d": (f"ThresholdDependentBatchNorm{d}d", {}) for d in (1, 2, 3)},
    },
}
"""For each module, the old name of a class, its new name, and the arguments with which it behaves as the old class."""

GONE = {"backend", "cupy_fp32_inference", "lava_s_cale"}
"""Arguments of the old classes that choose an implementation. The new classes may lack them."""


class _RenamedType(type):
    """The type of a class that stands for another one with some arguments given.

    It stands for that class in a call, in ``isinstance``, and as a base class.
    """

    stands_for: tuple[str, str]
    given: dict[str, Any]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "stands_for" not in vars(cls):
            return super().__call__(*args, **kwargs)  # cls derives from a renamed class
        meant = cls.meant()
        return meant(*args, **cls.arguments(meant, args, kwargs))

    def meant(cls) -> Any:
        """The class that the new name means now. It may be the stand-in of a :class:`klif_sj.patched` block."""
        module, name = cls.stands_for
        return getattr(importlib.import_module(module), name)

    def arguments(cls, meant: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The new class's keyword arguments, without those in ``GONE`` that it lacks; a stand-in has a backend."""
        parameters = constructor_parameters(meant)
        known = {"backend"} if hasattr(meant, "patch") else set(parameters)
        given = {name: value for name, value in cls.given.items() if name not in parameters[: len(args)]}
        return {**given, **{name: value for name, value in kwargs.items() if name not in GONE - known}}

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.meant()) if "stands_for" in vars(cls) else super().__instancecheck__(instance)


def _renamed(module: str, old: str, new: str, given: dict[str, Any]) -> type:
    """The class that the old name means."""
    original = getattr(importlib.import_module(f"{NEW}.{module}"), new)

    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original.__init__(self, *args, **renamed.arguments(original, args, kwargs))

    namespace = {"__init__": init, "__module__": f"{OLD}.{module}", "__doc__": original.__doc__}
    renamed: Any = _RenamedType(old, (original,), namespace)
    renamed.stands_for, renamed.given = (f"{NEW}.{module}", new), given
    return renamed


def _translated(module: str) -> ModuleType:
    """A module of the old package, with all names of the new module and the old names of renamed classes."""
    new = importlib.import_module(f"{NEW}.{module}")
    translated = ModuleType(f"{OLD}.{module}", f"{NEW}.{module} under the name that it had")
    vars(translated).update({name: value for name, value in vars(new).items() if not name.startswith("__")})
    for old, (name, given) in RENAMED.get(module, {}).items():
        setattr(translated, old, _renamed(module, old, name, given))
    translated.__getattr__ = _gone(translated.__name__)  # type: ignore[method-assign]
    return translated


def _gone(module: str) -> Callable[[str], Any]:
    """A module's ``__getattr__``, which explains that the new package lacks a name of the old one."""

    def __getattr__(name: str) -> Any:
        if name.startswith("_") or (module == OLD and name in OTHERS):  # this part is not imported yet
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        raise ImportError(
            f"{module}.{name} of SpikingJelly 0.0.0.0.12 was not only renamed: klif_sj cannot translate it. Port this "
            f"part of the code to {NEW}, or run it on spikingjelly 0.0.0.0.14, which still has it"
        )

    return __getattr__


def _package(name: str, path: list[str]) -> ModuleType:
    package = ModuleType(name, f"{NEW} under the name that it had")
    package.__path__ = path
    package.__getattr__ = _gone(name)  # type: ignore[method-assign]
    return package


@contextmanager
def old_names() -> Iterator[None]:
    """Let the old names mean the new modules and classes, in modules that have imported them and for later imports."""
    if getattr(sys.modules.get(OLD), "__path__", None) is _PATH:
        yield  # this block is within another one
        return
    before = {name: sys.modules.pop(name) for name in _loaded()}
    attribute = vars(spikingjelly).get("clock_driven")
    _PATH[:] = [f"{folder}/clock_driven" for folder in spikingjelly.__path__]
    package, translated = _package(OLD, _PATH), {f"{OLD}.{name}": _translated(name) for name in MODULES}
    missing = [f"{OLD}.{name}" for name in OTHERS if not PathFinder.find_spec(f"{OLD}.{name}", _PATH)]
    parts = {**translated, **{name: _package(name, []) for name in missing}}
    vars(package).update({name.rpartition(".")[2]: module for name, module in parts.items()})
    renewed = [*_renew(_meanings(before, translated))]
    sys.modules |= {OLD: package, **parts}
    spikingjelly.clock_driven = package
    try:
        with _compat.with_set_backend():
            yield
    finally:
        for name in _loaded():
            del sys.modules[name]
        sys.modules |= before
        for names, name, old, new in renewed:
            if names.get(name) is new:
                names[name] = old
        del spikingjelly.clock_driven
        if attribute is not None:
            spikingjelly.clock_driven = attribute


_PATH: list[str] = []
"""The ``__path__`` of the old package within a block: the folders of its parts that are not translated."""


def _loaded() -> list[str]:
    return [name for name in sys.modules if name == OLD or name.startswith(f"{OLD}.")]


def _meanings(before: Mapping[str, ModuleType], translated: Mapping[str, ModuleType]) -> dict[int, tuple[Any, Any]]:
    """By id, each object of the old package that was imported before, and the new object that replaces it."""
    pairs = []
    for path, new in translated.items():
        old = before.get(path)
        if old is not None:
            own_names = [
                n for n, value in vars(old).items() if getattr(value, "__module__", None) == path and n in vars(new)
            ]
            pairs += [(old, new), *((vars(old)[name], vars(new)[name]) for name in own_names)]
    return {id(old): (old, new) for old, new in pairs}


def _renew(meanings: Mapping[int, tuple[Any, Any]]) -> Iterator[tuple[dict[str, Any], str, Any, Any]]:
    """Replace the old objects among the global names of all loaded modules.

    Yields for each replacement the module's names, the name, the old object and the new one.
    """
    for module in [*sys.modules.values()] if meanings else []:
        names = vars(module) if isinstance(module, ModuleType) else {}
        for name, value in [*names.items()]:
            if id(value) in meanings:
                old, names[name] = meanings[id(value)]
                yield names, name, old, names[name]
