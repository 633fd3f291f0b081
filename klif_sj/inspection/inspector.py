"""``inspect`` runs a network over batches and shows what its spiking layers do, and why they do not learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from .. import _compat
from .findings import Finding, Thresholds, find_all
from .not_finite import first_not_finite, is_finite
from .operations import NO_COUNTERS, Operations, count_operations
from .result import Inspection
from .watch import Watch, spiking_layers_of

__all__ = ["inspect"]

Loss = Callable[[Any, Any], Tensor]
Forward = Callable[[nn.Module, Any], Any]


def inspect(
    net: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    forward: Forward | None = None,
    thresholds: Thresholds | None = None,
    sampled_potentials: int = 100_000,
    counted_inputs: int = 1,
    title: str = "",
) -> Inspection:
    """See what the spiking layers of a network do, and why they do not learn.

    Every batch is run once, from reset states, in the mode that the network is in. The firing rates are means over all
    batches. The first batch is also run backward. Then the equations of each layer are run again in eager torch, on the
    first inputs of this batch, which shows the potentials before firing and their gradients. The statistics that are
    kept grow neither with T nor with the number of batches.

    Afterwards the network's parameters, gradients, buffers and states are as they were, and so are torch's random
    generators.

    :param net: any network with spiking layers, of any class, fused or not, in multi-step or single-step mode
    :param batches: pairs of an input and its target, or inputs alone; tensors are moved to the network's device
    :param loss: ``loss(output, target)``, which returns a scalar. None takes the cross-entropy if the targets are
        classes ``[N]``, of the output or, if it is ``[T, N, classes]``, of its mean over time; and the mean squared
        error if the targets have the output's shape. Without a loss or targets there is no gradient of a loss.
    :param forward: ``forward(net, x)``, which runs one whole pass; None calls ``net(x)``. A network in single-step mode
        needs it if a call is one time step: ``lambda net, x: sum(net(x) for _ in range(T))``
    :param thresholds: the limits beyond which a figure is a finding
    :param sampled_potentials: the largest number of potentials to sample in each layer. Whole inputs are sampled, at
        least one, and at most an eighth of the batch if this eighth has thousands of potentials.
    :param counted_inputs: the number of inputs of the first batch on which operations are counted, which takes two
        eager passes; 0 counts none
    :param title: the name of the network in the report
    :return: the inspection: ``print`` it for a table, ``save`` it for a page, ``compare`` it with another one

    :raises TypeError: for an object that is no network
    :raises ValueError: for a network without spiking layers, if there is no batch, if no spiking layer runs, or for a
        loss that is no scalar
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net: expected a network, got {net!r}")
    layers = spiking_layers_of(net)
    if not layers:
        raise ValueError(f"net: expected spiking layers, got a {type(net).__name__} without any neuron of SpikingJelly")
    _check_count("sampled_potentials", sampled_potentials, 1)
    _check_count("counted_inputs", counted_inputs, 0)
    run = forward or (lambda net, x: net(x))
    watch, limits = Watch(sampled_potentials), thresholds or Thresholds()
    notes: list[str] = []
    findings: list[Finding] = []
    operations = None
    number = inputs = 0
    with _left_as_it_was(net), torch.random.fork_rng(_gpus(net)):
        for number, batch in enumerate(batches, start=1):
            x, target = _parts(batch, _device(net))
            had_loss = False
            functional.reset_net(net)
            with watch.attached(layers):
                if number == 1:
                    watch.sampling = True
                    why_not = _backward(net, run, x, target, loss)
                    notes += why_not
                    had_loss = not why_not
                else:
                    with torch.no_grad():
                        run(net, x)
            broken = watch.end_of_pass(had_loss)
            if broken is not None and not findings:
                functional.reset_net(net)
                findings.append(_not_finite(net, run, x, number, broken))
            if number == 1 and counted_inputs:
                functional.reset_net(net)
                operations = _operations(net, run, x, target, counted_inputs, notes)
    if not number:
        raise ValueError("batches: expected at least one, got none")
    results = watch.results()
    if not results:
        raise ValueError(f"net: none of its {len(layers)} spiking layers ran; expected a forward that calls them")
    inputs = max(layer.inputs for layer in results.values())
    notes += [f"The layer {name} did not run." for name in layers if name not in results]
    findings += find_all(results.values(), limits)
    return Inspection(
        title or type(net).__name__, type(net).__name__, inputs, number, results, findings, limits, operations, notes
    )


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _device(net: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in (*net.parameters(), *net.buffers())), None)


