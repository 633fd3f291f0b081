"""The two SpikingJelly lines, and everything that differs between them.

No other file of the package may ask which SpikingJelly is installed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from spikingjelly.activation_based import base, functional, neuron, surrogate
from spikingjelly.activation_based.neuron import BaseNode as _BaseNode
from torch import nn

logger = logging.getLogger(__name__)

SPIKINGJELLY_2 = hasattr(base.MemoryModule, "single_step_functional_forward")
LINE = "2.x" if SPIKINGJELLY_2 else "0.0.0.0.14"


if SPIKINGJELLY_2:
    BaseNode = _BaseNode
else:

    class BaseNode(_BaseNode):  # type: ignore[no-redef]
        """``BaseNode`` for 0.0.0.0.14's AttributeMonitor, which asks ``__getattr__`` for plain attributes too."""

        def __getattr__(self, name: str) -> Any:
            attributes = self.__dict__
            return attributes[name] if name in attributes else super().__getattr__(name)


def init_base_node(
    node: _BaseNode,
    v_threshold: float,
    v_reset: float | None,
    surrogate_function: Callable,
    detach_reset: bool,
    step_mode: str,
) -> None:
    """Run ``BaseNode.__init__``. The old line's also takes a backend; it does not know ours, so it gets ``'torch'``."""
    options: dict[str, Any] = {} if SPIKINGJELLY_2 else {"backend": "torch"}
    _BaseNode.__init__(
        node,
        v_threshold=v_threshold,
        v_reset=v_reset,
        surrogate_function=surrogate_function,
        detach_reset=detach_reset,
        step_mode=step_mode,
        store_v_seq=False,
        **options,
    )


def init_surrogate(function: surrogate.SurrogateFunctionBase, spiking: bool, **parameters: Any) -> None:
    """Run ``SurrogateFunctionBase.__init__`` with the function's parameters.

    2.x takes any parameters by keyword. 0.0.0.0.14 takes only ``alpha``, so the others are set as attributes.
    """
    if SPIKINGJELLY_2:
        surrogate.SurrogateFunctionBase.__init__(function, spiking=spiking, **parameters)
        return
    surrogate.SurrogateFunctionBase.__init__(function, parameters.pop("alpha"), spiking)
    for name, value in parameters.items():
        setattr(function, name, value)


def spiking_neurons() -> dict[str, type[base.MemoryModule]]:
    """SpikingJelly's spiking neurons by name: the subclasses of ``BaseNode``, and 2.x's ``GatedLIFNode``."""
    others = {"GatedLIFNode"} if SPIKINGJELLY_2 else set()
    return {
        name: value
        for name, value in vars(neuron).items()
        if name in others or (isinstance(value, type) and issubclass(value, _BaseNode) and value is not _BaseNode)
    }


def kernel_precision(node: nn.Module) -> Any:
    """The precision that 2.x's conversion has set for its own kernels of this neuron; None if it has set none."""
    return getattr(node, "_neuron_precision", None)


def operation_counters() -> Any:
    """2.x's module of operation counters and energy estimates; None on 0.0.0.0.14, which has none."""
    if not SPIKINGJELLY_2:
        return None
    from spikingjelly.activation_based import op_counter

    return op_counter


@contextmanager
def with_set_backend() -> Iterator[None]:
    """Give ``functional`` 0.0.0.0.14's ``set_backend``, which 2.x has dropped, for neurons that have a choice."""

    def set_backend(net: nn.Module, backend: str, instance: Any = nn.Module) -> None:
        for module in net.modules():
            if isinstance(module, instance) and hasattr(module, "supported_backends"):
                if backend in module.supported_backends:
                    module.backend = backend
                else:
                    logger.warning("%s goes on with backend %r: %r cannot serve", module, module.backend, backend)

    if not SPIKINGJELLY_2:
        yield
        return
    functional.set_backend = set_backend
    try:
        yield
    finally:
        del functional.set_backend


def forget_reset_lists(net: nn.Module) -> None:
    """Drop the lists of resettable modules that 2.x caches for ``reset_net``: a list is stale after a replacement.

    2.x caches a list for the network that was reset, which may be a part of ``net``, or may contain ``net``.
    """
    if SPIKINGJELLY_2:
        for module in {*net.modules(), *functional.net_config._RESET_MODULE_CACHE}:
            functional.invalidate_reset_cache(module)


def extract_recordings(reader: Any, downloaded: Path, extracted: Path) -> None:
    """Unpack the archives of a ``spikingjelly.datasets`` class into a folder."""
    with _quiet_and_on_todays_numpy():
        reader.extract_downloaded_files(downloaded, extracted)


def convert_recordings(reader: Any, extracted: Path, events: Path) -> None:
    """Have a ``spikingjelly.datasets`` class write its raw recordings as .npz files into the empty folder ``events``.

    In 0.0.0.0.14 the method has another name and drops the errors of its threads, so a file that it cannot read is
    missing afterwards. 2.x raises the error.
    """
    with _quiet_and_on_todays_numpy():
        (reader.create_raw_from_extracted if SPIKINGJELLY_2 else reader.create_events_np_files)(extracted, events)


@contextmanager
def _quiet_and_on_todays_numpy() -> Iterator[None]:
    """Silence 0.0.0.0.14, which prints a line for each file, and give it names that NumPy has dropped since."""
    if SPIKINGJELLY_2:
        yield
        return
    from spikingjelly.datasets import cifar10_dvs

    cifar10_dvs.np = SimpleNamespace(**{**vars(np), "bool": bool, "fromstring": np.frombuffer})
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        cifar10_dvs.np = np
