"""Parameter groups for the optimizer of a network with neurons that learn."""

from __future__ import annotations

from typing import Any

from spikingjelly.activation_based.neuron import BaseNode
from spikingjelly.activation_based.surrogate import SurrogateFunctionBase
from torch import nn
from torch.nn.parameter import is_lazy


def parameter_groups(
    net: nn.Module, lr: float, weight_decay: float = 0.0, *, gate_lr_ratio: float = 0.1
) -> list[dict[str, Any]]:
    """A network's parameters in the groups in which GLIF's authors train them.

    ==========  ============================================================  ======================  ================
    name        parameters                                                    lr                      weight_decay
    ==========  ============================================================  ======================  ================
    weights     all others                                                    ``lr``                  ``weight_decay``
    neurons     those of all SpikingJelly neurons and surrogates, also ours   ``lr``                  0
    gates       those that a neuron class names in ``gate_parameters``        ``lr * gate_lr_ratio``  0
    ==========  ============================================================  ======================  ================

    Weight decay would pull a neuron's parameter to 0, which is no neutral value for it. A group without parameters is
    left out; frozen parameters are in, so that they learn once they are unfrozen. The list goes to any torch
    optimizer::

        torch.optim.SGD(parameter_groups(net, lr=0.1, weight_decay=4e-5), momentum=0.9)

    Source: the training code of the authors of GLIF (Yao et al., NeurIPS 2022).

    :raises ValueError: for a network with parameters that are not initialised yet
    """
    uninitialized = [name for name, parameter in net.named_parameters() if is_lazy(parameter)]
    if uninitialized:
        raise ValueError(
            f"expected initialised parameters, got uninitialised {', '.join(uninitialized)}: call the network once "
            "with a batch, or load a checkpoint, before its optimizer is built"
        )
    neurons, gates = {}, {}
    for module in net.modules():
        if isinstance(module, BaseNode | SurrogateFunctionBase):
            neurons.update({id(parameter): parameter for parameter in module.parameters()})
            names = getattr(module, "gate_parameters", ())
            gates.update({id(p): p for name, p in module.named_parameters(recurse=False) if name in names})
    weights = [parameter for parameter in net.parameters() if id(parameter) not in neurons]
    groups = [
        {"name": "weights", "params": weights, "lr": lr, "weight_decay": weight_decay},
        {
            "name": "neurons",
            "params": [parameter for key, parameter in neurons.items() if key not in gates],
            "lr": lr,
            "weight_decay": 0.0,
        },
        {"name": "gates", "params": list(gates.values()), "lr": lr * gate_lr_ratio, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
