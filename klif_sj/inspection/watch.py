"""Watch spiking layers while a network runs: the spikes of all passes are counted, and a sample of one is replayed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import steps
from ..fuse.fused import own_class
from ..neuron.states import NOT_KEPT
from .learned import effective_threshold, learned_parameters
from .replay import RANGE, Call, Replay, has_surrogate, replay, threshold_scale
from .result import LayerInspection, Potential
from .statistics import MOST_STEPS, LayerStatistics

RATE_BINS = 20
UNLIKE = 1e-3
"""A note says so if equations and layer differ in more than this share of the spikes."""

ENOUGH = 4096
"""This many potentials of a layer are sampled even if they are most of the potentials of the batch."""

STEPS_EXPECTED = 8
"""In single-step mode T is not known beforehand. The size of the sample is chosen for this T."""


def is_spiking_layer(module: nn.Module) -> bool:
    """Whether a module is a spiking neuron: SpikingJelly's, ours, or another one that charges as they do."""
    return is_spiking_class(own_class(module))


def is_spiking_class(cls: type) -> bool:
    """Whether a class is one of spiking neurons; see :func:`is_spiking_layer`."""
    return steps.is_neuron(cls) and not any("NonSpiking" in base.__name__ for base in cls.__mro__)


def spiking_layers_of(net: nn.Module) -> dict[str, nn.Module]:
    """The spiking layers of a network by name, without a final ``.neuron``. A layer within another one is left out."""
    layers: dict[str, nn.Module] = {}
    prefixes: tuple[str, ...] = ()
    for path, module in net.named_modules():
        if is_spiking_layer(module) and not path.startswith(prefixes or ("\0",)):
            layers[path.removesuffix(".neuron") or type(module).__name__] = module
            prefixes += (f"{path}.",)
    return layers


