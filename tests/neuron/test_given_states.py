"""States that are given: broadcast and converted as SpikingJelly does, or refused with everything as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from neurons import BATCH, CHANNELS, CPU_BACKENDS, STEPS, assert_memories, current, snapshot
from spikingjelly.activation_based import functional
from tolerance import assert_close, assert_equal
from torch import Tensor

from klif_sj import CLIFNode, FusedNode, GLIFNode, KLIFNode, runtime
from klif_sj._compat import SPIKINGJELLY_2

MAKES = {
    "klif": lambda **options: KLIFNode(step_mode="m", **options),
    "clif": lambda **options: CLIFNode(step_mode="m", **options),
    "glif": lambda **options: GLIFNode(T=STEPS, inplane=CHANNELS, **options),
}

backends = pytest.mark.parametrize("backend", CPU_BACKENDS)


def by_reset_value(node: FusedNode, value: Any) -> None:
    node.set_reset_value("v", value)
    node.reset()


def by_attribute(node: FusedNode, value: Any) -> None:
    node.v = value


WAYS = [by_reset_value, by_attribute]


@backends
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize(
    "value",
    [
        torch.linspace(0.0, 0.9, CHANNELS),
        torch.linspace(0.0, 0.9, CHANNELS)[None],
        torch.linspace(0.0, 0.9, BATCH)[:, None],
        torch.tensor(0.4),
        torch.linspace(0.0, 0.9, BATCH * CHANNELS, dtype=torch.float64).view(BATCH, CHANNELS),
        torch.linspace(0.0, 0.9, BATCH * CHANNELS).view(BATCH, CHANNELS).bfloat16(),
        torch.linspace(0.0, 0.9, BATCH * CHANNELS).view(CHANNELS, BATCH).t(),
        1,
    ],
    ids=["[C]", "[1, C]", "[N, 1]", "scalar", "float64", "bfloat16", "transposed", "int"],
)
def test_what_can_be_broadcast_and_converted_is(value: Any, name: str, way: Any, backend: str) -> None:
    node, reference, x = MAKES[name](backend=backend), MAKES[name](backend="torch"), current()
    for parameter, other in zip(node.parameters(), reference.parameters(), strict=True):
        parameter.data = other.data.clone()
    way(node, value)
    whole = torch.as_tensor(value).float().expand(BATCH, CHANNELS).contiguous()
    reference.v = whole
    assert_equal(node(x), reference(x))
    assert_close(node.v, reference.v)
    assert node.v.dtype == torch.float32


@backends
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_states_of_another_dtype_than_the_inputs(dtype: torch.dtype, way: Any, backend: str) -> None:
    node, reference = (KLIFNode(step_mode="m", backend=b) for b in (backend, "torch"))
    value, x = torch.rand(BATCH, CHANNELS), current(dtype=dtype)
    way(node, value)
    reference.v = value.double() if dtype == torch.float64 else value
    assert_equal(node(x), reference(x))
    assert_close(node.v, reference.v)


@backends
def test_a_given_state_gets_its_gradient_in_its_own_shape_and_dtype(backend: str) -> None:
    found = []
    for name in (backend, "torch"):
        node = KLIFNode(step_mode="m", backend=name)
        value = torch.linspace(0.0, 0.9, CHANNELS, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(2)
        node.v = value
        (node(current()) * torch.arange(CHANNELS)).sum().backward()
        assert value.grad.shape == value.shape
        found.append(value.grad.float())
    assert_close(*found)


@backends
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.zeros(BATCH + 4, CHANNELS), "broadcasts to a step of shape .3, 5., got .7, 5."),
        (torch.zeros(CHANNELS, BATCH), "got .5, 3."),
        (torch.zeros(BATCH * CHANNELS), "got .15,."),
        (torch.zeros(2, BATCH, CHANNELS), "got .2, 3, 5."),
        (torch.zeros(BATCH, CHANNELS, device="meta"), "expected it on the input's device cpu, got meta"),
    ],
    ids=["batch", "transposed", "flat", "more dimensions", "device"],
)
def test_anything_else_is_refused(value: Tensor, match: str, mode: str, way: Any, backend: str) -> None:
    node = KLIFNode(step_mode=mode, backend=backend)
    x = current() if mode == "m" else current()[0]
    way(node, value)
    before = {name: id(state) for name, state in node._memories.items()}
    with pytest.raises(ValueError, match=f"KLIFNode: state 'v': .*{match}"):
        node(x)
    assert {name: id(state) for name, state in node._memories.items()} == before
    node.set_reset_value("v", 0.0)
    functional.reset_net(node)
    node(x)


@backends
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "value",
    [
        torch.ones(BATCH, CHANNELS, dtype=torch.complex64),
        torch.tensor(1j),
        torch.ones(BATCH, CHANNELS).to_sparse(),
        torch.nested.nested_tensor([torch.ones(CHANNELS)] * BATCH),
        torch.quantize_per_tensor(torch.ones(BATCH, CHANNELS), 0.1, 0, torch.quint8),
        None,
        "0.5",
        1j,
        np.ones((BATCH, CHANNELS)),
    ],
    ids=["complex", "one complex", "sparse", "nested", "quantized", "None", "text", "complex number", "array"],
)
def test_what_is_no_dense_real_tensor_and_no_number(value: Any, backend: str) -> None:
    node, x = KLIFNode(step_mode="m", backend=backend), current()
    node.v = value
    with pytest.raises(ValueError, match="KLIFNode: state 'v': expected a (number or a|dense) tensor"):
        node(x)
    assert node.v is value
    node.reset()
    assert_equal(node(x), KLIFNode(step_mode="m", backend="torch")(x))


@backends
def test_a_number_of_another_type(backend: str) -> None:
    node, x = KLIFNode(step_mode="m", backend=backend), current()
    node.v = 1.0
    expected = node(x)
    for value in (True, np.float32(1.0), 1):
        node.v = value
        assert_equal(node(x), expected)


@backends
def test_a_smaller_last_batch(backend: str) -> None:
    """States that a call left start again; a reset value of the whole batch cannot serve a smaller one."""
    node, x = KLIFNode(step_mode="m", backend=backend), current()
    node(x)
    assert_equal(node(x[:, :2]), KLIFNode(step_mode="m", backend=backend)(x[:, :2]))
    by_reset_value(node, torch.zeros(BATCH, CHANNELS))
    node(x)
    with pytest.raises(ValueError, match="got .3, 5."):
        node(x[:, :2])


@backends
def test_copies_and_moves_remember_what_a_call_has_left(backend: str) -> None:
    import copy
    import pickle

    x = current()
    for use in (copy.deepcopy, lambda node: pickle.loads(pickle.dumps(node)), lambda node: node.double().float()):
        node = KLIFNode(step_mode="m", backend=backend)
        node(x)
        assert_equal(use(node)(x[:, :1]), KLIFNode(step_mode="m", backend=backend)(x[:, :1]))


@backends
@pytest.mark.skipif(not SPIKINGJELLY_2, reason="the old line has no explicit states")
def test_explicit_states(backend: str) -> None:
    node, reference, x = KLIFNode(step_mode="m", backend=backend), KLIFNode(step_mode="m", backend="torch"), current()
    value = torch.linspace(0.0, 0.9, CHANNELS, dtype=torch.float64)
    (spikes,), (v,) = node.functional_forward((x,), (value,))
    reference.v = value.float().expand(BATCH, CHANNELS)
    assert_equal(spikes, reference(x))
    assert_close(v, reference.v)
    before = snapshot(node)
    with pytest.raises(ValueError, match="broadcasts to a step"):
        node.functional_forward((x,), (torch.zeros(2, 2),))
    with pytest.raises(ValueError, match="broadcasts to a step"):
        node.multi_step_functional_forward((x,), (torch.zeros(2, 2),))
    assert_memories(node, before)


@pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler on this machine")
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"initial": [torch.zeros(4, 5)]},
            r"expected shape \(3, 5\) of torch.float32, got shape \(4, 5\)",
        ),
        (
            {"initial": [torch.zeros(3, 5, dtype=torch.float64)]},
            "an initial state: expected shape .* of torch.float32, got shape .* of torch.float64",
        ),
        (
            {"initial": [torch.zeros(3, 5, device="meta")]},
            "expected it on the input's device cpu, got meta",
        ),
        ({"parameters": [torch.ones(2)]}, "parameter 'k': expected 1 elements of torch.float32, got 2 "),
        (
            {"parameters": [torch.ones((), dtype=torch.float64)]},
            "'k': expected 1 elements .*, got 1 of torch.float64",
        ),
    ],
)
def test_a_launch_checks_the_tensors_that_it_takes(change: dict[str, Any], match: str) -> None:
    """The last line of defence: whoever calls the runtime, no kernel reads memory that is not there."""
    program = KLIFNode().program()
    given = {"initial": [torch.zeros(3, 5)], "parameters": [torch.ones(())]} | change
    with pytest.raises(ValueError, match=match):
        runtime.run(program, current(), given["initial"], [], given["parameters"], 1, False, False, True)
    if any(tensor.is_meta for tensors in change.values() for tensor in tensors):
        return  # an operator takes what is on "meta" for a question about shapes
    with pytest.raises(ValueError, match=match):
        torch.ops.klif_sj.forward(program.text, current(), given["initial"], [], given["parameters"], 1, 0, False, True)
