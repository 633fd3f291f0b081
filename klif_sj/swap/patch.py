"""Within a ``patched`` block, code that builds SpikingJelly's neurons builds others instead."""

from __future__ import annotations

import difflib
import inspect
import sys
import types
from collections.abc import Mapping
from types import ModuleType, TracebackType
from typing import Any

from torch import nn

from ..runtime import unavailable
from .clock_driven import old_names
from .neuron_settings import SPIKING_NEURONS, can_be_built, constructor_parameters
from .swap_report import SwapReport, SwapRow
from .translate import check_overrides, translate


class patched:
    """Within the ``with`` block, code that builds one of SpikingJelly's neurons gets another neuron instead::

        with klif_sj.patched(LIFNode=KLIFNode) as patch:
            net = spiking_resnet18(spiking_neuron=neuron.LIFNode, tau=3.0)
        print(patch.report)

    Within the block, the name means the new neuron in every module that has imported it before, and in modules that are
    imported there. On exit every name gets its old meaning back, also after an exception. Blocks nest, and the inner
    one wins. The block does not replace a class that code refers to in another way before the block starts: in a dict,
    a default argument or a ``functools.partial``. The change affects the whole process, with all its threads. Within
    the block SpikingJelly's own class cannot be pickled, because no name refers to it.

    The code's arguments first build SpikingJelly's neuron, with the defaults of its constructor. Then this neuron is
    translated as :func:`swap_neurons` does it. ``isinstance(x, LIFNode)`` is true of both. A class that derives from
    ``LIFNode`` derives from SpikingJelly's class, is not swapped, and is listed in the report.

    Within the block, code for SpikingJelly 0.0.0.0.12 finds its names too: ``spikingjelly.clock_driven`` means
    ``activation_based``, and ``MultiStepLIFNode`` is ``LIFNode`` in multi-step mode. The argument ``backend`` is also
    understood on 2.x, which does not have it. A backend that cannot serve here becomes ``'auto'``, and the report says
    so.

    :param overrides: arguments for every new neuron
    :param swaps: names of SpikingJelly's neuron classes, and the class that replaces each

    :raises TypeError: for a class that is no neuron, or an override that a new neuron does not know
    :raises ValueError: for a name that SpikingJelly's neurons do not have
    """

    def __init__(self, *, overrides: Mapping[str, Any] | None = None, **swaps: type[nn.Module]) -> None:
        if not swaps:
            raise TypeError("expected at least one swap, such as LIFNode=KLIFNode")
        self.rows: list[SwapRow] = []
        self.left_alone: dict[str, str] = {}
        self.names: list[str] = []
        """The global names that the block has given a new meaning, as ``module.NAME``."""
        self._entered = False
        self._swaps: dict[type, tuple[type[nn.Module], dict[str, Any]]] = {}
        for name, cls in swaps.items():
            if name not in SPIKING_NEURONS:
                nearest = difflib.get_close_matches(name, SPIKING_NEURONS, n=3) or sorted(SPIKING_NEURONS)
                raise ValueError(f"SpikingJelly has no neuron {name!r} here; did you mean {' or '.join(nearest)}?")
            if not can_be_built(cls):
                raise TypeError(f"{name}: expected a class of spiking neurons, got {cls!r}")
            self._swaps[SPIKING_NEURONS[name]] = (cls, check_overrides(cls, overrides or {}))

    @property
    def report(self) -> SwapReport:
        """The neurons that were built so far, numbered in the order of their construction. It has nothing to undo."""
        return SwapReport(tuple(self.rows), dict(self.left_alone))

    def __enter__(self) -> patched:
        if self._entered:
            raise RuntimeError(
                "expected a new klif_sj.patched(...) for every with block, got one that was used already"
            )
        self._entered = True
        self._old_names = old_names()
        self._old_names.__enter__()
        self._stand_ins = {original: _stand_in(original, self) for original in self._swaps}
        self._meant = {}
        for original, stand_in in self._stand_ins.items():
            # What the name means now: SpikingJelly's class, or the stand-in of an enclosing block.
            self._meant[stand_in] = _active.get(original, [original])[-1]
            _active.setdefault(original, [original]).append(stand_in)
        self.names = _rebind({meant: stand_in for stand_in, meant in self._meant.items()})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for original, stand_in in self._stand_ins.items():
            _active[original].remove(stand_in)
        _rebind(self._meant)
        self._old_names.__exit__(None, None, None)

    def build(self, original: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        """The new neuron that replaces ``original(*args, **kwargs)``."""
        cls, overrides = self._swaps[original]
        backend = kwargs.get("backend")
        if "backend" not in constructor_parameters(original) or (backend and unavailable(backend)):
            kwargs.pop("backend", None)
        new, entries = translate(original(*args, **kwargs), cls, overrides, backend=backend)
        self.rows.append(SwapRow((f"#{len(self.rows) + 1}",), original, type(new), entries))
        return new


_active: dict[type, list[type]] = {}
"""For each of SpikingJelly's classes, the class itself and its stand-ins in the active blocks, outermost first."""


class _StandInType(type):
    """The type of a class that code calls, tests with ``isinstance`` and derives from in place of another class."""

    patch: patched
    original: type[nn.Module]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls in _active.get(cls.original, ()):
            return cls.patch.build(cls.original, *args, **kwargs)
        # The block has ended, but some code still refers to the stand-in.
        return cls.original(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, (cls.original, cls.patch._swaps[cls.original][0]))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, (cls.original, cls.patch._swaps[cls.original][0]))

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any) -> type:
        """A class that derives from a stand-in derives from SpikingJelly's class instead."""
        stand_ins = [base for base in bases if isinstance(base, _StandInType)]
        if not stand_ins:
            return super().__new__(mcs, name, bases, namespace, **kwargs)
        for base in stand_ins:
            full_name = f"{namespace.get('__module__', '')}.{name}"
            base.patch.left_alone[full_name] = f"a class of its own, derived from {base.original.__name__}"
        originals = tuple(base.original if isinstance(base, _StandInType) else base for base in bases)
        return types.new_class(name, originals, kwargs, lambda new: new.update(namespace))


def _stand_in(original: type[nn.Module], patch: patched) -> type:
    """A class that looks like ``original`` and builds what ``patch`` says."""
    namespace = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    namespace["__signature__"] = inspect.signature(original)
    # Unpickling calls only __new__, and must return SpikingJelly's neuron.
    namespace["__new__"] = lambda cls, *args, **kwargs: original.__new__(original)
    stand_in = _StandInType.__new__(_StandInType, original.__name__, (original,), namespace)
    stand_in.original, stand_in.patch = original, patch  # type: ignore[attr-defined]
    return stand_in


def _rebind(replacements: Mapping[type, type]) -> list[str]:
    """Let the global names of the classes mean their replacements in all loaded modules, except those of this package.

    Returns these names.
    """
    package = __package__.partition(".")[0]
    modules = {id(module): module for module in [*sys.modules.values()] if isinstance(module, ModuleType)}
    by_id = {id(cls): replacement for cls, replacement in replacements.items()}
    rebound = []
    for module in modules.values():
        if module.__name__.partition(".")[0] == package:
            continue
        for name, value in [*vars(module).items()]:
            if id(value) in by_id:
                setattr(module, name, by_id[id(value)])
                rebound.append(f"{module.__name__}.{name}")
    return rebound