class Layer:
    """One spiking layer that is watched."""

    def __init__(self, name: str, node: nn.Module) -> None:
        self.name, self.node = name, node
        self.statistics = LayerStatistics()
        self.calls: list[Call] = []
        self.after_spikes: bool | None = None
        self.notes: list[str] = []
        self.replayed: Replay | None = None
        self.reached: Tensor | None = None
        self._parameters: dict[str, Any] = {}
        self._step = 0
        self._begun: tuple[int, dict[str, Any] | None, bool] = (0, None, False)
        self._closed = False

    def before(self) -> None:
        """Note the states from which a call starts; only ``after`` gets the input of the call."""
        memories: dict[str, Any] = getattr(self.node, "_memories", {})
        single = _is_single_step(self.node)
        fresh = not single or _is_reset(memories, getattr(self.node, "_memories_rv", {}))
        carried = any(isinstance(state, Tensor) and state.requires_grad for state in memories.values())
        step = 0 if fresh else self._step
        self._begun = step, dict(memories) if step == 0 else None, carried

    def after(self, x: Tensor, spikes: Tensor, sampled: int) -> Tensor:
        """Add a finished call.

        :param sampled: how many potentials of this pass are to be sampled; 0 for none
        :return: whether all values were finite, as a tensor
        """
        step, states, carried = self._begun
        self._begun = (0, None, False)
        single = _is_single_step(self.node)
        if sampled and not self._closed:
            if self.calls and (step == 0 or not single or len(self.calls) == MOST_STEPS):
                self._closed = True
            else:
                self._sample(x, spikes, states, carried, single, sampled)
        if single:
            x, spikes = x.unsqueeze(0), spikes.unsqueeze(0)
            self._step = step + 1
        return self.statistics.add(x.detach(), spikes.detach(), step)

    def _sample(
        self, x: Tensor, spikes: Tensor, states: dict[str, Any] | None, carried: bool, single: bool, values: int
    ) -> None:
        if not x.is_floating_point() or x.shape != spikes.shape:
            shapes = f"{tuple(x.shape)} of {x.dtype} and {tuple(spikes.shape)}"
            self._note(f"no potentials: expected an input and spikes of one shape, got {shapes}")
            return
        batch = x.shape[0 if single else 1]
        if self.calls:
            inputs = self.calls[0].x.shape[0]
        else:
            per_input = max(x.numel() // batch * (STEPS_EXPECTED if single else 1), 1)
            inputs = max(1, min(batch, values // per_input, max(batch // 8, ENOUGH // per_input)))
            self._parameters = {
                name: value if value is None else nn.Parameter(value.detach().clone(), value.requires_grad)
                for name, value in self.node._parameters.items()
            }
        part = (slice(inputs),) if single else (slice(None), slice(inputs))
        if states is not None:
            states = {
                name: state[:inputs].detach().clone()
                if isinstance(state, Tensor) and state.ndim and len(state) == batch
                else state
                for name, state in states.items()
            }
        grad = torch.is_grad_enabled()
        call = Call(x.detach()[part].clone(), single, states, carried or not grad, spikes.detach()[part].clone())
        self.calls.append(call)
        if spikes.requires_grad:

            def keep(gradient: Tensor) -> None:
                call.gradient = gradient.detach()[part].clone()
                reached = gradient.any()
                self.reached = reached if self.reached is None else self.reached | reached

            spikes.register_hook(keep)

    def replay(self) -> None:
        """Replay the sample for its potentials and gradients, and delete it."""
        calls, self.calls, self._closed = self.calls, [], False
        if not calls:
            return
        if not has_surrogate(self.node):
            self._note("no potentials: the neuron has no surrogate_function")
            return
        try:
            self.replayed = replay(self.node, self._parameters, calls, threshold_scale(effective_threshold(self.node)))
        except Exception as error:  # the neuron's own code is not meant to run like this
            self._note(f"no potentials: {type(error).__name__}: {error}")
            return
        if self.replayed.unlike > UNLIKE:
            self._note(
                f"{100 * self.replayed.unlike:.2g} % of the sampled spikes are not those that the equations of its "
                "class give, of which the potentials are"
            )

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def result(self, is_first: bool) -> LayerInspection:
        """What was found about the layer."""
        statistics, replayed = self.statistics, self.replayed
        rates = statistics.rate_by_neuron()
        if statistics.unlike:
            self._note(f"{statistics.unlike} calls had steps of another shape: rates by neuron leave them out")
        potential = None
        if replayed is not None and replayed.values:
            figures = (
                replayed.counts,
                replayed.below,
                replayed.above,
                replayed.covered,
                replayed.near,
                replayed.distance,
            )
            potential = Potential(replayed.scale, -RANGE, RANGE, *figures, replayed.values, replayed.inputs)
        threshold = effective_threshold(self.node)
        return LayerInspection(
            name=self.name,
            neuron=own_class(self.node).__name__,
            steps=statistics.steps,
            shape=statistics.neurons,
            inputs=statistics.inputs,
            rate=statistics.rate(),
            rate_by_step=statistics.rate_by_step(),
            rate_by_channel=(rates.flatten(1).mean(1) if rates.ndim > 1 else rates.flatten()).tolist(),
            rate_histogram=[int(count) for count in torch.histc(rates.clamp(0, 1), RATE_BINS, 0, 1)],
            never=float((rates == 0).double().mean()),
            always=float((rates >= 1).double().mean()),
            potential=potential,
            temporal=None if replayed is None else replayed.temporal,
            gradient=None if replayed is None else replayed.gradient,
            reached=None if self.reached is None else bool(self.reached),
            parameters=learned_parameters(self.node),
            input_changes=statistics.input_changes,
            after_spikes=not is_first if self.after_spikes is None else self.after_spikes,
            integrates_only=isinstance(threshold, float) and math.isinf(threshold),
            notes=list(self.notes),
        )


class Watch:
    """Watches any spiking layers, and keeps them in the order in which they first run.

    :param values: how many potentials of each layer are sampled in a pass of which a sample is taken
    """

    def __init__(self, values: int) -> None:
        self.values = values
        self.layers: dict[int, Layer] = {}
        self.sampling = False
        self.not_finite: dict[str, Tensor] = {}
        """For each layer of the current pass, in the order of calls, whether any value was not finite."""
        self._made_by: dict[Any, str] = {}

    def before(self, name: str, node: nn.Module) -> None:
        """A layer is about to be called."""
        layer = self.layers.get(id(node))
        if layer is None:
            layer = self.layers[id(node)] = Layer(self._unused(name), node)
        layer.before()

    def _unused(self, name: str) -> str:
        """The name, with a number if another layer has the name already, as a script may run several networks."""
        taken = {layer.name for layer in self.layers.values()}
        return next(
            candidate for candidate in chain([name], (f"{name} #{n}" for n in count(2))) if candidate not in taken
        )

    def after(self, node: nn.Module, x: Any, spikes: Any) -> None:
        """A layer was called."""
        layer = self.layers.get(id(node))
        if layer is None or not isinstance(x, Tensor) or not isinstance(spikes, Tensor) or not spikes.numel():
            return
        if self.sampling and layer.after_spikes is None and x.grad_fn is not None:
            layer.after_spikes = self._comes_from_spikes(x)
        finite = layer.after(x, spikes, self.values if self.sampling else 0)
        broken = finite.logical_not()
        before = self.not_finite.get(layer.name)
        self.not_finite[layer.name] = broken if before is None else before | broken
        if self.sampling and spikes.grad_fn is not None:
            self._made_by[spikes.grad_fn] = layer.name

    def _comes_from_spikes(self, x: Tensor) -> bool:
        """Whether this input comes from a spiking layer, according to the autograd graph of the pass."""
        if not self._made_by:
            return False
        seen, ahead = set(), [x.grad_fn]
        while ahead:
            node = ahead.pop()
            if node in self._made_by:
                return True
            if node is not None and node not in seen:
                seen.add(node)
                ahead += [following for following, _ in node.next_functions]
        return False

    def end_of_pass(self, had_loss: bool = False) -> str | None:
        """Replay the sample of the pass; returns the name of the first layer with NaN or infinite values, if any.

        :param had_loss: whether the pass was run backward, which cannot be seen here if no gradient reached any layer
        """
        flags, self.not_finite = self.not_finite, {}
        if self.sampling:
            self._made_by.clear()
            went_backward = had_loss or any(layer.reached is not None for layer in self.layers.values())
            for layer in self.layers.values():
                if went_backward and layer.calls and layer.reached is None:
                    layer.reached = torch.tensor(False)
                layer.replay()
            self.sampling = False
        if flags and bool(torch.stack([flag.cpu() for flag in flags.values()]).any()):
            return next(name for name, flag in flags.items() if flag)
        return None

    @property
    def has_gradient(self) -> bool:
        """Whether the gradient of a loss has reached a layer whose sample was replayed."""
        return any(layer.replayed is not None and layer.replayed.gradient for layer in self.layers.values())

    def results(self) -> dict[str, LayerInspection]:
        """What was found about each layer that ran, by name."""
        ran = [layer for layer in self.layers.values() if layer.statistics.steps]
        return {layer.name: layer.result(position == 0) for position, layer in enumerate(ran)}

    def bytes_held(self) -> int:
        """The memory that is held between passes, in bytes."""
        return sum(layer.statistics.bytes_held() for layer in self.layers.values())

    @contextmanager
    def attached(self, layers: dict[str, nn.Module]) -> Iterator[None]:
        """Watch these layers, which are given by name, within the block."""
        handles = []
        for name, node in layers.items():
            handles.append(node.register_forward_pre_hook(lambda node, _, name=name: self.before(name, node)))
            handles.append(node.register_forward_hook(self._hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, node: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], spikes: Any) -> None:
        self.after(node, next(iter((*inputs, *named.values())), None), spikes)


def starts_a_pass(layers: Iterable[Layer]) -> bool:
    """Whether a call of a network begins a pass, so that none of its layers continues a sequence of single steps."""
    return all(
        not _is_single_step(layer.node) or _is_reset(layer.node._memories, layer.node._memories_rv)  # type: ignore[arg-type]
        for layer in layers
    )


def _is_single_step(node: nn.Module) -> bool:
    return getattr(node, "step_mode", "m") == "s"


def _is_reset(memories: dict[str, Any], reset: dict[str, Any]) -> bool:
    """Whether all states are as a reset leaves them."""
    return all(
        state is NOT_KEPT or (state.equal(reset[name]) if isinstance(reset.get(name), Tensor) else False)
        if isinstance(state, Tensor)
        else True
        for name, state in memories.items()
        if name not in ("v_seq", "time_step")
    )