def _gpus(net: nn.Module) -> list[torch.device]:
    device = _device(net)
    return [device] if device is not None and device.type == "cuda" else []


def _parts(batch: Any, device: torch.device | None) -> tuple[Any, Any]:
    """The input and the target of a batch, moved to a device. The target is None if the batch has none."""
    x, target = (batch[0], batch[1]) if isinstance(batch, list | tuple) and len(batch) > 1 else (batch, None)
    if isinstance(x, list | tuple) and len(x) == 1:
        (x,) = x
    return tuple(part.to(device) if isinstance(part, Tensor) else part for part in (x, target))  # type: ignore[return-value]


@contextmanager
def _left_as_it_was(net: nn.Module) -> Iterator[None]:
    """Restores states and buffers after the block, such as the statistics of batch normalisation."""
    stateful: list[Any] = [module for module in net.modules() if hasattr(module, "_memories")]
    states = [dict(module._memories) for module in stateful]
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    try:
        yield
    finally:
        for module, memories in zip(stateful, states, strict=True):
            module.reset()
            module._memories.update(memories)
        with torch.no_grad():
            for name, buffer in net.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


def _backward(net: nn.Module, run: Forward, x: Any, target: Any, loss: Loss | None) -> list[str]:
    """Run one pass forward and backward, without adding to any parameter's gradient.

    Returns a note that says why there was no backward pass, or nothing if there was one.
    """
    learned = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if isinstance(x, Tensor) and x.is_floating_point():
        # With a gradient of the input, the backward pass reaches also the layers before the first parameter.
        x = x.detach().requires_grad_()
        learned.append(x)
    with torch.enable_grad():
        value = _loss(run(net, x), target, loss)
        if value is None:
            return ["There was no target or loss, so there is no gradient of a loss; the temporal gradient needs none."]
        if not value.requires_grad:
            return ["The loss depends on no parameter, so there is no gradient of it."]
        torch.autograd.grad(value, learned, allow_unused=True)
    return []


def _loss(output: Any, target: Any, loss: Loss | None) -> Tensor | None:
    if loss is not None:
        value = loss(output, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: expected a scalar tensor, got {got}")
        return value.reshape(())
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return None
    is_classes = target.ndim == 1 and not target.is_floating_point()
    if output.ndim == 3 and is_classes:
        output = output.mean(0)
    if is_classes and output.ndim == 2 and len(output) == len(target):
        return F.cross_entropy(output, target.long())
    return F.mse_loss(output, target) if output.shape == target.shape else None


def _operations(net: nn.Module, run: Forward, x: Any, target: Any, inputs: int, notes: list[str]) -> Operations | None:
    """Count the operations on the first inputs of a batch, or on the whole batch if its batch dimension is unknown."""
    if _compat.operation_counters() is None:
        notes.append(f"{NO_COUNTERS}.")
        return None
    counted = len(target) if isinstance(target, Tensor) and target.ndim else 0
    if isinstance(x, Tensor) and counted:
        dim = next((d for d in range(min(2, x.ndim)) if x.shape[d] == counted), None)
        if dim is not None:
            counted = min(inputs, counted)
            x = x.narrow(dim, 0, counted)
    elif isinstance(x, Tensor):
        counted = len(x)
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        return count_operations(net, [x], max(counted, 1), run)
    except Exception as error:  # SpikingJelly's counters do not know every operation of every network
        notes.append(f"No operations were counted: {type(error).__name__}: {error}")
        return None
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def _not_finite(net: nn.Module, run: Forward, x: Any, batch: int, layer: str) -> Finding:
    """Run a batch once more to find the first module whose input is finite and whose output is not."""
    name, where = layer, "its input or its output is not finite"
    if not is_finite(x):
        where = "the batch itself holds values that are not finite"
    else:
        inner = ((name, module) for name, module in net.named_modules() if name)
        first = first_not_finite(inner, lambda: run(net, x))
        if first is not None:
            name, kind = first
            where = f"the input of this {kind} is finite, its output is not"
    return not_finite_finding(name, batch, f"{where}; the first spiking layer that it reaches is {layer}")


def not_finite_finding(name: str, batch: int, where: str) -> Finding:
    """The finding of NaN or infinite values in a batch; the text ``where`` says where they begin."""
    return Finding(
        "not-finite",
        name,
        math.nan,
        0.0,
        f"NaN or infinite values, first in batch {batch}: {where}.",
        "A neuron whose potential is NaN does not fire: the loss may stay a number while the weights become NaN.",
        "A smaller learning rate, gradient clipping, 32-bit precision; look for a division by zero or the logarithm of "
        "zero in the data.",
    )
