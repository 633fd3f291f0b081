"""Steps of SpikingJelly 2's functional form that call its registered operators: their plain torch is what is fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn

from klif_sj import _compat, check_fused, codegen, fuse

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not _compat.SPIKINGJELLY_2, reason="2.x alone has functional steps"),
]

if _compat.SPIKINGJELLY_2:
    from spikingjelly.activation_based.functional import lif_step

Tensors = tuple[Tensor, ...]
Result = tuple[Tensors, Tensors]


class Filtered(neuron.BaseNode):
    """A synapse's current drives one of SpikingJelly's own steps, for which ``own_step`` is called."""

    def __init__(self, own_step: Callable[..., Tensors], *extra: float, **options: Any) -> None:
        super().__init__(**options)
        self.register_memory("current", 0.0)
        self.leak = nn.Parameter(torch.linspace(-1, 1, 6))
        self.own_step, self.extra = own_step, extra
        if own_step is functional.izhikevich_step:
            self.register_memory("w", 0.0)

    def single_step_functional_forward(self, inputs: Tensors, states: Tensors, **kwargs: Any) -> Result:
        v, current, *others = (state + torch.zeros_like(inputs[0]) for state in states)
        current = current * self.leak.sigmoid() + inputs[0]
        firing = self.v_threshold, self.v_reset, self.surrogate_function, self.detach_reset
        spike, v, *others = self.own_step(current, v, *others, *self.extra, *firing)
        return (spike,), (v, current, *others)


STEPS: dict[str, tuple[float, ...]] = {
    "if_step": (),
    "lif_step": (2.5, True),
    "qif_step": (2.0, 0.8, 0.0, 0.6),
    "eif_step": (2.0, 0.7, 0.9, 0.1),
    "izhikevich_step": (2.0, 0.8, 0.0, 0.6, 3.0, 0.2, 0.1),
}
"""The settings of SpikingJelly's steps, in the order of their arguments."""


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    "options", [{}, {"v_reset": -0.1, "detach_reset": True, "surrogate_function": surrogate.SoftSign()}]
)
def test_a_step_that_calls_a_registered_operator(name: str, options: dict[str, Any]) -> None:
    differences = check_fused(Filtered(getattr(functional, name), *STEPS[name], **options), (3, 6))
    assert differences["spikes (m)"] == 0
    assert "gradient of leak (m)" in differences


class LearnedLeak(neuron.ParametricLIFNode):
    """SpikingJelly's own step, called by super(), on twice the input."""

    def single_step_functional_forward(self, inputs: Tensors, states: Tensors, **kwargs: Any) -> Result:
        (spike,), states = super().single_step_functional_forward((2 * inputs[0],), states, **kwargs)
        return (0.5 * spike,), states


class Imported(neuron.BaseNode):
    """The step was imported by its name."""

    def single_step_functional_forward(self, inputs: Tensors, states: Tensors, **kwargs: Any) -> Result:
        spike, v = lif_step(inputs[0], states[0], 3.0, False, 1.0, 0.0, self.surrogate_function)
        return (spike,), (v,)


@pytest.mark.parametrize("cls", [LearnedLeak, Imported])
def test_the_operator_may_be_called_by_other_names(cls: type[neuron.BaseNode]) -> None:
    node = cls()
    assert check_fused(node)["spikes (m)"] == 0


def test_afterwards_spikingjellys_step_is_its_own_and_the_trace_holds() -> None:
    node, own = Imported(step_mode="m"), lif_step.__code__
    fuse(node)
    x = torch.rand(4, 2, 6)
    node(x)
    assert lif_step.__code__ is own
    traced, _ = codegen.step_of(node, node._kernel_equations, ("v",), (), torch.float32, True)
    again, _ = codegen.step_of(node, node._kernel_equations, ("v",), (), torch.float32, True)
    assert again.program is traced.program

    class Failing(Imported):
        def single_step_functional_forward(self, inputs: Tensors, states: Tensors, **kwargs: Any) -> Result:
            raise LookupError("a mistake")

    with pytest.raises(ValueError, match="LookupError: a mistake"):
        fuse(Failing())
    assert lif_step.__code__ is own


def test_another_operator_is_refused_by_name() -> None:
    operator = torch.library.custom_op("klif_sj_tests::decay", mutates_args=())

    @operator
    def decay(v: Tensor) -> Tensor:
        return 0.5 * v

    decay.register_autograd(lambda ctx, grad: 0.5 * grad)

    class Decaying(neuron.BaseNode):
        def single_step_functional_forward(self, inputs: Tensors, states: Tensors, **kwargs: Any) -> Result:
            v = decay(states[0]) + inputs[0]
            return (self.surrogate_function(v - 1.0),), (v,)

    with pytest.raises(ValueError, match=r"klif_sj_tests::decay.* at test_functional_steps\.py:\d+ .*elementwise"):
        fuse(Decaying())


def test_a_whole_sequence_within_a_step_is_refused_by_name() -> None:
    class Whole(neuron.BaseNode):
        def single_step_functional_forward(self, inputs: Tensors, states: Tensors, **kwargs: Any) -> Result:
            spikes, v, _ = functional.if_multi_step(
                inputs[0].unsqueeze(0), states[0], 1.0, 0.0, self.surrogate_function
            )
            return (spikes[0],), (v,)

    with pytest.raises(ValueError, match=r"aten::unsqueeze.* at test_functional_steps\.py:\d+ .*elementwise"):
        fuse(Whole())
