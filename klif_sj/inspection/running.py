"""Inspect all spiking networks that a program runs, without a change of the program."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .findings import Finding, Thresholds, find_all
from .inspector import not_finite_finding
from .result import Inspection, LayerInspection
from .tables import counted
from .watch import Watch, is_spiking_layer, starts_a_pass

WINDOW = 200
"""A report covers this many passes, so that it describes the end of the program and not its whole run."""


class _Window:
    """The latest passes of one kind: those with a gradient, or those without."""

    def __init__(self, values: int) -> None:
        self.values = values
        self.watch = Watch(values)
        self.passes = 0
        self.total = 0
        self.latest: tuple[int, dict[str, LayerInspection]] = (0, {})
        self.broken: Finding | None = None

    def begin(self) -> None:
        """Begin a pass, and end the one before it."""
        self.end()
        if self.passes == WINDOW:
            self.latest = self.passes, self.watch.results()
            self.watch, self.passes = Watch(self.values), 0
        self.passes += 1
        self.total += 1
        self.watch.sampling = self.passes == 1 or (torch.is_grad_enabled() and not self.watch.has_gradient)

    def end(self) -> None:
        """End the pass, if there is one."""
        broken = self.watch.end_of_pass()
        if broken is not None and self.broken is None:
            self.broken = not_finite_finding(broken, self.total, "its input or its output is not finite")

    def results(self) -> tuple[int, dict[str, LayerInspection]]:
        """The number of passes and the layers of the latest full window, or of the first one if it is not full yet."""
        self.end()
        return self.latest if self.latest[1] else (self.passes, self.watch.results())


class inspecting:
    """Within the block, the spiking layers of all networks that run are watched, in the thread that made this object.

    Afterwards :meth:`inspections` says what they did. Layers within ``torch.compile`` are not seen.
    """

    def __init__(self, title: str, *, sampled_potentials: int = 100_000, thresholds: Thresholds | None = None) -> None:
        self.title, self.thresholds = title, thresholds or Thresholds()
        self._windows = {grad: _Window(sampled_potentials) for grad in (True, False)}
        self._window = self._windows[False]
        self._stack: list[nn.Module] = []
        self._within: list[nn.Module] = []
        self._names: dict[int, str] = {}
        self._kinds: dict[type, bool] = {}
        self._busy = False
        self._thread = threading.get_ident()

    def __enter__(self) -> inspecting:
        self._handles = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, always_call=True),
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _ignores(self) -> bool:
        return self._busy or torch.compiler.is_compiling() or threading.get_ident() != self._thread

    def _is_layer(self, module: nn.Module) -> bool:
        kind = type(module)
        if kind not in self._kinds:
            self._kinds[kind] = is_spiking_layer(module)
        return self._kinds[kind]

    def _before(self, module: nn.Module, inputs: Any) -> None:
        if self._ignores():
            return
        if not self._stack:
            self._begin()
        self._stack.append(module)
        if self._is_layer(module):
            if not self._within:
                self._window.watch.before(self._name(module), module)
            self._within.append(module)

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._ignores() or not self._stack or self._stack[-1] is not module:
            return
        self._stack.pop()
        if self._within and self._within[-1] is module:
            self._within.pop()
            if not self._within and inputs:
                self._window.watch.after(module, inputs[0], output)

    def _begin(self) -> None:
        """A network is called, and no other module calls it."""
        window = self._windows[torch.is_grad_enabled()]
        if window is self._window and window.total and not starts_a_pass(window.watch.layers.values()):
            return
        self._window = window
        self._busy = True  # the replay calls modules too, which are not to be watched
        try:
            window.begin()
        finally:
            self._busy = False

    def _name(self, layer: nn.Module) -> str:
        if id(layer) not in self._names:
            network = self._stack[0]
            self._names.update((id(module), name) for name, module in network.named_modules() if name)
        return self._names.get(id(layer), type(layer).__name__).removesuffix(".neuron")

    def inspections(self) -> list[Inspection]:
        """An inspection of the passes with a gradient and one of the passes without, if there were any."""
        self._busy = True
        inspections = []
        for grad, window in self._windows.items():
            passes, layers = window.results()
            if not layers:
                continue
            findings = [] if window.broken is None else [window.broken]
            findings += find_all(layers.values(), self.thresholds)
            passes_text = counted(window.total, "pass", "passes")
            notes = [f"{passes_text} {'with' if grad else 'without'} a gradient; this is of the latest {passes}."]
            inputs = max(layer.inputs for layer in layers.values())
            title = f"{self.title}, {'training' if grad else 'no gradient'}"
            inspections.append(
                Inspection(title, self.title, inputs, passes, layers, findings, self.thresholds, None, notes)
            )
        return inspections
